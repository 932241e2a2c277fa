"""Labels that are likely wrong, by what models say of cases that they were not trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Integer


@dataclasses.dataclass(frozen=True)
class LabelErrors:
    """What speaks against each label.

    Attributes:
        suspect: (cases,) whether the label is likely wrong.
        suggested: (cases,) the class that speaks against it, or the label itself.
        margin: (cases,) probability of the label less that of the likeliest other class; the
            smaller, the more doubtful.
    """

    suspect: Bool[np.ndarray, " cases"]
    suggested: Integer[np.ndarray, " cases"]
    margin: Float[np.ndarray, " cases"]

    @property
    def order(self) -> Integer[np.ndarray, " cases"]:
        """Cases from the most to the least doubtful: the suspects, then all others, by margin."""
        return np.lexsort((self.margin, ~self.suspect))


def find_label_errors(
    labels: Integer[np.ndarray, " cases"], probabilities: Float[np.ndarray, "cases classes"]
) -> LabelErrors:
    """Confident learning (Northcutt et al. 2021, Confident Learning, JAIR 70, section 3).

    A class speaks for a case where its probability reaches what it is on average in the cases that
    are labelled so; a label is suspect where another class speaks for the case, and more so. Each
    class has a threshold of its own, so that a class of which the model is never sure is not
    suspected as a whole.

    Args:
        labels: class numbers.
        probabilities: of models that were not trained on the case; those of a model that was
            agree with its label, wrong or not.

    Raises:
        ValueError: where a label is no class.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    classes = probabilities.shape[1]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()} of {classes} classes")
    given = labels[:, None] == np.arange(classes)
    counts = given.sum(0)
    sums = np.where(given, probabilities, 0).sum(0)
    # No case is labelled so: no probability is enough to say what such a case is like.
    threshold = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    speaks = np.where(probabilities >= threshold, probabilities, -np.inf)
    best = speaks.argmax(1)
    suspect = np.isfinite(speaks.max(1, initial=-np.inf)) & (best != labels)
    own = probabilities[np.arange(len(labels)), labels]
    other = np.where(given, -np.inf, probabilities).max(1, initial=-np.inf)
    return LabelErrors(suspect, np.where(suspect, best, labels), own - other)


def precision_at(order: Integer[np.ndarray, " cases"], wrong: Bool[np.ndarray, " cases"]) -> float:
    """Share of wrong labels among the first of a ranking, as many as are wrong in all.

    >>> precision_at(np.array([2, 0, 1]), np.array([True, False, True]))
    1.0
    """
    count = int(np.sum(wrong))
    return float(np.asarray(wrong)[order[:count]].mean()) if count else float("nan")
