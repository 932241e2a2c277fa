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
from scipy.special import erf

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
        exclusive classes brier and aurc (of the likeliest class), and the scores per class. `ece`
        is without what chance adds, see `expected_calibration_error`.
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
        if multilabel or classes == 2:
            chosen = known.any(axis=0) if multilabel else np.arange(2) == 1
            overall["ece"] = expected_calibration_error(
                truth[:, chosen], probabilities[:, chosen], rows, known=known[:, chosen]
            )
        else:
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
        among = known if name == "accuracy" else truth
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
    truth: Bool[np.ndarray, "cases ..."],
    confidences: Float[np.ndarray, "cases ..."],
    weights: Real[np.ndarray, "resamples cases"],
    *,
    known: Bool[np.ndarray, "cases classes"] | None = None,
    bins: int = BINS,
) -> Float[np.ndarray, " resamples"]:
    """Mean gap between confidence and frequency in bins of equal width, less what chance adds.

    Of one class, `truth` is whether it holds and `confidences` its probability; of several
    exclusive ones, `truth` is whether the most probable class was right (Guo et al., On
    Calibration of Modern Neural Networks, ICML 2017, equation 3). Bins are closed above. Of several
    columns it is the mean over the classes.

    In n cases the gaps of even a perfectly calibrated network are not 0, so that their plain sum
    is too large, by more the fewer the cases are, and that of a resample, in which chance comes in
    twice, larger still. So the gaps are shrunk by the one factor with which chance would make them
    as large, all in all, as they are:

    - Of the set itself, under equal weights, by expectation: the sum of
      E|factor * gap + spread * normal| over the bins is that of the |gap|.
    - Of a resample, whose gaps are the set's and a deviation, so that the sum of
      |factor * gap + deviation| is. Percentiles of that over resamples are the ends of the
      interval of test inversion (Carpenter, Test Inversion Bootstrap Confidence Intervals, Journal
      of the Royal Statistical Society B 61, 1999) in the family of shrunken and stretched gaps.

    It is 0 where chance alone would do, and somewhat too small where small gaps lie in all bins.

    Args:
        truth: of each case, or of each class.
        confidences: likewise.
        weights: one row a resample.
        known: of several classes, where the truth is known; everywhere by default.
        bins: of equal width.
    """
    columns = [np.asarray(x).reshape(len(x), -1) for x in (truth, confidences)]
    known = np.ones(columns[0].shape, bool) if known is None else known
    ones = np.ones((1, len(known)))
    gaps, own, spreads = [], [], []
    for hit, confidence, among in zip(columns[0].T, columns[1].T, known.T, strict=True):
        place = np.ceil(confidence * bins).astype(int) - 1
        members = place.clip(0, bins - 1)[:, None] == np.arange(bins)
        residuals = members * (among * (confidence - hit))[:, None]
        gaps.append(divide(weights @ residuals, (weights @ among.astype(float))[:, None]))
        own.append(divide(ones @ residuals, among.sum())[0])
        noise = (residuals**2).sum(axis=0) - residuals.sum(axis=0) ** 2 / max(1, among.sum())
        spreads.append(divide(np.sqrt(np.maximum(noise, 0)), among.sum()))
    shrunk = _shrink(np.concatenate(own), np.concatenate(gaps, 1), np.concatenate(spreads))
    return shrunk / len(known.T)


def _shrink(
    own: Float[np.ndarray, " bins"],
    gaps: Float[np.ndarray, "resamples bins"],
    spreads: Float[np.ndarray, " bins"],
) -> Float[np.ndarray, " resamples"]:
    """Sum of the set's gaps without what chance adds, see `expected_calibration_error`."""
    total, deviations = np.abs(own).sum(), gaps - own
    is_set = np.abs(deviations).max(axis=1) < 1e-12  # the same sums in another order
    ratio = divide(np.abs(own), np.sqrt(2) * spreads, otherwise=np.inf)

    def expected(factor: Float[np.ndarray, " resamples"]) -> np.ndarray:
        """The sum that each factor would give; of the set itself of folded normal variables."""
        sums = np.abs(factor[:, None] * own + deviations).sum(axis=1)
        if is_set.any():
            t = factor[is_set, None] * np.where(spreads > 0, ratio, 0)
            noise = spreads * np.sqrt(2) * np.exp(-(t**2)) / np.sqrt(np.pi)
            grown = factor[is_set, None] * np.abs(own) * np.where(spreads > 0, erf(t), 1)
            sums[is_set] = (noise + grown).sum(axis=1)
        return sums

    # The sums are convex, below the total at 0 where there is anything to find, above it at 2.
    low, high = np.zeros(len(gaps)), np.full(len(gaps), 2.0)
    for _ in range(30):
        middle = (low + high) / 2
        below = expected(middle) < total
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    found = np.where(expected(np.zeros(len(gaps))) < total, low * total, 0.0)
    return np.where(np.isfinite(gaps).all(axis=1), found, np.nan)
