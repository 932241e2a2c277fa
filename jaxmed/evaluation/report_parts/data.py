"""The data of a run: how they were divided, what was odd about them, and what stands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.evaluation.report_parts.blocks import Block, Bullets, Details, Heading, Section, Table
from jaxmed.evaluation.report_parts.words import number, part_title
from jaxmed.types import count_of

_MOST_CASES = 5  # of a finding, in the table
_MOST_LISTED = 200  # below it
_MOST_LETTERS = 400
_MOST_CLASSES = 12


def data_section(
    split: Mapping[str, Any], notes: Sequence[str], findings: Sequence[Mapping[str, Any]]
) -> Section:
    """Parts, notes and findings.

    Args:
        split: `parts`: of each part `cases`, and where known `patients` and `classes` (counts by
            name); and `told`: sentences on how it was made.
        notes: what was repaired or left out.
        findings: fields of a `jaxmed.data.examination.Finding` each.
    """
    blocks: list[Block] = []
    if split.get("parts"):
        blocks.append(_split_table(split["parts"]))
    if split.get("told"):
        blocks.append(Bullets(split["told"]))
    if notes:
        long = [note for note in notes if len(note) > _MOST_LETTERS]
        blocks += [
            Heading("What was odd about the data"),
            Bullets([_short(note) for note in notes]),
        ]
        if long:
            blocks.append(Details("Long notes, whole", [Bullets(long)]))
    return Section("Data", blocks + _findings(findings))


def _split_table(parts: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(n for part in parts.values() for n in part.get("classes") or {}))
    shown = names[:_MOST_CLASSES]
    patients = any(part.get("patients") is not None for part in parts.values())
    head = ["part", "cases", *(["patients"] if patients else []), *shown]
    rows = []
    for name, part in parts.items():
        row = [part_title(name), number(part["cases"])]
        row += [number(part.get("patients"))] if patients else []
        rows.append(row + [number((part.get("classes") or {}).get(n)) for n in shown])
    left = f" (the first {len(shown)} of {len(names)} classes)" if len(names) > len(shown) else ""
    caption = f"Cases of each part{', and of each class' if shown else ''}{left}"
    return Table(caption, head, rows, len(head) - 1)


def _short(note: str) -> str:
    return note if len(note) <= _MOST_LETTERS else f"{note[:_MOST_LETTERS]}… (whole below)"


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[Block]:
    """A line a finding; longer lists of cases are folded away below."""
    if not findings:
        return []
    rows, lists = [], []
    for finding in findings:
        kind, cases = finding["kind"], finding["cases"]
        more = len(cases) - _MOST_CASES
        told = "; ".join(cases[:_MOST_CASES]) + (f"; and {more} more, below" if more > 0 else "")
        rows.append([kind, finding["severity"], told, finding["advice"], str(len(cases))])
        if more > 0:
            left = len(cases) - _MOST_LISTED
            end = [f"and {left} more, in quality.json of the workdir"] if left > 0 else []
            items = Bullets([*cases[:_MOST_LISTED], *end])
            lists.append(Details(f"{kind}: {count_of(len(cases), 'case')}", [items]))
    head = ("what", "how grave", "where", "what to do", "n")
    table = Table("What stands out in the data, the gravest first", head, rows, 1)
    return [Heading("Findings of plan.py"), table, *lists]
