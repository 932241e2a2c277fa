"""Sets of classes that hold the true one as often as they promise.

The promise holds for new cases like those that the sets were fitted on: not for another hospital.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxmed.inference.standalone.decisions import reaches


def fit_sets(
    labels: Integer[np.ndarray, " cases"],
    probabilities: Float[np.ndarray, "cases classes"],
    *,
    coverage: float,
) -> float:
    """The probability from which on a class belongs to the set of a case.

    Split conformal prediction with one minus the probability of the truth as score (Sadinle et al.
    2019, arXiv 1609.00451; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1): sets are the
    smallest on average.

    Args:
        labels: class numbers.
        probabilities: of cases that nothing was trained or calibrated on.
        coverage: share of new cases whose set is to hold their class.

    Returns:
        0, with which every class is in the set, where there are too few cases for the promise.
    """
    said = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    place = math.ceil((len(said) + 1) * coverage)
    return float(np.sort(said)[-place]) if place <= len(said) else 0.0


def make_sets(
    probabilities: Float[np.ndarray, "cases classes"], threshold: float
) -> Bool[np.ndarray, "cases classes"]:
    """Which classes belong to the set of each case; it may be empty, or hold all.

    >>> probabilities = np.array([[0.9, 0.1], [0.55, 0.45]])
    >>> make_sets(probabilities, fit_sets(np.array([0, 1]), probabilities, coverage=0.5)).tolist()
    [[True, False], [True, True]]
    """
    return reaches(probabilities, threshold)
