"""What the validation part fixes of a detection, applied unchanged to all other data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from jaxmed.evaluation.calibration import apply_platt, fit_platt
from jaxmed.evaluation.operating_points import choose_score_threshold
from jaxmed.metrics import divide
from jaxmed.types import Row


@dataclasses.dataclass(frozen=True)
class BoxDecisions:
    """Of a detection.

    Attributes:
        score_threshold: of the boxes that are drawn and counted.
        slope: and
        intercept: of `calibration.apply_platt`, which makes a score the probability that the box
            overlaps an object of its class by half.
    """

    score_threshold: float
    slope: float
    intercept: float

    @classmethod
    def fit(cls, rows: Sequence[Row]) -> BoxDecisions | None:
        """Fix all of it on the matched boxes of images that nothing was trained on.

        Args:
            rows: of `jaxmed.metrics.detection.match_detections`.

        Returns:
            None where no box is a hit.
        """
        scores, hits = _boxes_of(rows)
        if not hits.any():
            return None
        objects = int(sum(np.sum(row["truths"]) for row in rows))
        threshold = choose_score_threshold(scores, hits, objects=objects)
        return cls(threshold, *fit_platt(hits, scores))

    def probability(self, scores: Float[np.ndarray, "*boxes"]) -> Float[np.ndarray, "*boxes"]:
        """Of boxes to be a hit."""
        return apply_platt(scores, self.slope, self.intercept)


def score_boxes(
    rows: Sequence[Row], threshold: float, *, weights: Real[np.ndarray, "resamples images"]
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Sensitivity, precision and false positives an image among boxes from a threshold on.

    At an overlap of half, of all classes together, under each row of weights.
    """
    sure = [np.asarray(row["score"]) >= threshold for row in rows]
    called = np.array([s.sum() for s in sure])
    hits = np.array([row["matched"][0][s].sum() for row, s in zip(rows, sure, strict=True)])
    objects = np.array([np.sum(row["truths"]) for row in rows])
    mass = weights.astype(np.float64)
    return {
        "sensitivity": divide(mass @ hits, mass @ objects),
        "precision": divide(mass @ hits, mass @ called),
        "false_positives_an_image": divide(mass @ (called - hits), mass.sum(axis=1)),
    }


def _boxes_of(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all boxes, and which are hits at an overlap of half."""
    scores: list[Any] = [np.asarray(row["score"], np.float64) for row in rows]
    hits: list[Any] = [np.asarray(row["matched"][0], bool) for row in rows]
    return np.concatenate([*scores, []]), np.concatenate([*hits, np.zeros(0, bool)])
