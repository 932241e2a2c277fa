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
