"""Calibration and decisions, as the validation part fixed them; NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

LEAST = 1e-12
"""Probability from which on logarithms are taken."""
ROUNDING = 1e-5
"""Share by which two programs may differ in odds that both compute in float32."""
SPACING = 1.2e-7
"""Of the numbers of float32 just below 1."""


def decide(
    probabilities: np.ndarray, fixed: dict[str, Any] | None, names: list[str]
) -> dict[str, Any]:
    """What is decided of one case; see `Model.decide`."""
    if not fixed:
        return {}
    wide = np.asarray(probabilities, np.float64)
    if "slopes" in fixed:
        calibrated = scale(wide, np.asarray(fixed["slopes"]), np.asarray(fixed["intercepts"]))
        holds = reaches(calibrated, np.asarray(fixed["thresholds"]))
        return {"calibrated": calibrated, "decision": _named(names, holds)}
    logits = np.log(np.maximum(wide, LEAST)) / fixed["temperature"] + np.asarray(fixed["biases"])
    odds = np.exp(logits - logits.max())
    calibrated = odds / odds.sum()
    # A temperature keeps the order of the classes, a rounding of it might not.
    chosen = int((calibrated if any(fixed["biases"]) else wide).argmax())
    if fixed["threshold"] is not None:
        chosen = int(reaches(calibrated[1], fixed["threshold"]))
    return {
        "calibrated": calibrated,
        "decision": [names[chosen]],
        "set": _named(names, reaches(wide, fixed["set_threshold"])),
    }


def reaches(probabilities: Any, threshold: Any) -> Any:
    """Which probabilities are at least a threshold.

    As it is mostly that of a case of the validation part, rounding must not decide on this case.
    """
    threshold = np.asarray(threshold, np.float64)
    slack = ROUNDING * threshold * np.maximum(1 - threshold, 0) + SPACING
    return np.asarray(probabilities, np.float64) >= threshold - slack


def scale(scores: np.ndarray, slope: Any, intercept: Any) -> np.ndarray:
    """Platt scaling of scores between 0 and 1: how often what is scored so is right."""
    inside = np.clip(np.asarray(scores, np.float64), LEAST, 1 - LEAST)
    scaled = slope * (np.log(inside) - np.log1p(-inside)) + intercept
    return 1 / (1 + np.exp(-np.clip(scaled, -700, 700)))


def _named(names: list[str], holds: np.ndarray) -> list[str]:
    return [name for name, on in zip(names, holds, strict=True) if on]
