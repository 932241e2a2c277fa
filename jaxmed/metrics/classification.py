"""Classification: counting, ranking and calibration scores under bootstrap weights.

Each class is one binary problem (its cases against the rest), and every score is built from
those. Ties in the scores are treated as scikit-learn treats them. A class without a case under a
row of weights has no recall, precision, f1, auroc or average precision there (NaN), and neither
has the macro mean: else a resample would be scored on easier terms than the set. A class that the
whole set lacks is left out of macro means. Precision is 0 where a class is never predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from jaxmed.metrics import chunks, divide
from jaxmed.metrics.selection import area_under_risk

PER_CLASS = ("recall", "precision", "f1", "auroc", "average_precision")
BINS = 15


def summarize_classification(
    labels: Integer[np.ndarray, " cases"] | Integer[np.ndarray, "cases classes"],
    probabilities: Float[np.ndarray, "cases classes"],
    *,
    weights: Real[np.ndarray, "resamples cases"],
    class_names: Sequence[str],
    threshold: float | np.ndarray | None = None,
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Every classification score, and `NAME/CLASS` for those that belong to one class.

    Without a suffix: of the last class (two classes), the macro mean (more), or the mean over
    classes (multi-label, where accuracy is that of each label on its own, and calibration that of
    each class).

    Args:
        labels: class numbers, or 0 and 1 a class for multi-label; -1 is unknown and left out.
        probabilities: of each class.
        weights: one row a resample.
        class_names: for the names of the scores.
        threshold: probability from which on a class (of two: the last) is predicted, one number
            or for multi-label one a class. Choose it on the validation part. Default: the most
            probable class, or 1/2 for multi-label. More than two exclusive classes take none.

    Returns:
        accuracy, balanced_accuracy, recall, precision, f1, auroc, average_precision, ece, of
        exclusive classes brier and aurc (of the likeliest class), and the scores per class.
    """
    multilabel = labels.ndim == 2
    if not multilabel and (labels < 0).any():
        keep = labels >= 0
        labels, probabilities, weights = labels[keep], probabilities[keep], weights[:, keep]
    classes = probabilities.shape[1]
    truth, known = _one_against_rest(labels, classes)
    predicted = _decide(probabilities, threshold, multilabel=multilabel)
    parts = []
    for part in chunks(len(weights), width=len(labels)):
        rows = weights[part].astype(np.float64)
        per_class = [
            _class_scores(truth[k, c], predicted[k, c], probabilities[k, c], rows[:, k])
            for c, k in ((c, known[:, c]) for c in range(classes))
        ]
        scores = {name: np.stack([s[name] for s in per_class], 1) for name in per_class[0]}
        overall = _combine(scores, truth=truth, known=known, multilabel=multilabel)
        if not multilabel:
            overall["accuracy"] = divide(rows @ (predicted & truth).any(axis=1), rows.sum(axis=1))
        if not multilabel:
            # Brier 1950, halved, which of two classes is the squared error of the last one.
            squares = ((probabilities - truth) ** 2).sum(axis=1) / 2
            overall["brier"] = divide(rows @ squares, rows.sum(axis=1))
            mistaken = probabilities.argmax(axis=1) != labels
            overall["aurc"] = area_under_risk(probabilities.max(axis=1), mistaken, weights=rows)
        if not multilabel and classes > 2:
            correct = probabilities.argmax(axis=1) == labels
            overall["ece"] = expected_calibration_error(correct, probabilities.max(1), rows)
        for name in PER_CLASS:
            of_class = zip(class_names, scores[name].T, strict=True)
            overall.update({f"{name}/{class_name}": s for class_name, s in of_class})
        parts.append(overall)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _one_against_rest(labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth of each class (cases, classes), and where it is known."""
    if labels.ndim == 2:
        return labels == 1, labels >= 0
    truth = labels[:, None] == np.arange(classes)
    return truth, np.broadcast_to(labels[:, None] >= 0, truth.shape)


def _decide(
    probabilities: np.ndarray, threshold: float | np.ndarray | None, *, multilabel: bool
) -> np.ndarray:
    """Predicted classes as booleans (cases, classes)."""
    classes = probabilities.shape[1]
    if multilabel:
        return probabilities >= (0.5 if threshold is None else threshold)
    if threshold is None:
        return probabilities.argmax(axis=1)[:, None] == np.arange(classes)
    if classes != 2:
        raise ValueError(f"threshold needs two classes or multi-label; there are {classes} classes")
    last = probabilities[:, 1] >= threshold
    return np.stack([~last, last], axis=1)


def _class_scores(
    truth: Bool[np.ndarray, " cases"],
    predicted: Bool[np.ndarray, " cases"],
    scores: Float[np.ndarray, " cases"],
    weights: Real[np.ndarray, "resamples cases"],
) -> dict[str, np.ndarray]:
    """Scores of one class against the rest; `specificity` is for the balanced accuracy."""
    true_positives, positives = weights @ (truth & predicted), weights @ truth
    called, total = weights @ predicted, weights.sum(axis=1)
    true_negatives = weights @ (~truth & ~predicted)
    auroc, average_precision = ranking_scores(truth, scores, weights)
    precision = np.where(positives > 0, divide(true_positives, called, otherwise=0), np.nan)
    f1 = np.where(positives > 0, divide(2 * true_positives, positives + called), np.nan)
    return {
        "accuracy": divide(true_positives + true_negatives, total),
        "recall": divide(true_positives, positives),
        "specificity": divide(true_negatives, total - positives),
        "precision": precision,
        "f1": f1,
        "auroc": auroc,
        "average_precision": average_precision,
        "ece": expected_calibration_error(truth, scores, weights),
    }


def _combine(
    scores: dict[str, np.ndarray], *, truth: np.ndarray, known: np.ndarray, multilabel: bool
) -> dict[str, np.ndarray]:
    """Scores (resamples, classes) of all classes -> scores (resamples,) of the set."""
    classes = truth.shape[1]
    binary = classes == 2 and not multilabel
    # Two exclusive classes: what is asked for is the last one, such as "diseased".
    last = np.arange(classes) == classes - 1
    overall = {}
    for name, values in scores.items():
        among = known if name in ("accuracy", "ece") else truth
        chosen = last if binary else among.any(axis=0)
        overall[name] = divide(values[:, chosen].sum(axis=1), chosen.sum())
    recall, specificity = overall["recall"], overall.pop("specificity")
    one_sided = not binary and not multilabel  # the recalls of exclusive classes say it all
    overall["balanced_accuracy"] = recall if one_sided else (recall + specificity) / 2
    return overall


def ranking_scores(
    truth: Bool[np.ndarray, " cases"],
    scores: Float[np.ndarray, " cases"],
    weights: Real[np.ndarray, "resamples cases"],
) -> tuple[Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]]:
    """Area under the ROC curve (trapezoids) and average precision (steps) of one class.

    The cases are sorted once; tied cases pass the threshold together. Both are means over the
    positive cases, of the negatives that one beats and of the precision where it is found, so that
    only the positives' columns are looked at. Undefined (NaN) without a positive, and the area
    without a negative.
    """
    order = np.argsort(-scores, kind="stable")
    positive = np.flatnonzero(truth[order])
    ranked = -scores[order]
    first = np.searchsorted(ranked, ranked[positive], side="left")
    end = np.searchsorted(ranked, ranked[positive], side="right")
    mass = weights[:, order]
    own = mass[:, positive]
    called, hits = _running_totals(mass), _running_totals(own)
    hits_above = hits[:, np.searchsorted(positive, first)]
    hits_so_far = hits[:, np.searchsorted(positive, end)]
    alarms_above = called[:, first] - hits_above
    alarms_so_far = called[:, end] - hits_so_far
    positives, negatives = hits[:, -1], called[:, -1] - hits[:, -1]
    lost = (own * (alarms_above + alarms_so_far)).sum(axis=1) / 2
    auroc = 1 - divide(lost, positives * negatives)
    precision = divide(hits_so_far, called[:, end], otherwise=0)
    return auroc, divide((own * precision).sum(axis=1), positives)


def _running_totals(weights: np.ndarray) -> np.ndarray:
    """Cumulative sums along the rows, with a 0 before: (resamples, n) -> (resamples, n + 1)."""
    totals = np.zeros((len(weights), weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=totals[:, 1:])
    return totals


def expected_calibration_error(
    truth: Bool[np.ndarray, " cases"],
    confidences: Float[np.ndarray, " cases"],
    weights: Real[np.ndarray, "resamples cases"],
    *,
    bins: int = BINS,
) -> Float[np.ndarray, " resamples"]:
    """Mean gap between confidence and frequency in bins of equal width.

    Of one class, `truth` is whether it holds and `confidences` its probability; of several
    exclusive ones, `truth` is whether the most probable class was right (Guo et al., On
    Calibration of Modern Neural Networks, ICML 2017, equation 3). Bins are closed above.
    """
    place = np.ceil(confidences * bins).astype(int) - 1
    members = place.clip(0, bins - 1)[:, None] == np.arange(bins)
    gaps = weights @ (members * (confidences - truth)[:, None])
    return divide(np.abs(gaps).sum(axis=1), weights.sum(axis=1))
