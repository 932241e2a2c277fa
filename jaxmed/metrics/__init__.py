"""Scores on the host, in NumPy: per case first, then summarised under bootstrap weights.

Every summary takes `weights` (resamples, cases) and returns arrays (resamples,), so that a whole
bootstrap is one call. Row 0 is by custom all ones: the score itself. A score that is undefined
under a row of weights (a class without cases, say) is NaN there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# Numbers held at once by one temporary array: 32 MB of float64.
_CHUNK = 4_000_000


def chunks(resamples: int, *, width: int) -> Iterator[slice]:
    """Slices over resamples, so small that an array (slice, width) stays near 32 MB."""
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, resamples, step):
        yield slice(start, start + step)


def divide(numerator: Any, denominator: Any, *, otherwise: float | int = np.nan) -> np.ndarray:
    """Elementwise division, `otherwise` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    filled = np.full(numerator.shape, otherwise, np.float64)
    return np.divide(numerator, denominator, out=filled, where=denominator != 0)


def mean_defined(values: np.ndarray, *, axis: int = -1) -> np.ndarray:
    """Mean over the entries that are not NaN; NaN, without a warning, where there are none."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0).sum(axis), defined.sum(axis))


def scalar_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the scores that are one number a case, in order of first appearance."""
    return list({name: None for row in rows for name, value in row.items() if np.ndim(value) == 0})


def mean_scores(
    rows: Sequence[Mapping[str, Any]], *, weights: Float[np.ndarray, "resamples cases"]
) -> dict[str, np.ndarray]:
    """Weighted mean over cases of each score that is one number a case; NaN cases do not count."""
    summary = {}
    for name in scalar_names(rows):
        values = np.array([row.get(name, np.nan) for row in rows], np.float64)
        defined = ~np.isnan(values)
        mass = weights @ defined.astype(weights.dtype)
        summary[name] = divide(weights @ np.where(defined, values, 0), mass)
    return summary


def count_cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many cases count in each score of `mean_scores`: those where it is not NaN."""
    values = {name: [row.get(name, np.nan) for row in rows] for name in scalar_names(rows)}
    return {name: int(np.sum(~np.isnan(column))) for name, column in values.items()}
