"""How much a set can tell: cases a class, what chance gives, and when it is too small to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.types import DatasetInfo, Row, count_of

FEW_CASES = 20
"""Of a set of fewer, even intervals say little."""
FEW_POSITIVES = 10
"""Cases (or objects) of a class; its scores rest on so few that one more would move them far."""
WIDE = 0.2
"""Width of a 95 % interval beyond which a score between 0 and 1 is hardly known."""
UNITS = {"hd95": "mm or pixels"}
"""Of scores that do not lie between 0 and 1, as all others do."""


def count_positives(info: DatasetInfo, rows: Sequence[Row]) -> dict[str, int]:
    """Cases that show each class: objects in all of detections, cases of other tasks.

    Of segmentations the background is left out, and so are instances, which have no classes.
    """
    if info.task == "classification":
        labels = np.stack([row["label"] for row in rows])
        if labels.ndim == 1:
            labels = labels[:, None] == np.arange(len(info.class_names))
        return dict(zip(info.class_names, (labels == 1).sum(0).tolist(), strict=True))
    if info.task == "detection":
        totals = np.sum([row["truths"] for row in rows], axis=0)
        return dict(zip(info.class_names, totals.tolist(), strict=True))
    return {
        name: sum(row.get(f"true_size/{name}", 0) > 0 for row in rows)
        for name in info.class_names[1:]
    }


def summarize_prevalence(info: DatasetInfo, rows: Sequence[Row]) -> dict[str, Any]:
    """The share of each class, and the accuracy of who always says what is commonest.

    Of several labels a case, that is the mean over the classes of saying always yes or always no,
    as `accuracy` is.

    Returns:
        prevalence and no_information_rate of a classification; nothing of other tasks.
    """
    if info.task != "classification" or not rows:
        return {}
    labels = np.stack([row["label"] for row in rows])
    counts = np.array(list(count_positives(info, rows).values()))
    shares = counts / np.maximum((labels >= 0).sum(0), 1)
    rate = np.maximum(shares, 1 - shares).mean() if info.multilabel else shares.max()
    prevalence = dict(zip(info.class_names, shares.tolist(), strict=True))
    return {"prevalence": prevalence, "no_information_rate": float(rate)}


def find_limits(
    info: DatasetInfo,
    rows: Sequence[Row],
    metrics: Mapping[str, Mapping[str, Any]],
    *,
    groups: int,
    no_information_rate: float | None = None,
) -> list[str]:
    """What a set is too small to tell, or what its scores do not show, a sentence each.

    The rule: fewer than 20 cases (or patients); a class of fewer than 10 cases or objects; a 95 %
    interval wider than .2; resamples without spread; an accuracy whose interval reaches down to
    that of always saying the commonest class.
    """
    notes = []
    if groups < FEW_CASES:
        notes.append(f"of {count_of(groups, 'case')} or patients even intervals say little")
    noun = "objects" if info.task == "detection" else "cases"
    few = [(n, c) for n, c in count_positives(info, rows).items() if c < FEW_POSITIVES]
    if few:
        told = ", ".join(f"{name} ({count})" for name, count in few)
        notes.append(
            f"fewer than {FEW_POSITIVES} {noun} of {told}: too few for a score of that class"
        )
    whole = {name: entry for name, entry in metrics.items() if "/" not in name}
    wide = [
        name
        for name, entry in whole.items()
        if name not in UNITS and entry["low"] is not None and entry["high"] - entry["low"] > WIDE
    ]
    if wide:
        notes.append(f"intervals wider than {WIDE} of {', '.join(wide)}: too few cases to tell")
    flat = [name for name, entry in whole.items() if entry.get("no_spread")]
    if flat:
        notes.append(
            f"all resamples agree on {', '.join(flat)}, which gives no interval; what {groups} "
            f"cases never show may still happen in up to {min(1, 3 / groups):.1%} (rule of three)"
        )
    accuracy = metrics.get("accuracy", {})
    low = accuracy.get("value") if accuracy.get("low") is None else accuracy["low"]
    if no_information_rate is not None and low is not None and low <= no_information_rate:
        notes.append(
            f"accuracy is not shown to be better than {no_information_rate:.3f}, that of always "
            "saying the commonest class"
        )
    return notes
