"""Which cells of a dense detector learn which object."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmed.boxes import corners, pairwise_iou


def assign(
    points: Float[Array, "points ndim"],
    sides: Float[Array, "points ndim"],
    scores: Float[Array, "points classes"],
    boxes: Float[Array, "points coordinates"],
    true_boxes: Float[Array, "objects coordinates"],
    true_labels: Int[Array, " objects"],
    *,
    candidates: int = 10,
    score_power: float = 0.5,
    overlap_power: float = 6.0,
) -> tuple[Int[Array, " points"], Float[Array, " points"]]:
    """Give each object the cells that already predict it best, by class score and overlap.

    Task-aligned assignment (Feng et al. 2021, arXiv 2108.07755, equation 3, and its normalisation):
    cells whose centre lies in the object compete by `score**a * iou**b`; the best `candidates` win,
    and learn as score the overlap that the object's best cell reaches, in proportion. Sizes need no
    ranges a level, and everything has a static shape.

    Args:
        points: centres of the cells.
        sides: of the cells; an object smaller than a cell is open to the cells that touch it.
        scores: predicted probabilities.
        boxes: predicted boxes.
        true_boxes: objects, padded.
        true_labels: class of each object, -1 for padding.
        candidates: cells an object, at most.
        score_power: a.
        overlap_power: b.

    Returns:
        the object of each cell (-1: background) and the score that it should have for that object's
        class (0 for background).
    """
    real = true_labels >= 0
    low, high = corners(true_boxes)
    # (objects, points): how far inside the object, in voxels; half a cell's grace for small ones.
    centre, half = (low + high)[:, None] / 2, (high - low)[:, None] / 2
    inside = (jnp.abs(points - centre) < jnp.maximum(half, sides * 0.75)).all(-1) & real[:, None]
    overlap = jnp.where(inside, pairwise_iou(true_boxes, boxes), 0)
    score = scores.T[jnp.maximum(true_labels, 0)]
    fitness = jnp.where(inside, score**score_power * overlap**overlap_power, 0)
    best, _ = jax.lax.top_k(fitness, min(candidates, points.shape[0]))
    chosen = (fitness >= best[:, -1:]) & (fitness > 0)
    # A cell between two objects goes to the one that it overlaps most.
    owner = jnp.where(chosen, overlap, -1).argmax(0)
    positive = chosen.any(0)
    mine = chosen & (jnp.arange(len(true_labels))[:, None] == owner)
    peak = jnp.where(mine, fitness, 0).max(1, keepdims=True)
    reach = jnp.where(mine, overlap, 0).max(1, keepdims=True)
    target = jnp.where(mine, fitness / jnp.maximum(peak, 1e-30) * reach, 0).max(0)
    return jnp.where(positive, owner, -1), target
