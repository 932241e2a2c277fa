"""The best boxes of an image from all candidates, where the program does not choose; NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def select_boxes(
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    iou_threshold: float,
    max_boxes: int,
    candidates: int,
) -> dict[str, np.ndarray]:
    """Greedy non-maximum suppression, the best first, among the best candidates of all classes.

    Args:
        boxes: (points, 2 * ndim), [low..., high...], within the image.
        scores: (points, classes).
        iou_threshold: overlap above which the lower score of a class is dropped.
        max_boxes: kept at most.
        candidates: boxes that are looked at, the best.

    Returns:
        boxes (n, 2 * ndim), scores (n,) and labels (n,), of n up to `max_boxes`.
    """
    flat = scores.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:candidates]
    labels = (order % scores.shape[-1]).astype(np.int32)
    sorted_boxes, left = boxes[order // scores.shape[-1]], np.ones(len(order), bool)
    chosen: list[int] = []
    while left.any() and len(chosen) < max_boxes:
        best = int(left.argmax())
        chosen.append(best)
        overlap = _overlaps(sorted_boxes[best], sorted_boxes) > iou_threshold
        left &= ~(overlap & (labels == labels[best]))
        left[best] = False
    return {"boxes": sorted_boxes[chosen], "scores": flat[order][chosen], "labels": labels[chosen]}


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with each of others; 0 for empty boxes."""
    ndim = len(box) // 2
    low, high = np.maximum(box[:ndim], boxes[:, :ndim]), np.minimum(box[ndim:], boxes[:, ndim:])
    shared = _volume(low, high)
    union = _volume(box[:ndim], box[ndim:]) + _volume(boxes[:, :ndim], boxes[:, ndim:]) - shared
    return shared / np.maximum(union, 1e-9)


def _volume(low: np.ndarray, high: np.ndarray) -> Any:
    return np.prod(np.maximum(high - low, 0), axis=-1)
