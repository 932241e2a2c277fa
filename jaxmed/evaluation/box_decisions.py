"""What the validation part fixes of a detection, applied unchanged to all other data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from jaxmed.data.splits import k_folds
from jaxmed.evaluation.calibration import apply_platt, fit_platt
from jaxmed.evaluation.decisions import FOLDS
from jaxmed.evaluation.operating_points import choose_score_threshold
from jaxmed.metrics import divide
from jaxmed.types import Row, UserError


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


def thresholds_crosswise(
    rows: Sequence[Row], *, patients: Sequence[str] | None = None
) -> Float[np.ndarray, " images"]:
    """For each fifth of the images the threshold that the others choose, patients kept whole.

    Raises:
        UserError: there are too few images or patients, or hits to choose by.
    """
    found = np.zeros(len(rows))
    ids = [str(i) for i in range(len(rows))]
    for own, held in k_folds(ids, patients=patients, folds=FOLDS, seed=0):
        fixed = BoxDecisions.fit([rows[i] for i in own])
        if fixed is None:
            raise UserError("no box of some folds is a hit")
        found[held] = fixed.score_threshold
    return found


def score_boxes(
    rows: Sequence[Row],
    thresholds: Float[np.ndarray, " images"],
    *,
    weights: Real[np.ndarray, "resamples images"],
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Sensitivity, precision and false positives an image among boxes from a threshold on.

    At an overlap of half, of all classes together, under each row of weights.

    Args:
        rows: of `jaxmed.metrics.detection.match_detections`.
        thresholds: of the boxes of each image that count.
        weights: of the images.
    """
    pairs = zip(rows, thresholds, strict=True)
    sure = [np.asarray(row["score"]) >= threshold for row, threshold in pairs]
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
