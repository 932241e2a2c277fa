"""Measurements of what a run segments in the cases of a part, and how much they tell of a label."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.config import write_json
from jaxmed.build.scored_set import read_subgroups, score_cells
from jaxmed.build.trained import TrainedRun
from jaxmed.explanation.measurements import FEWEST, measurement_importance, summarize_mask
from jaxmed.explanation.pictures import draw_importance
from jaxmed.types import Example, Source, UserError, count_of

_SHOWN = 8
"""Measurements in the printed list; importance.json has all."""
_MOST_VALUES = 20


def check_column(run: TrainedRun, source: Source, column: str) -> list[str]:
    """The value of each case in a column of the manifest.

    Raises:
        UserError: the run is no segmentation, or the data have no such column.
    """
    if run.info.task != "segmentation":
        raise UserError(
            f"--importance={column}: measures what was segmented; the run is a {run.info.task}"
        )
    path = run.experiment.config.data.path
    return read_subgroups(source, [column], path=path, flag="--importance")[column]


def write_importance(
    run: TrainedRun,
    source: Source,
    rows: Sequence[int],
    values: Sequence[str],
    column: str,
    output: Path,
) -> dict[str, Any] | None:
    """Write measurements.csv, importance.json and importance.png.

    Args:
        run: of a segmentation.
        source: the data.
        rows: cases to segment and measure.
        values: of the column, one a row of the source; cases without one are measured only.
        column: of the manifest.
        output: folder to write to.

    Returns:
        what is in importance.json; None where the cases do not suffice, which is told.
    """
    info, task = run.info, run.experiment.task
    names = () if info.instances else info.class_names
    originals: dict[int, Example] = {}

    def prepared() -> Iterator[Example]:
        for row in rows:
            originals[row] = {k: v for k, v in source[row].items() if k != "mask"}
            yield run.experiment.prepare(originals[row])

    table: dict[int, dict[str, float]] = {}
    for example, raw in run.predict(prepared()):
        row = int(example["index"])
        original, mask = originals.pop(row), np.asarray(task.restore(raw, example))
        table[row] = summarize_mask(
            mask, original["image"], spacing=original["spacing"], class_names=names
        )
    _write_table(output / "measurements.csv", source, table, values, column)
    patients = source.patients
    clusters: dict[str, set[Any]] = {}
    for row in table:
        clusters.setdefault(values[row], set()).add(row if patients is None else patients[row])
    clusters.pop("", None)
    if len(clusters) > _MOST_VALUES:
        raise UserError(
            f"--importance={column}: has {len(clusters)} different values among {len(table)} "
            f"cases; give a column of at most {_MOST_VALUES}, such as a diagnosis"
        )
    labels = sorted(label for label, own in clusters.items() if len(own) >= FEWEST)
    for label in sorted(clusters.keys() - labels):
        told_count = count_of(len(clusters[label]), "case" if patients is None else "patient")
        print(f"note: {column} {label} is left out, of which there is but {told_count}")
    known = [row for row in table if values[row] in labels]
    try:
        found = measurement_importance(
            [table[row] for row in known],
            [labels.index(values[row]) for row in known],
            groups=None if patients is None else [patients[row] for row in known],
            seed=run.experiment.config.seed,
        )
    except ValueError as error:
        print(f"note: no importance for {column}: {error}; measurements.csv is written")
        return None
    counts = {label: sum(values[row] == label for row in known) for label in labels}
    rate = max(counts.values()) / len(known)
    told = {"column": column, "cases": counts, "no_information_rate": rate, **found}
    write_json(output / "importance.json", told)
    draw_importance(output / "importance.png", _ranked(told), told["fall"], column=column)
    _print(told, output)
    return told


def _ranked(told: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of each measurement alone, the best first."""
    return dict(sorted(told["alone"].items(), key=lambda item: -item[1]["value"]))


def _write_table(
    path: Path,
    source: Source,
    table: dict[int, dict[str, float]],
    values: Sequence[str],
    column: str,
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", column, *next(iter(table.values()))])
        for row, found in table.items():
            cells = ("" if np.isnan(value) else f"{value:.6g}" for value in found.values())
            writer.writerow([source.ids[row], values[row], *cells])


def _print(told: dict[str, Any], output: Path) -> None:
    column = told["column"]
    cases = ", ".join(f"{label} {count}" for label, count in told["cases"].items())
    value, interval = score_cells(told["accuracy"])
    print(f"importance of measurements for {column} ({cases}) -> {output / 'importance.json'}")
    print(
        f"  all measurements tell {column} rightly in {value} ({interval}) of cases that the "
        f"forest did not see; always the commonest: {told['no_information_rate']:.3f}"
    )
    print(f"  {'measurement':<36} {'right with it alone':<24} fall where it is shuffled")
    for name, entry in list(_ranked(told).items())[:_SHOWN]:
        cells = [" (".join(score_cells(own)) + ")" for own in (entry, told["fall"][name])]
        print(f"  {name:<36} {cells[0]:<24} {cells[1]}")
