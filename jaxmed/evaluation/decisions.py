"""What the validation part fixes of a classification, applied unchanged to all other data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from jaxmed.data.splits import k_folds
from jaxmed.evaluation.calibration import (
    apply_platt,
    apply_scaling,
    fit_platt,
    fit_scaling,
    fit_temperature,
)
from jaxmed.evaluation.conformal import fit_sets, make_sets
from jaxmed.evaluation.operating_points import choose_threshold
from jaxmed.inference.standalone.decisions import reaches
from jaxmed.metrics import divide
from jaxmed.metrics.classification import expected_calibration_error

FOLDS = 5
"""Of the cross-fitting by which decisions are judged on the very part that they are fixed on."""


@dataclasses.dataclass(frozen=True)
class Decided:
    """What is decided of some cases.

    Attributes:
        probabilities: (cases, classes) calibrated.
        predicted: (cases,) class numbers; of several labels at once (cases, classes) which hold.
        sets: (cases, classes) which classes are in the conformal set; of several labels None.
    """

    probabilities: Float[np.ndarray, "cases classes"]
    predicted: Integer[np.ndarray, " cases"] | Bool[np.ndarray, "cases classes"]
    sets: Bool[np.ndarray, "cases classes"] | None


@dataclasses.dataclass(frozen=True)
class ClassDecisions:
    """Of a classification of exclusive classes.

    Attributes:
        temperature: of `calibration.apply_scaling`.
        threshold: calibrated probability from which on the last of two classes is decided for;
            None takes the likelier class.
        set_threshold: of `conformal.make_sets`, on the network's own probabilities.
        coverage: that the sets promise.
        biases: of `apply_scaling`, one a class; a single 0 where only the temperature was fitted.
        rule: that chose the threshold; "" where it is None.
    """

    temperature: float
    threshold: float | None
    set_threshold: float
    coverage: float
    biases: Sequence[float] = (0.0,)
    rule: str = ""

    @classmethod
    def fit(
        cls,
        labels: Integer[np.ndarray, " cases"],
        probabilities: Float[np.ndarray, "cases classes"],
        *,
        rule: str = "",
        coverage: float = 0.9,
        biased: bool = False,
    ) -> ClassDecisions:
        """Fix all of it on cases that nothing was trained on.

        Args:
            labels: class numbers.
            probabilities: of the network.
            rule: of `operating_points.choose_threshold`; "" is the likelier class.
            coverage: of the sets.
            biased: also fit a bias a class.
        """
        if biased:
            temperature, biases = fit_scaling(labels, probabilities)
        else:
            temperature, biases = fit_temperature(labels, probabilities), (0.0,)
        threshold = None
        if rule and probabilities.shape[1] == 2 and 0 < labels.sum() < len(labels):
            calibrated = apply_scaling(probabilities, temperature, biases)
            threshold = choose_threshold(labels == 1, calibrated[:, 1], rule)
        sets = fit_sets(labels, probabilities, coverage=coverage)
        used = rule if threshold is not None else ""
        return cls(temperature, threshold, sets, coverage, biases, used)

    def decide(self, probabilities: Float[np.ndarray, "cases classes"]) -> Decided:
        """Apply it to cases of any part."""
        calibrated = apply_scaling(probabilities, self.temperature, self.biases)
        # A temperature keeps the order of the classes, a rounding of it might not.
        likeliest = calibrated if any(self.biases) else np.asarray(probabilities)
        predicted = likeliest.argmax(axis=1)
        if self.threshold is not None:
            predicted = reaches(calibrated[:, 1], self.threshold).astype(int)
        return Decided(calibrated, predicted, make_sets(probabilities, self.set_threshold))


@dataclasses.dataclass(frozen=True)
class LabelDecisions:
    """Of a classification where several labels may hold at once: each for itself.

    Attributes:
        slopes: and
        intercepts: of `calibration.apply_platt`, one a class.
        thresholds: calibrated probability from which on a class is decided for, one a class.
    """

    slopes: Sequence[float]
    intercepts: Sequence[float]
    thresholds: Sequence[float]

    @classmethod
    def fit(
        cls,
        labels: Integer[np.ndarray, "cases classes"],
        probabilities: Float[np.ndarray, "cases classes"],
        *,
        rule: str = "",
    ) -> LabelDecisions:
        """Fix all of it on cases that nothing was trained on.

        A class that all or no cases have stays as the network says, decided for from 1/2 on.

        Args:
            labels: 0 and 1; -1 is unknown and does not count.
            probabilities: of the network.
            rule: of `operating_points.choose_threshold`; "" is 1/2.
        """
        found = []
        for truth, scores in zip(labels.T, probabilities.T, strict=True):
            positive, own = truth[truth >= 0] == 1, scores[truth >= 0]
            if not 0 < positive.sum() < len(positive):
                found.append((1.0, 0.0, 0.5))
                continue
            slope, intercept = fit_platt(positive, own)
            calibrated = apply_platt(own, slope, intercept)
            threshold = choose_threshold(positive, calibrated, rule) if rule else 0.5
            found.append((slope, intercept, threshold))
        slopes, intercepts, thresholds = zip(*found, strict=True)
        return cls(slopes, intercepts, thresholds)

    def decide(self, probabilities: Float[np.ndarray, "cases classes"]) -> Decided:
        """Apply it to cases of any part."""
        calibrated = apply_platt(probabilities, np.array(self.slopes), np.array(self.intercepts))
        return Decided(calibrated, reaches(calibrated, np.array(self.thresholds)), None)


def decide_crosswise(
    labels: Integer[np.ndarray, " cases"] | Integer[np.ndarray, "cases classes"],
    probabilities: Float[np.ndarray, "cases classes"],
    fit: Callable[..., ClassDecisions | LabelDecisions],
    *,
    patients: Sequence[str] | None = None,
) -> Decided:
    """Each fifth of the cases decided by what is fixed on the others, patients kept whole.

    Raises:
        UserError: there are too few cases or patients.
    """
    ids = [str(i) for i in range(len(labels))]
    # Unknown labels count as absent where cases are spread evenly.
    spread = np.maximum(labels, 0)
    folds = k_folds(ids, patients=patients, labels=spread, folds=FOLDS, seed=0)
    parts = [
        fit(labels[own], probabilities[own]).decide(probabilities[held]) for own, held in folds
    ]
    order = np.argsort(np.concatenate([held for _, held in folds]))

    def gather(values: Sequence[Any]) -> Any:
        return None if values[0] is None else np.concatenate(values)[order]

    return Decided(
        gather([part.probabilities for part in parts]),
        gather([part.predicted for part in parts]),
        gather([part.sets for part in parts]),
    )


def score_labels(
    labels: Integer[np.ndarray, "cases classes"],
    decided: Decided,
    *,
    weights: Real[np.ndarray, "resamples cases"],
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """How good what was decided of several labels at once is, under each row of weights.

    Returns:
        accuracy, sensitivity, specificity, and ece and brier of the calibrated probabilities: means
        over the classes, without those that the set has no case for. Unknown labels do not count.
    """
    found: dict[str, list[np.ndarray]] = {}
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        positive, called = labels[known, c] == 1, decided.predicted[known, c]
        said, rows = decided.probabilities[known, c], weights[:, known].astype(np.float64)
        scores = {
            "accuracy": divide(rows @ (positive == called), rows.sum(axis=1)),
            **_rates(positive, called, rows),
            "ece": expected_calibration_error(positive, said, rows),
            "brier": divide(rows @ (said - positive) ** 2, rows.sum(axis=1)),
        }
        for name, values in scores.items():
            if np.isfinite(values[0]):
                found.setdefault(name, []).append(values)
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def score_decided(
    labels: Integer[np.ndarray, " cases"],
    decided: Decided,
    *,
    weights: Real[np.ndarray, "resamples cases"],
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """How good what was decided of exclusive classes is, under each row of weights.

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
        scores |= _rates(positive, called, rows)
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
    if decided.sets is not None:
        scores["set_coverage"] = divide(rows @ (decided.sets & truth).any(axis=1), total)
        scores["set_size"] = divide(rows @ decided.sets.sum(axis=1), total)
    return scores


def _rates(positive: np.ndarray, called: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Sensitivity and specificity of what was called, under each row of weights."""
    return {
        "sensitivity": divide(rows @ (positive & called), rows @ positive),
        "specificity": divide(rows @ (~positive & ~called), rows @ ~positive),
    }
