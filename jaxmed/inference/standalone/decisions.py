"""Calibration and decisions of a classification, as its validation part fixed them; NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

LEAST = 1e-12
"""Probability from which on logarithms are taken."""


def decide(
    probabilities: np.ndarray, fixed: dict[str, Any] | None, names: list[str]
) -> dict[str, Any]:
    """What is decided of one case; see `Model.decide`."""
    if not fixed:
        return {}
    wide = np.asarray(probabilities, np.float64)
    if "slopes" in fixed:
        inside = np.clip(wide, LEAST, 1 - LEAST)
        logits = np.log(inside) - np.log1p(-inside)
        scaled = np.asarray(fixed["slopes"]) * logits + np.asarray(fixed["intercepts"])
        calibrated = 1 / (1 + np.exp(-np.clip(scaled, -700, 700)))
        holds = calibrated >= np.asarray(fixed["thresholds"])
        return {"calibrated": calibrated, "decision": _named(names, holds)}
    logits = np.log(np.maximum(wide, LEAST)) / fixed["temperature"] + np.asarray(fixed["biases"])
    odds = np.exp(logits - logits.max())
    calibrated = odds / odds.sum()
    # A temperature keeps the order of the classes, a rounding of it might not.
    chosen = int((calibrated if any(fixed["biases"]) else wide).argmax())
    if fixed["threshold"] is not None:
        chosen = int(calibrated[1] >= fixed["threshold"])
    return {
        "calibrated": calibrated,
        "decision": [names[chosen]],
        "set": _named(names, wide >= fixed["set_threshold"] - LEAST),
    }


def _named(names: list[str], holds: np.ndarray) -> list[str]:
    return [name for name, on in zip(names, holds, strict=True) if on]
