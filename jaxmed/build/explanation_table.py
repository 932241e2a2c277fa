"""What is told of maps and their checks: a sentence each, a table, a summary."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def short(checks: dict[str, Any]) -> str:
    """Whether a map passes its checks, and how much of it is where it should be."""
    told = "fails: " + "; ".join(checks["failures"]) if checks["failures"] else "passes"
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


def print_summary(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
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
