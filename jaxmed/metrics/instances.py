"""Instances: how many objects of one image were found, and how well they are outlined."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer


def overlapping_pairs(
    prediction: Integer[np.ndarray, "*spatial"], truth: Integer[np.ndarray, "*spatial"]
) -> tuple[Float[np.ndarray, " pairs"], int, int]:
    """IoU of each predicted with each true object it touches, and the numbers of both.

    One pass over the pixels. 0 is background; pixels whose truth is -1 are left out of both.
    """
    known = truth >= 0
    true, predicted = truth[known].astype(np.int64), prediction[known].astype(np.int64)
    base = int(predicted.max(initial=0)) + 1
    joint, counts = np.unique(true * base + predicted, return_counts=True)
    true, predicted = np.divmod(joint, base)
    true_ids, true_rows = np.unique(true, return_inverse=True)
    predicted_ids, predicted_rows = np.unique(predicted, return_inverse=True)
    true_areas = np.bincount(true_rows, counts)[true_rows]
    predicted_areas = np.bincount(predicted_rows, counts)[predicted_rows]
    objects = (true > 0) & (predicted > 0)
    iou = (counts / (true_areas + predicted_areas - counts))[objects]
    return iou, int((predicted_ids > 0).sum()), int((true_ids > 0).sum())


def score_instances(
    prediction: Integer[np.ndarray, "*spatial"], truth: Integer[np.ndarray, "*spatial"]
) -> dict[str, float]:
    """Scores of one image; NaN where neither mask holds an object.

    Objects match where IoU > 1/2, which at most one pair of each can reach. Summarise with
    `jaxmed.metrics.mean_scores`.

    Args:
        prediction: instance numbers; 0 is background.
        truth: instance numbers; 0 is background, -1 is ignored.

    Returns:
        instance_ap50, TP / (TP + FP + FN) as of the 2018 Data Science Bowl (Caicedo et al., Nature
        Methods 16, 2019), and panoptic_quality, the sum of IoU over matches / (TP + FP / 2 +
        FN / 2) (Kirillov et al., Panoptic Segmentation, CVPR 2019, equation 1).
    """
    iou, predicted, true = overlapping_pairs(prediction, truth)
    if predicted + true == 0:
        return {"instance_ap50": float("nan"), "panoptic_quality": float("nan")}
    matches = iou[iou > 0.5]
    return {
        "instance_ap50": len(matches) / (predicted + true - len(matches)),
        "panoptic_quality": float(2 * matches.sum() / (predicted + true)),
    }
