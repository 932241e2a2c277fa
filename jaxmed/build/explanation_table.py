"""What is told of maps and their checks: a sentence each, a table, a summary."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.scored_set import score_cells
from jaxmed.evaluation.bootstrap import Interval, bootstrap_weights, intervals


def short(checks: dict[str, Any]) -> str:
    """Whether a map passes its checks, and how much of it is where it should be."""
    told = "fails: " + "; ".join(checks["failures"]) if checks["failures"] else "passes"
    if "correlation" not in checks and not checks["empty"]:
        told += "; not compared with random weights, whose map is even"
    if "share" in checks:
        told += f"; {checks['share']:.0%} on {checks['share_of']} ({checks['region']:.0%} of image)"
    return told


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV line a map; curves are in the JSON only."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "deletion_curve"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            writer.writerow([_cell(row.get(name)) for name in names])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "; ".join(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def summarize_channels(rows: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Mean over the cases of how much each channel counts; {} where there is but one.

    Shapley values of the target's log-odds; absent channels have the baseline in their place.
    """
    cases = {row["case"]: row for row in rows}.values()
    names = [name for name in next(iter(cases), {}) if name.startswith("channel/")]
    weights = bootstrap_weights(len(cases), seed=0).astype(np.float64)
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)
    means = {name.split("/")[1]: share @ np.array([row[name] for row in cases]) for name in names}
    return intervals(means, cases=len(cases))


_LEGEND = (
    "passes: maps with no failure; random: rank correlation with the map of random weights (above "
    ".5 fails); deletion: score left while the map's first is deleted (random rankings in "
    "brackets; lower is better); insertion: score while it is put back (higher is better); on "
    "region: share of the map on what is known, or explained"
)


def print_summary(
    rows: Sequence[dict[str, Any]], methods: Sequence[str], channels: dict[str, Interval]
) -> None:
    """One line a method: how many of its maps pass, and what the checks are on average."""
    if not rows:
        return
    print("method                 passes  random  deletion (random)  insertion  on region")
    for method in methods:
        own = [row for row in rows if row["method"] == method]

        def mean(name: str, own: list[dict[str, Any]] = own) -> str:
            known = [row[name] for row in own if name in row]
            return f"{np.mean(known):.2f}" if known else "-"

        passed = sum(not row["failures"] for row in own)
        areas = f"{mean('deletion')} ({mean('deletion_random_mean')})"
        print(
            f"{method:<22} {passed:>3}/{len(own):<3} {mean('correlation'):>6}  {areas:>17}  "
            f"{mean('insertion'):>9}  {mean('share'):>9}"
        )
    print(textwrap.fill(_LEGEND, 100))
    if channels:
        told = (f"{name} {' ('.join(score_cells(entry))})" for name, entry in channels.items())
        print(f"channels, mean part of the target's log-odds that each makes: {', '.join(told)}")
