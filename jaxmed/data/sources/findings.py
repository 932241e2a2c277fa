"""What is found while a data set is looked through: problems, invalid annotations and notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from jaxmed.types import UserError, count_of

Item = TypeVar("Item")

PARTS = ("train", "val", "test")
LEFT_OUT = "none"
"""What a manifest says in place of a part for cases that are not to be used."""
PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SHOWN_PROBLEMS = 10


class DataError(UserError):
    """Several problems of one data set: the message shows the first, `problems` holds all."""

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


@dataclasses.dataclass
class Findings:
    """What was found while a data set was looked through.

    Attributes:
        where: the folder or file to name in an error.
        problems: what must be mended before anything can be done.
        invalid: wrong annotations; an error, or left out and counted, as the user chose.
        notes: what was odd and was repaired or left out.
    """

    where: Path
    problems: list[str] = dataclasses.field(default_factory=list)
    invalid: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def finish(self, *, policy: str = "error") -> None:
        """Raise one error with everything that stands in the way.

        Args:
            policy: "error" or "drop": whether invalid annotations are an error, or a note.

        Raises:
            DataError: if there are problems, or invalid annotations under "error".
        """
        if policy not in ("error", "drop"):
            raise UserError(f"invalid is {policy!r}; expected 'error' or 'drop'")
        if self.problems:
            raise _data_error(self.where, self.problems + self.invalid, "mend the files")
        if self.invalid and policy == "error":
            advice = "mend the files, or leave these out with --config.data.invalid=drop"
            raise _data_error(self.where, self.invalid, advice)
        if self.invalid:
            shown = "; ".join(first_of(self.invalid))
            problems = count_of(len(self.invalid), "problem")
            # As the sources do with data.invalid=drop.
            what = "wrong boxes alone, of what else is wrong the case"
            self.notes.append(f"Left out because of {problems} ({what}): {shown}")
            self.invalid = []  # told; a later call is of what was found since


def _data_error(where: Path, problems: Sequence[str], advice: str) -> DataError:
    if len(problems) == 1:
        return DataError(f"{where}: {problems[0]}; {advice}", problems)
    lines = [f"{where}: {len(problems)} problems", *first_of(problems), advice]
    return DataError("\n".join(lines), problems)


def first_of(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return [*problems[:SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def part_name(text: str) -> str | None:
    """The part that a text means, such as "val" by "Validation"; None if it means none."""
    return PART_NAMES.get(text.strip().lower())


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def one_a_key(
    items: Iterable[Item], key: Callable[[Item], str], *, what: str, findings: Findings
) -> dict[str, Item]:
    """Items by key, the first of each; a key that comes twice is a problem."""
    found: dict[str, Item] = {}
    for item in items:
        name = key(item)
        if name in found:
            findings.problems.append(f"two {what} have the name {name!r}: {found[name]}, {item}")
        else:
            found[name] = item
    return found
