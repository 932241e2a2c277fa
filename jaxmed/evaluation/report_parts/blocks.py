"""What a report is made of: plain text, tables and pictures, which each form writes its own way.

Nothing here is HTML or Markdown: what writes the form escapes all text in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        words: what it says.
        kind: "" or "lead", "small" or "warning".
    """

    words: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    words: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of sentences; `kind` is "" or "warning"."""

    items: Sequence[str]
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Terms:
    """Terms, each with its meaning."""

    pairs: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        caption: what the table is of.
        head: names of the columns; the first column names the rows.
        rows: cells.
        numbers: how many of the last columns hold numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 0


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        alt: what is seen, for those who cannot see it.
        caption: text below.
        data: the content of a PNG or JPEG file.
        file: the file it is from, where there is one.
    """

    alt: str
    caption: str
    data: bytes
    file: Path | None = None


@dataclasses.dataclass(frozen=True)
class Slices:
    """Slices of a volume to go through.

    Attributes:
        alt: what is seen.
        caption: text below; which slice is seen is added to it.
        strip: JPEG of all slices, one below the other.
        places: number of each slice in the volume, from 0.
        start: place in `places` of the slice that is seen first.
        depth: slices of the whole volume.
        size: height and width of one slice in the strip.
        still: a picture of one slice, for forms in which nothing moves.
    """

    alt: str
    caption: str
    strip: bytes
    places: Sequence[int]
    start: int
    depth: int
    size: tuple[int, int]
    still: Picture | None = None

    def label(self, place: int) -> str:
        """Which slice of the volume one of the strip is."""
        return f"slice {self.places[place] + 1} of {self.depth}"


@dataclasses.dataclass(frozen=True)
class Card:
    """One case: its name, what is told of it, and its pictures side by side."""

    title: str
    words: str
    pictures: Sequence[Picture | Slices]


@dataclasses.dataclass(frozen=True)
class Cards:
    """Cases next to each other."""

    cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class Details:
    """What most readers need not see: folded away on the screen, unfolded in print."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Heading | Bullets | Terms | Table | Picture | Cards | Details


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled part of the report; left out where it has no blocks."""

    title: str
    blocks: Sequence[Block]
