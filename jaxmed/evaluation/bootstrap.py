"""Confidence intervals by bootstrap over cases, or over patients where they are known."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

Interval = dict[str, float | int | None]
"""value, low, high (None where undefined) and n, as JSON takes them."""


def bootstrap_weights(
    cases: int,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int,
) -> Float[np.ndarray, "rows cases"]:
    """How often each case is drawn in each resample; row 0 is all ones, the set itself.

    Args:
        cases: number of cases.
        groups: one patient (or other cluster) a case. Patients are then drawn, with all their
            cases, since cases of one patient are not independent.
        resamples: rows beside the first.
        seed: of the draw.

    Returns:
        float32 (resamples + 1, cases).

    Raises:
        ValueError: if `groups` does not name one group a case.
    """
    if groups is not None and len(groups) != cases:
        raise ValueError(f"{len(groups)} groups for {cases} cases; expected one group a case")
    numbers: dict[Hashable, int] = {}
    names = range(cases) if groups is None else groups
    rows = [numbers.setdefault(name, len(numbers)) for name in names]
    count = len(numbers)
    weights = np.ones((resamples + 1, cases), np.float32)
    if count:
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
        weights[1:] = draws[:, rows]
    return weights


def intervals(
    samples: Mapping[str, np.ndarray],
    *,
    cases: int,
    counts: Mapping[str, int] | None = None,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile interval of each score.

    Args:
        samples: arrays (resamples + 1,) under the rows of `bootstrap_weights`.
        cases: size of the set.
        counts: cases that count in a score, where fewer (`jaxmed.metrics.count_cases`).
        level: of the interval.

    Returns:
        For each score value, low, high and n; and `undefined`, the number of resamples that are
        left out because the score has no value there, where there are any. JSON knows no NaN: a
        score without a value is None.
    """
    table = {}
    for name, values in samples.items():
        drawn = values[1:]
        defined = drawn[np.isfinite(drawn)]
        low, high = _percentiles(defined, level)
        value = float(values[0]) if np.isfinite(values[0]) else None
        entry: Interval = {"value": value, "low": low, "high": high}
        entry["n"] = (counts or {}).get(name, cases)
        if len(defined) < len(drawn):
            entry["undefined"] = len(drawn) - len(defined)
        table[name] = entry
    return table


def _percentiles(values: np.ndarray, level: float) -> tuple[float | None, float | None]:
    """Both ends of the central interval."""
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
