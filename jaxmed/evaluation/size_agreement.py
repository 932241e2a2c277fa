"""Figure of how far sizes of what was segmented agree with the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxmed.types import DatasetInfo

MOST_CLASSES = 10
"""Panels in one figure, at most; of more classes the first are drawn."""


def limits_of_agreement(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean difference, and the limits within which 95 % of differences lie: mean -/+ 1.96 SD.

    Source: Bland & Altman, Statistical Methods for Assessing Agreement between Two Methods of
    Clinical Measurement, Lancet 327, 1986.
    """
    bias, spread = float(differences.mean()), 1.96 * float(differences.std(ddof=1))
    return bias, bias - spread, bias + spread


def draw_agreement(info: DatasetInfo, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bland-Altman plot of each class's size; None where no class has three cases.

    Cases that hold a class in neither mask do not count, as in its other scores.
    """
    unit, scale = ("mm$^2$, or pixels", 1.0) if info.ndim == 2 else ("mm$^3$, or voxels", 1.0)
    found = {}
    for name in info.class_names[1:][:MOST_CLASSES]:
        pairs = [(row.get(f"size/{name}", 0), row.get(f"true_size/{name}", 0)) for row in rows]
        pairs = [pair for pair in pairs if max(pair) > 0]
        if len(pairs) > 2:
            found[name] = np.array(pairs, float)
    if not found:
        return None
    if info.ndim == 3 and max(sizes.max() for sizes in found.values()) >= 1e5:
        unit, scale = "ml, of files that state a spacing", 1e-3
    figure = Figure(figsize=(4.2 * len(found), 4), layout="constrained")
    axes = list(np.ravel(figure.subplots(1, len(found))))
    for axis, (name, sizes) in zip(axes, found.items(), strict=True):
        difference = scale * (sizes[:, 0] - sizes[:, 1])
        axis.plot(scale * sizes.mean(1), difference, "o", markersize=4, alpha=0.6)
        for value, style in zip(limits_of_agreement(difference), ("-", "--", "--"), strict=True):
            axis.axhline(value, color="k", linestyle=style, linewidth=1)
            axis.annotate(
                f"{value:.4g}",
                (1, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
            )
        axis.axhline(0, color="gray", linestyle=":", linewidth=1)
        axis.set(xlabel=f"mean of both ({unit})", title=name[:30].replace("$", r"\$"))
    axes[0].set_ylabel("predicted less true")
    return figure
