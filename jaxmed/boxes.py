"""Boxes on the device, in any number of dimensions: [low..., high...] per array axis.

Coordinates are continuous and half-open in voxels (voxel i covers [i, i + 1)), so that a box that
covers one voxel has volume one, and a 2-D box is a 3-D box of depth one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Below any volume that matters (voxels); keeps 0 / 0 of two empty boxes at 0, gradients finite.
_TINY = 1e-9


def corners(
    boxes: Float[Array, "*batch coordinates"],
) -> tuple[Float[Array, "*batch ndim"], Float[Array, "*batch ndim"]]:
    """Low and high corners."""
    low, high = jnp.split(boxes, 2, axis=-1)
    return low, high


def volume(boxes: Float[Array, "*batch coordinates"]) -> Float[Array, "*batch"]:
    """Area (2-D) or volume (3-D) in voxels; 0 for a box whose high lies below its low.

    >>> volume(jnp.array([1.0, 2.0, 4.0, 6.0])).item()
    12.0
    """
    low, high = corners(boxes)
    return jnp.prod(jnp.maximum(high - low, 0), axis=-1)


def centres(boxes: Float[Array, "*batch coordinates"]) -> Float[Array, "*batch ndim"]:
    """Points in the middle of boxes."""
    low, high = corners(boxes)
    return (low + high) / 2


def clip_boxes(
    boxes: Float[Array, "*batch coordinates"], shape: Sequence[int] | Array | np.ndarray
) -> Float[Array, "*batch coordinates"]:
    """Cut boxes at the borders of an image of spatial `shape`; what lies outside gets volume 0."""
    size = jnp.asarray(shape, boxes.dtype)
    return jnp.clip(boxes, 0, jnp.concatenate([size, size]))


def grid_points(
    shape: Sequence[int], *, stride: float | int | Sequence[float | int]
) -> Float[Array, "n ndim"]:
    """Centres of a feature map's cells, in voxels of the image.

    Args:
        shape: spatial shape of the feature map.
        stride: voxels a cell, one number or one an axis.

    Returns:
        Points in C order, so that they go with `features.reshape(-1, channels)`.
    """
    axes = [jnp.arange(size, dtype=jnp.float32) + 0.5 for size in shape]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
    return grid.reshape(-1, len(shape)) * jnp.asarray(stride, jnp.float32)


def encode_distances(
    points: Float[Array, "*batch ndim"], boxes: Float[Array, "*batch coordinates"]
) -> Float[Array, "*batch coordinates"]:
    """Distances from points to the low and high faces of boxes; all positive iff inside.

    Source: Tian et al., FCOS (ICCV 2019), equation 1.
    """
    low, high = corners(boxes)
    return jnp.concatenate([points - low, high - points], axis=-1)


def decode_distances(
    points: Float[Array, "*batch ndim"], distances: Float[Array, "*batch coordinates"]
) -> Float[Array, "*batch coordinates"]:
    """Boxes around points: the inverse of `encode_distances`."""
    low, high = corners(distances)
    return jnp.concatenate([points - low, points + high], axis=-1)


def _overlap(a: Array, b: Array) -> tuple[Array, Array]:
    """Volumes of intersection and union of boxes that broadcast against each other."""
    (a_low, a_high), (b_low, b_high) = corners(a), corners(b)
    sides = jnp.minimum(a_high, b_high) - jnp.maximum(a_low, b_low)
    intersection = jnp.prod(jnp.maximum(sides, 0), axis=-1)
    return intersection, volume(a) + volume(b) - intersection


def pairwise_iou(
    a: Float[Array, "*batch n coordinates"], b: Float[Array, "*batch m coordinates"]
) -> Float[Array, "*batch n m"]:
    """Intersection over union of every box of `a` with every box of `b`; 0 for empty boxes.

    >>> a = jnp.array([[0.0, 0.0, 4.0, 4.0]])
    >>> pairwise_iou(a, jnp.array([[0.0, 2.0, 4.0, 4.0], [8.0, 8.0, 9.0, 9.0]])).tolist()
    [[0.5, 0.0]]
    """
    intersection, union = _overlap(a[..., :, None, :], b[..., None, :, :])
    return intersection / jnp.maximum(union, _TINY)


def giou(
    a: Float[Array, "*batch coordinates"], b: Float[Array, "*batch coordinates"]
) -> Float[Array, "*batch"]:
    """Generalised IoU of boxes pair by pair, in [-1, 1].

    Unlike IoU it still has a gradient where boxes do not touch. Source: Rezatofighi et al.,
    Generalized Intersection over Union (CVPR 2019), algorithm 1.
    """
    intersection, union = _overlap(a, b)
    (a_low, a_high), (b_low, b_high) = corners(a), corners(b)
    hull = jnp.concatenate([jnp.minimum(a_low, b_low), jnp.maximum(a_high, b_high)], axis=-1)
    enclosing = jnp.maximum(volume(hull), _TINY)
    return intersection / jnp.maximum(union, _TINY) - (enclosing - union) / enclosing


def nms(
    boxes: Float[Array, "n coordinates"],
    scores: Float[Array, " n"],
    labels: Int[Array, " n"] | None = None,
    *,
    iou_threshold: float = 0.5,
    max_boxes: int = 100,
) -> tuple[Int[Array, " {max_boxes}"], Bool[Array, " {max_boxes}"]]:
    """Greedy non-maximum suppression of static shape; works under `jit` and `vmap`.

    Picks the best box that is left, drops every box of the same label that overlaps it by more
    than `iou_threshold`, and so on. It never holds the n x n overlaps: memory is O(n).

    Args:
        boxes: candidates, any number.
        scores: the higher, the earlier; -inf (or NaN) marks a candidate that must not be picked.
        labels: boxes of different labels never suppress each other; -1 is padding.
        iou_threshold: overlap above which the lower score is dropped.
        max_boxes: number of boxes returned.

    Returns:
        Rows of `boxes`, best first, and whether each was picked; where not, the row is 0.

    >>> boxes = jnp.array([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 9.0, 9.0]])
    >>> index, found = nms(boxes, jnp.array([0.6, 0.9, 0.3]), max_boxes=3)
    >>> index.tolist(), found.tolist()
    ([1, 2, 0], [True, True, False])
    """
    if labels is None:
        labels = jnp.zeros(len(scores), jnp.int32)
    index, found, _ = _suppress(boxes, scores, labels, iou_threshold, max_boxes)
    return index, found


def _suppress(
    boxes: Array, scores: Array, labels: Array, iou_threshold: float, picks: int
) -> tuple[Array, Array, Array]:
    """As `nms`, and for every box the pick that it is, or that dropped it; -1 for none."""
    left = jnp.where((labels >= 0) & ~jnp.isnan(scores), scores, -jnp.inf)

    def pick(carry, number):
        left, owner = carry
        best = jnp.argmax(left)
        found = left[best] > -jnp.inf
        overlap = pairwise_iou(boxes[best][None], boxes)[0] > iou_threshold
        drop = (overlap & (labels == labels[best])).at[best].set(True) & (left > -jnp.inf)
        left, owner = jnp.where(drop, -jnp.inf, left), jnp.where(drop, number, owner)
        return (left, owner), (jnp.where(found, best, 0), found)

    start = (left, jnp.full(len(scores), -1, jnp.int32))
    (_, owner), (index, found) = jax.lax.scan(pick, start, jnp.arange(picks))
    return index, found, owner


def fuse_boxes(
    boxes: Float[Array, "models n coordinates"],
    scores: Float[Array, "models n"],
    labels: Int[Array, "models n"],
    *,
    iou_threshold: float = 0.5,
    max_boxes: int = 100,
) -> tuple[
    Float[Array, "{max_boxes} coordinates"],
    Float[Array, " {max_boxes}"],
    Int[Array, " {max_boxes}"],
]:
    """Boxes that several models found in one image, as one list, best first.

    Boxes of one label that overlap the best of them are one object, each box of one object only:
    its box is their mean weighted by score, its score the mean over the models of each one's best,
    0 where a model has none. After weighted box fusion (Solovyev et al. 2021, arXiv 1910.13302),
    with clusters by suppression; means that overlap again are suppressed once more.

    Scores say how sure the models are on average: what one of five finds at .9 comes out at .18.
    A threshold that was chosen for one model is stricter here.

    Args:
        boxes: of each model, after its own suppression.
        scores: likewise.
        labels: likewise; -1 is padding.
        iou_threshold: overlap above which boxes are one object.
        max_boxes: number of boxes returned.

    Returns:
        Boxes, scores and labels; padding has label -1 and is 0 otherwise.
    """
    models, each = scores.shape
    count = models * each
    flat, flat_scores, flat_labels = (
        x.reshape(count, *x.shape[2:]) for x in (boxes, scores, labels)
    )
    # As many clusters as there may be boxes: the best by one model need not be the best by all.
    rows, found, owner = _suppress(flat, flat_scores, flat_labels, iou_threshold, count)
    weight = jnp.where(owner >= 0, flat_scores, 0.0)
    sums = (
        jnp.zeros((count, flat.shape[1] + 1))
        .at[owner]
        .add(weight[:, None] * jnp.pad(flat, ((0, 0), (0, 1)), constant_values=1))
    )
    fused = sums[:, :-1] / jnp.maximum(sums[:, -1:], _TINY)
    model = jnp.repeat(jnp.arange(models), each)
    fused_scores = jnp.zeros((models, count)).at[model, owner].max(weight).mean(0)
    fused_labels = jnp.where(found, flat_labels[rows], -1)
    best, kept = nms(
        fused, fused_scores, fused_labels, iou_threshold=iou_threshold, max_boxes=max_boxes
    )
    return (
        jnp.where(kept[:, None], fused[best], 0),
        jnp.where(kept, fused_scores[best], 0),
        jnp.where(kept, fused_labels[best], -1),
    )
