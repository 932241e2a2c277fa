import numpy as np

from jaxmed.data.quality import find_broken
from jaxmed.types import UserError


class Files:
    """Cases of which some cannot be used."""

    def __init__(self, broken):
        self.broken = broken

    def __getitem__(self, row):
        if row in self.broken:
            raise UserError(f"{row}: cut short")
        return {"image": np.zeros(2)}


def test_every_broken_case_is_named_and_no_other():
    assert find_broken(Files({3, 17}), range(20)) == {3: "3: cut short", 17: "17: cut short"}
    assert find_broken(Files({3}), [1, 2]) == {}
