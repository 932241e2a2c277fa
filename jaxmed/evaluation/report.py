"""The report of a run: one HTML page that needs no other file, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed.evaluation.report_parts.blocks import Block, Details, Section, Table, Text
from jaxmed.evaluation.report_parts.cases import case_section, picture_block
from jaxmed.evaluation.report_parts.data import data_section
from jaxmed.evaluation.report_parts.html_page import html_page
from jaxmed.evaluation.report_parts.markdown_page import markdown_page
from jaxmed.evaluation.report_parts.model_card import model_card
from jaxmed.evaluation.report_parts.scores import (
    clipped,
    headline,
    score_section,
    warning_section,
    warnings_of,
)
from jaxmed.evaluation.report_parts.training import training_section
from jaxmed.evaluation.report_parts.words import part_title

CARD_FILE = "model_card.json"
"""In the workdir: what people state of a run that it cannot know itself."""


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    summaries: Mapping[str, Mapping[str, Any]] | None = None,
    cases: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
    shown: str = "",
    data: str = "the data",
    checkpoint: str = "",
    ranked_by: str = "",
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
    findings: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of one experiment; the page loads nothing from elsewhere.

    Args:
        path: of the HTML file; the Markdown lies beside it, with the suffix .md.
        title: of the page.
        config: resolved, nested or flat.
        history: lines of metrics.jsonl.
        summaries: by part, what evaluation/PART/summary.json holds; the first is the headline's.
        cases: by group ("worst", "typical", "best", or others), each with `id`, `score`, `told`
            (scores by name), `caption` and a picture, or `pictures` with a `caption` each.
        curves: figures, each with a `caption` and a `picture`, the content of a PNG or JPEG or its
            file; of cases also a block.
        shown: of which data the curves and the cases are.
        data: the name of the data set.
        checkpoint: which weights were evaluated.
        ranked_by: what the score of a case is.
        warnings: what a reader must know first, a sentence each.
        notes: what was odd about the data, likewise.
        split: see `data_section`.
        findings: what stands out in the data, the worst first; fields of a
            `jaxmed.data.examination.Finding`.
        facts: items of the model card, by `model_card.KEYS`; without any there is no card.
        versions: of software and devices.

    Returns:
        The path.
    """
    path, summaries = Path(path), summaries or {}
    main = next((summary.get("main_score", "") for summary in summaries.values()), "")
    told = [
        note
        for part, summary in summaries.items()
        for note in warnings_of(part, summary, told=notes)
    ]
    sections = [
        _summary(summaries, data=data, checkpoint=checkpoint),
        warning_section([*warnings, *told]),
        *(score_section(part, summary, data=data) for part, summary in summaries.items()),
        _curves(_heading("Curves", shown), curves),
        case_section(_heading("Cases", shown), cases or {}, ranked_by=ranked_by),
        data_section(split or {}, notes, findings),
        training_section(history, main_score=main),
        model_card(facts, file=CARD_FILE) if facts else Section("Model card", []),
        _config(config, versions or {}),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html_page(title, sections), encoding="utf-8")
    markdown = markdown_page(title, sections, folder=path.parent)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    return path


def _summary(summaries: Mapping[str, Mapping[str, Any]], *, data: str, checkpoint: str) -> Section:
    blocks: list[Block] = [
        Text(headline(part, summary, data=data, checkpoint=checkpoint), "" if i else "lead")
        for i, (part, summary) in enumerate(summaries.items())
        if summary.get("metrics")
    ]
    return Section("Result", blocks)


def _heading(words: str, shown: str) -> str:
    return f"{words} of {part_title(shown)}" if shown else words


def _curves(heading: str, entries: Sequence[Mapping[str, Any]]) -> Section:
    found = [picture_block(entry, alt=entry.get("caption", heading)) for entry in entries]
    return Section(heading, [picture for picture in found if picture is not None])


def _config(config: Mapping[str, Any], versions: Mapping[str, str]) -> Section:
    blocks: list[Block] = []
    if config:
        rows = [[key, clipped(value)] for key, value in _flatten(config)]
        table = Table("Configuration", ("key", "value"), rows)
        blocks.append(Details("All keys of the configuration", [table]))
    if versions:
        table = Table(
            "Software and hardware", ("what", "version"), list(map(list, versions.items()))
        )
        blocks.append(Details("Software and hardware", [table]))
    return Section("Configuration", blocks)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values."""
    flat: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
