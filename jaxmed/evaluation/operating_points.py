"""Thresholds, chosen on the validation part by a stated rule."""

from __future__ import annotations

import re

import numpy as np
import sklearn.metrics
from jaxtyping import Bool, Float

from jaxmed.inference.standalone.decisions import ROUNDING
from jaxmed.types import UserError

_ROUNDING = 1e-9
RULES = "youden, f1, sensitivity=SHARE or specificity=SHARE"


def parse_rule(rule: str) -> tuple[str, float]:
    """Name and share of a rule such as "sensitivity=0.95"; ("", 0) of none.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(sensitivity|specificity)=(0?\.\d+)", rule)
    if match:
        return match[1], float(match[2])
    if rule not in ("", "youden", "f1"):
        raise UserError(f"evaluation.operating_point is {rule!r}; expected {RULES}, or nothing")
    return rule, 0.0


def choose_threshold(
    truth: Bool[np.ndarray, " cases"], scores: Float[np.ndarray, " cases"], rule: str
) -> float:
    """The score from which on a case is called positive.

    Args:
        truth: whether cases are positive; of both kinds there must be some.
        scores: the higher the likelier.
        rule: "youden" maximises sensitivity + specificity (Youden 1950), "f1" the F1 score;
            "sensitivity=S" takes the highest threshold that finds at least that share,
            "specificity=S" the lowest that leaves at least that share of the others alone.

    Raises:
        UserError: for a rule that is none.
    """
    name, share = parse_rule(rule)
    false, true, thresholds = sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)
    # The first point calls nothing positive; its threshold is infinite.
    false, true, thresholds = false[1:], true[1:], thresholds[1:]
    if name == "sensitivity":
        return float(thresholds[np.argmax(true >= share - _ROUNDING)])
    if name == "specificity":
        allowed = np.flatnonzero(1 - false >= share - _ROUNDING)
        # Where even the surest case would be one too many, nothing is called positive.
        return (
            float(thresholds[allowed[-1]]) if len(allowed) else float(scores.max() + 2 * ROUNDING)
        )
    if name == "youden":
        return float(thresholds[np.argmax(true - false)])
    positives, negatives = truth.sum(), (~truth).sum()
    called = true * positives + false * negatives
    return float(thresholds[np.argmax(2 * true * positives / (called + positives))])


def choose_score_threshold(
    scores: Float[np.ndarray, " boxes"], hits: Bool[np.ndarray, " boxes"], *, objects: int
) -> float:
    """The score of the boxes that count, at the highest F1 = 2 hits / (boxes + objects).

    Args:
        scores: of all boxes of a part.
        hits: whether each finds an object.
        objects: in the part.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    f1 = 2 * np.cumsum(hits[order]) / (np.arange(1, len(order) + 1) + objects)
    last = np.append(ranked[1:] < ranked[:-1], True)  # of equal scores all count, or none
    return float(ranked[np.argmax(np.where(last, f1, -1))])
