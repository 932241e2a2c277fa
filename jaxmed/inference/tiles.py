"""Objects in overlapping tiles of one picture, put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.spatial

from jaxmed.types import Region


@dataclasses.dataclass(frozen=True)
class Core:
    """The part of a tile that is nearest to it: between the middles of what it shares with others.

    Attributes:
        low: (ndim,) and
        high: (ndim,) in the picture; infinite where no tile follows.
    """

    low: np.ndarray
    high: np.ndarray

    def holds(self, boxes: np.ndarray) -> np.ndarray:
        """Whether each box (n, 2 * ndim) has its centre here."""
        centres = boxes.reshape(len(boxes), 2, -1).mean(1)
        return ((centres >= self.low) & (centres < self.high)).all(-1)


def cores(regions: Sequence[Region]) -> list[Core]:
    """The core of each tile of a grid; every point is in exactly one.

    >>> first, second = cores([(slice(0, 6),), (slice(4, 10),)])
    >>> first.high, second.low
    (array([5.]), array([5.]))
    """
    bounds = []
    for axis in range(len(regions[0])):
        parts = sorted({(r[axis].start, r[axis].stop) for r in regions})
        inner = [(a[1] + b[0]) / 2 for a, b in zip(parts, parts[1:], strict=False)]
        edges = [-np.inf, *inner, np.inf]
        bounds.append({p[0]: edges[i : i + 2] for i, p in enumerate(parts)})
    return [
        Core(*np.array([bounds[axis][part.start] for axis, part in enumerate(region)]).T)
        for region in regions
    ]


def merge_boxes(
    found: Sequence[dict[str, np.ndarray]], *, iou_threshold: float
) -> dict[str, np.ndarray]:
    """Boxes of many tiles as one list, best first, after suppression as in `jaxmed.boxes.nms`.

    Boxes of one tile were suppressed there and do not drop each other here. Only neighbours are
    compared, so that time grows with the number of boxes, not its square.

    Args:
        found: `boxes` (n, 2 * ndim) in the picture, `scores` (n,) and `labels` (n,), a tile each.
        iou_threshold: overlap above which the lower-scored box of a label is dropped.
    """
    merged = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    tiles = np.repeat(np.arange(len(found)), [len(part["scores"]) for part in found])
    order = np.argsort(-merged["scores"], kind="stable")
    merged = {key: value[order] for key, value in merged.items()}
    boxes, labels, tiles = merged["boxes"].astype(np.float64), merged["labels"], tiles[order]
    if not len(boxes):
        return merged
    low, high = np.split(boxes, 2, axis=-1)
    volumes = (high - low).prod(-1)
    # Boxes of IoU t share at least t of the longer of their sides along every axis: the other side
    # is at most 1/t of this one's, and the centres lie within (1 - t) of the longer apart.
    longest = (high - low).max(-1) / max(iou_threshold, 1e-3)
    tree = scipy.spatial.cKDTree((low + high) / 2)
    kept = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if not kept[i]:
            continue
        reach = longest[i] * (1 - iou_threshold) + 1e-6
        near = np.asarray(tree.query_ball_point((low[i] + high[i]) / 2, reach, p=np.inf))
        near = near[(near > i) & (labels[near] == labels[i]) & (tiles[near] != tiles[i])]
        sides = np.minimum(high[i], high[near]) - np.maximum(low[i], low[near])
        shared = np.maximum(sides, 0).prod(-1)
        union = volumes[i] + volumes[near] - shared
        kept[near[shared > iou_threshold * union]] = False
    return {key: value[kept] for key, value in merged.items()}
