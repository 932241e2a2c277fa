"""Probabilities that mean what they say: scaling fitted on the validation part.

All of it works on probabilities, whatever predicted them (an ensemble's mean too): what a softmax
says, up to a constant, is the logarithm of its probabilities.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Integer

LEAST = 1e-12
"""Probability from which on logarithms are taken."""
WIDEST = 20.0
"""Temperatures lie between this and its inverse: a part without a mistake would ask for 0."""


def apply_temperature(
    probabilities: Float[np.ndarray, "cases classes"], temperature: float
) -> Float[np.ndarray, "cases classes"]:
    """Softmax of the logits divided by a temperature; above 1 all are less sure.

    The order of the classes of a case stays. Source: Guo et al. 2017 (arXiv 1706.04599), section 4.
    """
    logits = np.log(np.maximum(np.asarray(probabilities, np.float64), LEAST))
    return scipy.special.softmax(logits / temperature, axis=-1)


def fit_temperature(
    labels: Integer[np.ndarray, " cases"], probabilities: Float[np.ndarray, "cases classes"]
) -> float:
    """The temperature of the highest likelihood, between 1/20 and 20.

    Args:
        labels: class numbers.
        probabilities: of cases that nothing was trained on.
    """
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = apply_temperature(probabilities, float(np.exp(log_temperature)))
        return -float(np.log(np.maximum(scaled[rows, labels], LEAST)).mean())

    width = np.log(WIDEST)
    found = scipy.optimize.minimize_scalar(loss, bounds=(-width, width), method="bounded")
    return float(np.exp(found.x))


def apply_platt(
    scores: Float[np.ndarray, "*cases"], slope: float, intercept: float
) -> Float[np.ndarray, "*cases"]:
    """Probability of a yes, from a score between 0 and 1: sigmoid(slope * logit + intercept)."""
    inside = np.clip(np.asarray(scores, np.float64), LEAST, 1 - LEAST)
    return scipy.special.expit(slope * scipy.special.logit(inside) + intercept)


def fit_platt(truth: np.ndarray, scores: Float[np.ndarray, " cases"]) -> tuple[float, float]:
    """Slope and intercept of the highest likelihood (Platt 1999, with his smoothed targets).

    Args:
        truth: whether each holds.
        scores: between 0 and 1, such as of a class or a box.
    """
    truth = np.asarray(truth, bool)
    yes, no = int(truth.sum()), int((~truth).sum())
    # As if one more of each had been seen: a part without a mistake asks for no infinite slope.
    target = np.where(truth, (yes + 1) / (yes + 2), 1 / (no + 2))
    inside = scipy.special.logit(np.clip(np.asarray(scores, np.float64), LEAST, 1 - LEAST))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = parameters[0] * inside + parameters[1]
        # -target log sigmoid - (1 - target) log(1 - sigmoid)
        value = np.logaddexp(0, logits) - target * logits
        slope = (scipy.special.expit(logits) - target) / len(target)
        return float(value.mean()), np.array([slope @ inside, slope.sum()])

    found = scipy.optimize.minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS")
    return float(found.x[0]), float(found.x[1])
