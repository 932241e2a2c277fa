"""Figures of what confidence is worth: reliability before and after calibration, and risk."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from jaxmed.evaluation.bootstrap import bootstrap_weights, percentiles
from jaxmed.metrics.selection import risk_coverage

BINS = 10
COVERAGE = np.linspace(0.02, 1, 99)
"""Shares of cases at which the band about a curve of risks is drawn."""


def draw_bins(
    axis: Any, name: str, truth: np.ndarray, score: np.ndarray, *, are_cases: bool = True
) -> None:
    """Mean probability and observed share in ten bins of equal width, those that are not empty.

    Of cases each share has its 95 % interval (Clopper & Pearson, Biometrika 26, 1934), as a bin may
    hold few; voxels of one case are too alike for one.
    """
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    full = count > 0
    count, hits = count[full], np.bincount(place, truth, minlength=BINS)[full]
    mean, share = np.bincount(place, score, minlength=BINS)[full] / count, hits / count
    [line] = axis.plot(mean, share, marker="o", label=name)
    if are_cases:
        low = scipy.stats.beta.ppf(0.025, hits, count - hits + 1)
        high = scipy.stats.beta.ppf(0.975, hits + 1, count - hits)
        bounds = np.where(hits > 0, low, 0), np.where(hits < count, high, 1)
        axis.vlines(mean, *bounds, color=line.get_color(), alpha=0.4, linewidth=1)


def draw_reliability(
    axes: Sequence[Any],
    before: Sequence[Any],
    after: Sequence[Any] | None,
    *,
    are_cases: bool = True,
) -> None:
    """Reliability of each curve in the first panel, and of the calibrated ones in the second.

    Args:
        axes: panels; the second is used where there is an `after`.
        before: (name, truth, probability) of each curve.
        after: the same of calibrated probabilities.
        are_cases: see `draw_bins`.
    """
    for axis, curves, title in zip(
        axes, (before, after or ()), ("as the network says", "calibrated"), strict=False
    ):
        axis.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1)
        for name, truth, score in curves:
            draw_bins(axis, name, truth, score, are_cases=are_cases)
        axis.set(xlabel="predicted probability", ylabel="observed share", title=title)
        if curves:
            axis.legend(fontsize=8)


def draw_risk(
    axis: Any,
    confidence: np.ndarray,
    loss: np.ndarray,
    *,
    name: str,
    groups: Sequence[Hashable] | None = None,
) -> None:
    """Risk-coverage curve with its pointwise 95 % band, and the mean loss for comparison.

    The band is by bootstrap over `groups`, one a case (patients), or over cases without.
    """
    weights = bootstrap_weights(len(loss), groups=groups, resamples=500, seed=0)
    coverage, risk = risk_coverage(confidence, loss, weights=weights)
    [line] = axis.plot(coverage[0], risk[0], drawstyle="steps-post")
    drawn = [
        np.interp(COVERAGE, c[c > 0], r[c > 0])  # without the cases before the first one drawn
        for c, r in zip(coverage[1:], risk[1:], strict=True)
    ]
    drawn_groups = len(loss) if groups is None else len(set(groups))
    if drawn_groups > 1:
        low, high = percentiles(np.array(drawn), groups=drawn_groups)
        axis.fill_between(COVERAGE, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.axhline(loss.mean(), color="gray", linestyle=":", linewidth=1)
    axis.set(xlabel="share of cases decided, the surest first", ylabel=name, title="risk-coverage")
    axis.set(xlim=(0, 1), ylim=(0, None))
