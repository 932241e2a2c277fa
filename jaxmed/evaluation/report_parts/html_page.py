"""The report as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jaxmed.evaluation.report_parts.blocks import (
    Block,
    Bullets,
    Card,
    Cards,
    Details,
    Heading,
    Picture,
    Section,
    Slices,
    Table,
    Terms,
    Text,
)


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The whole page. Its only script is known to the browser by its digest, and nothing loads."""
    style, script = _part("page.css"), _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    # Even text that escaped the escaping could load and run nothing.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    shown = [section for section in sections if section.blocks]
    links = "\n".join(
        f'<li><a href="#part{i}">{escape(section.title)}</a></li>'
        for i, section in enumerate(shown)
    )
    contents = f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>\n' if len(shown) > 1 else ""
    parts = "\n".join(_section(i, section) for i, section in enumerate(shown))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{contents}</header>\n<main>\n{parts}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def escape(value: Any) -> str:
    """Any value as text that HTML shows and does not read."""
    return html.escape(str(value), quote=True)


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _section(number: int, section: Section) -> str:
    return (
        f'<section aria-labelledby="part{number}">\n<h2 id="part{number}">{escape(section.title)}'
        f"</h2>\n{_blocks(section.blocks)}\n</section>"
    )


def _blocks(blocks: Sequence[Block]) -> str:
    return "\n".join(_block(block) for block in blocks)


def _block(block: Block) -> str:
    match block:
        case Text(words, kind):
            return f"<p{_class(kind)}>{escape(words)}</p>"
        case Heading(words):
            return f"<h3>{escape(words)}</h3>"
        case Bullets(items, kind):
            lines = "\n".join(f"<li>{escape(item)}</li>" for item in items)
            return f"<ul{_class(kind)}>\n{lines}\n</ul>"
        case Terms(pairs):
            lines = "\n".join(f"<dt>{escape(t)}</dt><dd>{escape(m)}</dd>" for t, m in pairs)
            return f"<dl>\n{lines}\n</dl>"
        case Details(summary, blocks):
            inner = _blocks(blocks)
            return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"
        case Cards(cards):
            return '<div class="cards">\n' + "\n".join(map(_card, cards)) + "\n</div>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _table(table: Table) -> str:
    kinds = [""] * (len(table.head) - table.numbers) + [' class="number"'] * table.numbers
    top = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for kind, name in zip(kinds, table.head, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in table.rows
    )
    caption = escape(table.caption)
    # What scrolls must be reachable by the keyboard, and have a name then.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table>\n<caption>'
        f"{caption}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _picture(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    source = _source(picture.data)
    return f'<figure><img alt="{escape(picture.alt)}" src="{source}">{caption}</figure>'


def _source(data: bytes) -> str:
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _card(card: Card) -> str:
    shown = "\n".join(
        _slices(one) if isinstance(one, Slices) else _picture(one) for one in card.pictures
    )
    return (
        f'<article class="card"><h4>{escape(card.title)}</h4><p>{escape(card.words)}</p>\n'
        f'<div class="pictures">\n{shown}\n</div></article>'
    )


def _slices(slices: Slices) -> str:
    """One slice in a window over the strip of all; a script moves the strip."""
    count, (height, width) = len(slices.places), slices.size
    names = [slices.label(place) for place in range(count)]
    now = names[slices.start]
    offset = f"{-100 * slices.start / count:.4f}%"
    # Told by the control as well: a reader of the screen hears it when the slice changes.
    control = (
        '<div class="control" hidden><label>Slice, by slider or arrow keys'
        f'<input type="range" min="0" max="{count - 1}" step="1" value="{slices.start}" '
        f'aria-label="Slice of {escape(slices.alt)}" aria-valuetext="{now}" autocomplete="off">'
        "</label></div>"
    )
    return (
        f'<figure class="slices" data-names="{escape(json.dumps(names))}">'
        f'<div class="window" style="aspect-ratio: {width} / {height}">'
        f'<img alt="{escape(slices.alt)}" src="{_source(slices.strip)}" '
        f'width="{width}" height="{height * count}" '
        f'style="transform: translateY({offset})"></div>{control}'
        f'<figcaption><span class="which">{now}</span> {escape(slices.caption)}</figcaption>'
        "</figure>"
    )
