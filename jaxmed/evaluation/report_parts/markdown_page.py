"""The report as Markdown: the same words and tables, and pictures that are files already."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxmed.evaluation.report_parts.blocks import (
    Block,
    Bullets,
    Card,
    Cards,
    Details,
    Heading,
    Picture,
    Section,
    Table,
    Terms,
    Text,
)


def markdown_page(title: str, sections: Sequence[Section], *, folder: Path) -> str:
    """The whole text; pictures are named relative to `folder`, in which it will be."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        if section.blocks:
            parts.append(f"## {_plain(section.title)}")
            parts += [_block(block, folder) for block in section.blocks]
    return "\n\n".join(filter(None, parts)) + "\n"


def _plain(text: object) -> str:
    """Text on one line that Markdown shows and does not read."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~$])", r"\\\1", " ".join(str(text).split()))


def _block(block: Block, folder: Path) -> str:
    match block:
        case Text(words, kind):
            return f"> {_plain(words)}" if kind == "warning" else _plain(words)
        case Heading(words):
            return f"### {_plain(words)}"
        case Bullets(items, _):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Terms(pairs):
            return "\n".join(f"- **{_plain(term)}**: {_plain(meaning)}" for term, meaning in pairs)
        case Details(summary, blocks):
            return "\n\n".join([f"### {_plain(summary)}", *(_block(b, folder) for b in blocks)])
        case Cards(cards):
            return "\n\n".join(_card(card, folder) for card in cards)
        case Table():
            return _table(block)
        case Picture():
            return _picture(block, folder)


def _table(table: Table) -> str:
    places = ["---"] * (len(table.head) - table.numbers) + ["---:"] * table.numbers
    rows = [[_plain(cell) for cell in row] for row in (table.head, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], places, *rows[1:])]
    return f"**{_plain(table.caption)}**\n\n" + "\n".join(lines)


def _picture(picture: Picture, folder: Path) -> str:
    if picture.file is None:
        return ""
    # As in an address: names of files are ours here, but folders may hold anything.
    path = Path(os.path.relpath(picture.file, folder)).as_posix()
    return f"![{_plain(picture.alt)}](<{re.sub('[<>]', '', path)}>)\n\n{_plain(picture.caption)}"


def _card(card: Card, folder: Path) -> str:
    stills = [one if isinstance(one, Picture) else one.still for one in card.pictures]
    shown = [_picture(still, folder) for still in stills if still is not None]
    return "\n\n".join([f"**{_plain(card.title)}** {_plain(card.words)}", *filter(None, shown)])
