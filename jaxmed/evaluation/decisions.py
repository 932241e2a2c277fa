"""Everything that is fixed on the validation part, and then applied unchanged to all other data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxmed.data.splits import k_folds
from jaxmed.evaluation.calibration import apply_platt, apply_temperature, fit_platt, fit_temperature
from jaxmed.evaluation.conformal import fit_sets, make_sets
from jaxmed.evaluation.operating_points import choose_score_threshold, choose_threshold
from jaxmed.metrics import divide
from jaxmed.metrics.classification import expected_calibration_error
from jaxmed.types import Row

FOLDS = 5
"""Of the cross-fitting by which decisions are judged on the very part that they are fixed on."""


@dataclasses.dataclass(frozen=True)
class Decided:
    """What is decided of some cases.

    Attributes:
        probabilities: (cases, classes) calibrated.
        predicted: (cases,) class numbers.
        sets: (cases, classes) which classes are in the conformal set.
    """

    probabilities: Float[np.ndarray, "cases classes"]
    predicted: Integer[np.ndarray, " cases"]
    sets: Bool[np.ndarray, "cases classes"]


@dataclasses.dataclass(frozen=True)
class ClassDecisions:
    """Of a classification of exclusive classes.

    Attributes:
        temperature: of `calibration.apply_temperature`.
        threshold: calibrated probability from which on the last of two classes is decided for;
            None takes the likelier class.
        set_threshold: of `conformal.make_sets`, on the network's own probabilities.
        coverage: that the sets promise.
    """

    temperature: float
    threshold: float | None
    set_threshold: float
    coverage: float

    @classmethod
    def fit(
        cls,
        labels: Integer[np.ndarray, " cases"],
        probabilities: Float[np.ndarray, "cases classes"],
        *,
        rule: str = "",
        coverage: float = 0.9,
    ) -> ClassDecisions:
        """Fix all of it on cases that nothing was trained on.

        Args:
            labels: class numbers.
            probabilities: of the network.
            rule: of `operating_points.choose_threshold`; "" is the likelier class.
            coverage: of the sets.
        """
        temperature = fit_temperature(labels, probabilities)
        threshold = None
        if rule and probabilities.shape[1] == 2 and 0 < labels.sum() < len(labels):
            calibrated = apply_temperature(probabilities, temperature)
            threshold = choose_threshold(labels == 1, calibrated[:, 1], rule)
        sets = fit_sets(labels, probabilities, coverage=coverage)
        return cls(temperature, threshold, sets, coverage)

    def decide(self, probabilities: Float[np.ndarray, "cases classes"]) -> Decided:
        """Apply it to cases of any part."""
        calibrated = apply_temperature(probabilities, self.temperature)
        predicted = np.asarray(probabilities).argmax(axis=1)
        if self.threshold is not None:
            predicted = (calibrated[:, 1] >= self.threshold).astype(int)
        return Decided(calibrated, predicted, make_sets(probabilities, self.set_threshold))


def decide_crosswise(
    labels: Integer[np.ndarray, " cases"],
    probabilities: Float[np.ndarray, "cases classes"],
    fit: Callable[..., ClassDecisions],
    *,
    patients: Sequence[str] | None = None,
) -> Decided:
    """Each fifth of the cases decided by what is fixed on the others, patients kept whole.

    Raises:
        UserError: there are too few cases or patients.
    """
    ids = [str(i) for i in range(len(labels))]
    classes = probabilities.shape[1]
    found = Decided(
        np.zeros((len(labels), classes)),
        np.zeros(len(labels), int),
        np.zeros((len(labels), classes), bool),
    )
    for train, held in k_folds(ids, patients=patients, labels=labels, folds=FOLDS, seed=0):
        part = fit(labels[train], probabilities[train]).decide(probabilities[held])
        found.probabilities[held] = part.probabilities
        found.predicted[held] = part.predicted
        found.sets[held] = part.sets
    return found


def score_decided(
    labels: Integer[np.ndarray, " cases"],
    decided: Decided,
    *,
    weights: Float[np.ndarray, "resamples cases"],
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """How good what was decided is, under each row of weights.

    Returns:
        accuracy; of two classes sensitivity, specificity and precision of the last; ece and brier
        of the calibrated probabilities; set_coverage, the share of sets that hold the truth, and
        set_size, the mean number of classes in them.
    """
    rows = weights.astype(np.float64)
    total, right = rows.sum(axis=1), decided.predicted == labels
    classes = decided.probabilities.shape[1]
    scores = {"accuracy": divide(rows @ right, total)}
    if classes == 2:
        positive, called = labels == 1, decided.predicted == 1
        scores["sensitivity"] = divide(rows @ (positive & called), rows @ positive)
        scores["specificity"] = divide(rows @ (~positive & ~called), rows @ ~positive)
        scores["precision"] = divide(rows @ (positive & called), rows @ called)
    truth = labels[:, None] == np.arange(classes)
    if classes == 2:
        scores["ece"] = expected_calibration_error(truth[:, 1], decided.probabilities[:, 1], rows)
    else:
        likeliest = decided.probabilities.argmax(axis=1) == labels
        confidence = decided.probabilities.max(axis=1)
        scores["ece"] = expected_calibration_error(likeliest, confidence, rows)
    squares = ((decided.probabilities - truth) ** 2).sum(axis=1) / 2
    scores["brier"] = divide(rows @ squares, total)
    scores["set_coverage"] = divide(rows @ (decided.sets & truth).any(axis=1), total)
    scores["set_size"] = divide(rows @ decided.sets.sum(axis=1), total)
    return scores


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
    rows: Sequence[Row], threshold: float, *, weights: Float[np.ndarray, "resamples images"]
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
