"""What is gained by deciding the surest cases only, and leaving the others to somebody else."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real, Shaped

from jaxmed.metrics import chunks, divide


def risk_coverage(
    confidence: Float[np.ndarray, " cases"],
    loss: Shaped[np.ndarray, " cases"],
    *,
    weights: Real[np.ndarray, "resamples cases"],
) -> tuple[Float[np.ndarray, "resamples cases"], Float[np.ndarray, "resamples cases"]]:
    """Mean loss of the surest cases, for every share of cases that is decided.

    Cases that are equally sure are decided together.

    Args:
        confidence: the higher the surer.
        loss: of the decision: 1 where it is wrong, or one minus a Dice score.
        weights: one row a resample.

    Returns:
        coverage, from the surest case to all, and risk (0 where nothing is covered).

    Source: Geifman and El-Yaniv 2017 (arXiv 1705.08500).
    """
    order, ends = _ranking(confidence)
    mass = weights[:, order].astype(np.float64)
    covered = np.cumsum(mass, axis=1)[:, ends]
    lost = np.cumsum(mass * np.asarray(loss, np.float64)[order], axis=1)[:, ends]
    return divide(covered, covered[:, -1:]), divide(lost, covered, otherwise=0)


def area_under_risk(
    confidence: Float[np.ndarray, " cases"],
    loss: Shaped[np.ndarray, " cases"],
    *,
    weights: Real[np.ndarray, "resamples cases"],
) -> Float[np.ndarray, " resamples"]:
    """AURC: the mean of the risks of `risk_coverage`, the lower the better.

    Confidence that says nothing gives the mean loss.
    """
    order, _ = _ranking(confidence)
    areas = []
    for part in chunks(len(weights), width=len(order)):
        rows = weights[part]
        _, risk = risk_coverage(confidence, loss, weights=rows)
        mass = rows[:, order].astype(np.float64)
        areas.append(divide((mass * risk).sum(axis=1), mass.sum(axis=1)))
    return np.concatenate(areas)


def _ranking(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cases from the surest on, and the place of the last one as sure as each."""
    order = np.argsort(-np.asarray(confidence), kind="stable")
    ranked = -np.asarray(confidence)[order]
    return order, np.searchsorted(ranked, ranked, side="right") - 1
