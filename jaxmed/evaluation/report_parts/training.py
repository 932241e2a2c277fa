"""The training of a run: losses and scores over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxmed.evaluation.pictures import figure_to_png
from jaxmed.evaluation.report_parts.blocks import Block, Details, Picture, Section, Table
from jaxmed.evaluation.report_parts.words import number

_AXES = ("step", "epoch", "seconds", "split", "models")
_MOST_SCORES = 4


def training_section(history: Sequence[Mapping[str, Any]], *, main_score: str = "") -> Section:
    """Loss and scores over the steps, drawn, with the last values in a table.

    Args:
        history: lines of metrics.jsonl.
        main_score: drawn first.
    """
    series = _series(history)
    if not series:
        return Section("Training", [])
    losses = {name: points for name, points in series.items() if name.endswith("loss")}
    # What is measured in passing, such as the norm of gradients, and single classes would crowd.
    scores = {
        name: points
        for name, points in series.items()
        if name not in losses and not name.startswith("train ") and "/" not in name
    }
    scores = dict(sorted(scores.items(), key=lambda entry: entry[0] != f"val {main_score}"))
    panels = [group for group in (losses, dict(list(scores.items())[:_MOST_SCORES])) if group]
    blocks: list[Block] = []
    if panels:
        data = figure_to_png(_draw_series(panels))
        what = ", ".join(name for group in panels for name in group)
        blocks.append(Picture(f"Curves over the steps: {what}", "Loss and validation scores", data))
    rows = [[name, str(points[-1][0]), number(points[-1][1])] for name, points in series.items()]
    table = Table("Last values that were logged", ("series", "step", "last value"), rows, 2)
    return Section("Training", [*blocks, Details("Last values", [table])])


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number that was logged, by "split name"."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in history:
        if "step" not in line:
            continue
        for name, value in line.items():
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in _AXES or not numeric or not math.isfinite(value):
                continue
            series.setdefault(f"{line.get('split', 'train')} {name}", []).append(
                (int(line["step"]), float(value))
            )
    return series


def _draw_series(panels: Sequence[Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, group in zip(axes, panels, strict=True):
        for name, points in group.items():
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 30 else ""
            axis.plot(steps, values, marker=marker, linewidth=1.2, label=name.replace("$", r"\$"))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
