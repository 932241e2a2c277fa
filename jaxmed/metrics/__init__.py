"""Scores on the host, in NumPy: per case first, then summarised under bootstrap weights.

Every summary takes `weights` (resamples, cases) and returns arrays (resamples,), so that a whole
bootstrap is one call. Row 0 is by custom all ones: the score itself. A score that is undefined
under a row of weights (a class without cases, say) is NaN there. Weights are counts of any type,
single bytes as a rule: sums over cases take `weighted_sums`, or a wider type chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Real

# Numbers held at once by one temporary array: 32 MB of float64.
_CHUNK = 4_000_000


def chunks(resamples: int, *, width: int) -> Iterator[slice]:
    """Slices over resamples, so small that an array (slice, width) stays near 32 MB."""
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, resamples, step):
        yield slice(start, start + step)


def weighted_sums(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`weights @ values` in double precision, without a copy of all weights in it.

    Args:
        weights: (resamples, cases) of any type; small integers would overflow in a plain product.
        values: (cases,) or (cases, columns).

    Returns:
        (resamples,) or (resamples, columns).
    """
    values = np.asarray(values, np.float64)
    sums = np.empty((len(weights), *values.shape[1:]))
    for part in chunks(len(weights), width=len(values)):
        sums[part] = weights[part].astype(np.float64) @ values
    return sums


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
    rows: Sequence[Mapping[str, Any]], *, weights: Real[np.ndarray, "resamples cases"]
) -> dict[str, np.ndarray]:
    """Weighted mean over cases of each score that is one number a case; NaN cases do not count."""
    names = scalar_names(rows)
    values = np.array([[row.get(name, np.nan) for name in names] for row in rows], np.float64)
    defined = ~np.isnan(values)
    columns = np.concatenate([np.where(defined, values, 0), defined], axis=1)
    totals, masses = np.split(weighted_sums(weights, columns), 2, axis=1)
    return dict(zip(names, divide(totals, masses).T, strict=True))


def count_cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many cases count in each score of `mean_scores`: those where it is not NaN."""
    values = {name: [row.get(name, np.nan) for row in rows] for name in scalar_names(rows)}
    return {name: int(np.sum(~np.isnan(column))) for name, column in values.items()}


def count_groups(rows: Sequence[Mapping[str, Any]], groups: Sequence[Hashable]) -> dict[str, int]:
    """How many groups (patients) have a case that counts in each score of `mean_scores`."""
    pairs = list(zip(rows, groups, strict=True))
    return {
        name: len({group for row, group in pairs if not np.isnan(row.get(name, np.nan))})
        for name in scalar_names(rows)
    }


def fewer_of(own: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Of each score that both count, the smaller number."""
    return {name: min(count, other[name]) for name, count in own.items() if name in other}
