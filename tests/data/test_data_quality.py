import numpy as np

from jaxmed.data.quality import duplicate_notes, look_through
from jaxmed.types import UserError


class Files:
    """Cases of which some cannot be used."""

    def __init__(self, broken):
        self.broken = broken

    def __getitem__(self, row):
        if row in self.broken:
            raise UserError(f"{row}: cut short")
        return {"image": np.full(2, row % 8)}


def test_every_broken_case_is_named_and_no_other():
    broken, digests = look_through(Files({3, 17}), range(20))
    assert broken == {3: "3: cut short", 17: "17: cut short"}
    assert sorted(digests) == sorted(set(range(20)) - {3, 17})
    assert look_through(Files({3}), [1, 2])[0] == {}


def test_doubles_are_told_within_a_part_and_across_parts():
    _, digests = look_through(Files(set()), range(20))  # row n is row n + 8
    assert duplicate_notes(digests, {"train": range(8)}) == []
    [within] = duplicate_notes(digests, {"train": range(10)})
    assert within.startswith("2 images of train repeat others")
    [across] = duplicate_notes(digests, {"train": range(8), "val": range(8, 11)})
    assert across.startswith("3 images of train also in val")


def test_one_image_with_two_labels_is_told():
    _, digests = look_through(Files(set()), range(20))
    split = {"train": range(8), "val": range(8, 12)}
    alike = [row % 8 for row in range(20)]
    assert len(duplicate_notes(digests, split, alike)) == 1
    other = [*alike[:9], 7, 7, *alike[11:]]  # rows 9 and 10 are the images of rows 1 and 2
    [_, told] = duplicate_notes(digests, split, other)
    assert told.startswith("2 images there several times with different labels")
    several = np.eye(8)[other]
    assert duplicate_notes(digests, split, several)[1] == told
