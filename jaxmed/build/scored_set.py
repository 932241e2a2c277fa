"""What is told of a set of scored cases, whoever predicted them: summary, files and tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxmed.build.config import write_json
from jaxmed.data.manifest import read_columns
from jaxmed.data.sources.base import FileSource
from jaxmed.evaluation.case_rows import ROWS_FILE, save_rows, scored_cases
from jaxmed.evaluation.evaluate import summarize_cases, write_cases
from jaxmed.evaluation.subgroups import summarize_subgroups
from jaxmed.evaluation.support import UNITS, find_limits, summarize_prevalence
from jaxmed.types import DatasetInfo, Row, Source, Task, UserError

SHOWN_SCORES = 2
"""Of each subgroup in the printed table; summary.json has all."""
_FILE_WIDTH = 120


def describe_set(
    task: Task,
    info: DatasetInfo,
    scores: Mapping[int, Row],
    *,
    patients: Sequence[str] | None,
    folds: Sequence[Collection[int]] = (),
    subgroups: Mapping[str, Sequence[str]] | None = None,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """Scores with intervals, prevalence and subgroups, and notes on what they cannot tell.

    Args:
        task: how cases are summarised.
        info: of the data set.
        scores: of each row.
        patients: one a row of the source, or None.
        folds: rows that different models predicted.
        subgroups: by column, a value a row of the source.
        resamples: of the bootstrap.
        seed: of the resampling.
    """
    options: dict[str, Any] = {
        "patients": patients,
        "folds": folds,
        "resamples": resamples,
        "seed": seed,
    }
    rows = list(scores.values())
    metrics = summarize_cases(task, scores, **options)
    told: dict[str, Any] = {
        "metrics": metrics,
        "main_score": task.main_score,
        "cases": len(scores),
        "resampled": "cases" if patients is None else "patients",
        "data": {
            "task": info.task,
            "ndim": info.ndim,
            "class_names": list(info.class_names),
            "multilabel": info.multilabel,
            "instances": info.instances,
        },
        **summarize_prevalence(info, rows),
    }
    drawn = len(scores) if patients is None else len({patients[row] for row in scores})
    notes = find_limits(
        info, rows, metrics, groups=drawn, no_information_rate=told.get("no_information_rate")
    )
    if subgroups:
        told["subgroups"] = {
            column: summarize_subgroups(
                task, scores, dict(enumerate(values)), column=column, **options
            )
            for column, values in subgroups.items()
        }
        for column, found in told["subgroups"].items():
            notes += _of_one_class(column, found)
    return told, notes


def _of_one_class(column: str, found: Mapping[str, Any]) -> list[str]:
    """A sentence on subgroups in which classes cannot be told apart, as all cases are of one."""
    alone = [name for name, group in found["groups"].items() if group["one_class"]]
    if not alone:
        return []
    return [
        f"{column} {', '.join(alone)}: all cases are of one class, so that accuracy is its "
        "recall, precision and f1 mean little, and differences to others compare classes"
    ]


def read_subgroups(
    source: Source, columns: Sequence[str], *, path: str | Path, flag: str = "--subgroups"
) -> dict[str, list[str]]:
    """The value of each case in columns of the data's manifest.

    Args:
        source: the data.
        columns: of its manifest.csv or split.csv.
        path: of the data; of an annotation file the folder that holds it, or the one above.
        flag: that named the columns, for errors.

    Raises:
        UserError: where the data have no such column.
    """
    if not columns:
        return {}
    if not isinstance(source, FileSource):
        raise UserError(f"{flag}: these data have no manifest.csv with columns of cases")
    root = Path(path).expanduser()
    if root.is_file():
        root = root.parent.parent if root.parent.name == "annotations" else root.parent
    files = [[*case.images, *([case.mask] if case.mask else [])] for case in source.cases]
    return read_columns(root, columns, files=files, ids=source.ids)


def write_set(
    folder: Path,
    ids: Sequence[str],
    scores: Mapping[int, Row],
    summary: Mapping[str, Any],
    *,
    task: Task,
    patients: Sequence[str] | None,
    folds: Mapping[int, int],
) -> dict[int, dict[str, Any]]:
    """Write summary.json, cases.csv and rows.npz; returns what cases.csv tells of each row.

    rows.npz is what `compare.py` computes the scores from again, without a network.
    """
    write_json(folder / "summary.json", summary)
    described = {row: dict(task.describe(score)) for row, score in scores.items()}
    for row, fold in folds.items():
        described[row]["fold"] = fold
    write_cases(folder / "cases.csv", ids, described)
    save_rows(folder / ROWS_FILE, scored_cases(ids, scores, patients=patients, folds=folds))
    return described


def print_summary(summary: Mapping[str, Any], *, title: str) -> None:
    """Print the scores with their intervals, prevalence and subgroups."""
    table = Table(title=title)
    for column in ("score", "value", "95 % interval", "cases"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, entry in summary["metrics"].items():
        unit = f" ({UNITS[base]})" if (base := name.partition("/")[0]) in UNITS else ""
        table.add_row(name + unit, *score_cells(entry), str(entry["n"]))
        if name == "accuracy" and "no_information_rate" in summary:
            rate = f"{summary['no_information_rate']:.3f}"
            table.add_row("  always the commonest class", rate, "", "")
    print_table(table)
    if "prevalence" in summary:
        shares = summary["prevalence"].items()
        print("prevalence: " + ", ".join(f"{name} {share:.1%}" for name, share in shares))
    for column, found in summary.get("subgroups", {}).items():
        _print_subgroups(column, found, summary["main_score"])


def _print_subgroups(column: str, found: Mapping[str, Any], main_score: str) -> None:
    """A line a subgroup: the first scores, and the difference of the main one."""
    groups, reference = found["groups"], found["reference"]
    metrics = groups[reference]["metrics"]
    names = dict.fromkeys([main_score, *metrics])
    # A subgroup of one class only has no ranking.
    shown = [name for name in names if metrics[name]["value"] is not None][:SHOWN_SCORES]
    if not shown:
        return
    table = Table(title=f"by {column}")
    for head in (column, "cases", *shown, f"{shown[0]} less that of {reference}"):
        table.add_column(head, justify="left" if head == column else "right", overflow="fold")
    for name, group in groups.items():
        cells = [" ".join(_brackets(group["metrics"].get(score))) for score in shown]
        difference = " ".join(_brackets(group.get("differences", {}).get(shown[0])))
        table.add_row(name, str(group["n"]), *cells, difference)
    print_table(table)
    few = [name for name, group in groups.items() if group["few"]]
    if few:
        print(f"note: too few cases for a score of {column} {', '.join(few)}")


def _brackets(entry: Mapping[str, Any] | None) -> tuple[str, ...]:
    if entry is None or entry["value"] is None:
        return ("",)
    value, interval = score_cells(entry)
    return value, f"({interval})"


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; into a file, where lines are not cut, wider."""
    console = Console()
    (console if console.is_terminal else Console(width=_FILE_WIDTH)).print(table)


def score_cells(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Value and interval of a score, as text."""
    if entry["value"] is None:
        return "-", "undefined"
    interval = "no spread" if entry.get("no_spread") else "-"
    if entry["low"] is not None:
        interval = f"{entry['low']:.3f} to {entry['high']:.3f}"
    return f"{entry['value']:.3f}", interval
