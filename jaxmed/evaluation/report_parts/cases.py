"""Pictures of chosen cases, the worst first: they teach the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed.evaluation.report_parts.blocks import (
    Block,
    Card,
    Cards,
    Heading,
    Picture,
    Section,
    Slices,
    Text,
)
from jaxmed.evaluation.report_parts.slices import shrink_picture
from jaxmed.evaluation.report_parts.words import number, score, score_title

GROUPS = ("worst", "typical", "best")
PAGE_BYTES = 9_500_000
"""Of pictures of cases in a page; a third more as text, so that pages stay under 15 MB."""
_MOST_BYTES = 600_000
_MOST_TOLD = 8


def picture_limit(pictures: int) -> int:
    """Bytes that each of so many pictures may have."""
    return min(_MOST_BYTES, PAGE_BYTES // max(1, pictures))


def picture_block(
    entry: Mapping[str, Any], *, alt: str, limit: int = _MOST_BYTES
) -> Picture | None:
    """The `picture` of an entry, the content of a PNG or JPEG or its file; None without any."""
    given = entry.get("picture")
    if not given:
        return None
    file = None if isinstance(given, bytes) else Path(given)
    data = given if file is None else file.read_bytes()
    return Picture(alt, entry.get("caption", ""), shrink_picture(data, limit), file)


def case_section(
    title: str, groups: Mapping[str, Sequence[Mapping[str, Any]]], *, ranked_by: str
) -> Section:
    """A card a case, group by group.

    Args:
        title: of the section.
        groups: see `write_report`.
        ranked_by: what the score of a case is, in words.
    """
    order = [name for name in GROUPS if name in groups] + [n for n in groups if n not in GROUPS]
    entries = [case for name in order for case in groups[name]]
    if not entries:
        return Section(title, [])
    limit = picture_limit(sum(len(_pictures(case)) for case in entries))
    blocks: list[Block] = []
    told = [f"Cases are ranked by {ranked_by}."] if ranked_by else []
    if any(isinstance(one, Slices) for case in entries for one in _pictures(case)):
        told.append(
            "Volumes are shown slice by slice along their third axis: axial, seen from the feet, "
            "where files state how the patient lies."
        )
    if told:
        blocks.append(Text(" ".join(told), "small"))
    for name in order:
        if groups[name]:
            cards = [_card(case, group=name, limit=limit) for case in groups[name]]
            blocks += [Heading(name.capitalize()), Cards(cards)]
    return Section(title, blocks)


def _pictures(case: Mapping[str, Any]) -> Sequence[Any]:
    """A case's pictures: blocks, or entries with a caption each."""
    if "pictures" in case:
        return case["pictures"]
    return [{k: v for k, v in case.items() if k.startswith("picture")}]


def _card(case: Mapping[str, Any], *, group: str, limit: int) -> Card:
    # Those of single classes are in cases.csv.
    told = {k: v for k, v in case.get("told", {}).items() if v != ""}
    told = {k: v for k, v in told.items() if k.partition("/")[0] not in told or "/" not in k}
    words = [] if case.get("score") in told.values() else [f"score {score(case.get('score'))}"]
    for name, value in list(told.items())[:_MOST_TOLD]:
        is_size = name.partition("/")[0] in ("size", "true_size")
        words.append(f"{score_title(name)} {number(value) if is_size else score(value)}")
    words.append(case.get("caption", ""))
    alt = f"{group} case {case['id']}"
    shown: list[Picture | Slices] = []
    for entry in _pictures(case):
        if isinstance(entry, (Picture, Slices)):
            shown.append(entry)
            continue
        what = entry.get("caption", "")
        block = picture_block(entry, alt=f"{alt}: {what}" if what else alt, limit=limit)
        shown += [block] if block else []
    return Card(str(case["id"]), " · ".join(filter(None, words)), shown)
