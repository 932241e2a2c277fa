"""What every phantom is made of: a drawn scene with its exact truth, and smooth random fields."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage


@dataclasses.dataclass(frozen=True)
class Scene:
    """One drawn picture and all that is known of it.

    Attributes:
        image: (*spatial,) uint8 or int16.
        objects: (*spatial,) int32, the number of the object seen at each voxel, from 1; 0 is none.
        kinds: (objects,) int32, kind of each object, from 0.
        organ: (*spatial,) bool, the organ that holds the objects, or None.
        spacing: (ndim,) float32, mm a voxel.
    """

    image: np.ndarray
    objects: np.ndarray
    kinds: np.ndarray
    spacing: np.ndarray
    organ: np.ndarray | None = None


def visible_objects(objects: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the objects 1, 2, ... without those that others hide altogether.

    Args:
        objects: (*spatial,) int32 numbers, kinds[k - 1] being the kind of object k.
        kinds: (objects,) int32.

    Returns:
        The renumbered objects and the kinds of those that are left.
    """
    seen = np.bincount(objects.ravel(), minlength=len(kinds) + 1)[1:] > 0
    numbers = np.concatenate([[0], np.where(seen, np.cumsum(seen), 0)]).astype(np.int32)
    return numbers[objects], kinds[seen]


def hulls(objects: np.ndarray) -> np.ndarray:
    """Boxes around the visible part of each object, (objects, 2 * ndim) float32, half-open."""
    found = [place for place in ndimage.find_objects(objects) if place is not None]
    boxes = [[s.start for s in place] + [s.stop for s in place] for place in found]
    return np.asarray(boxes, np.float32).reshape(-1, 2 * objects.ndim)


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], *, waves: float, decay: float = 0.0
) -> np.ndarray:
    """A random field of mean about 0 and standard deviation 1, a sum of products of cosines.

    Matrix products of a small cosine basis are far cheaper than filtering white noise.

    Args:
        rng: random numbers.
        shape: (*spatial,) of the field.
        waves: half-waves along the shortest axis; the others have as many to the voxel.
        decay: how fast amplitude falls with the wave number; 0 is flat, 1 is cloud-like.

    Returns:
        (*shape,) float64.
    """
    counts = [max(2, round(waves * n / min(shape))) for n in shape]
    field = rng.standard_normal(counts)
    if decay:
        squares = sum(k**2 for k in np.ogrid[tuple(slice(0, c) for c in counts)])
        field = field / (1 + squares) ** (decay / 2)
    field.flat[0] = 0
    for n, count in zip(shape, counts, strict=True):
        basis = np.cos(np.pi * np.outer(np.arange(count), np.arange(n) + 0.5) / n)
        # Contracts the first axis and puts the new one last: after ndim rounds all are in order.
        field = np.tensordot(field, basis, axes=(0, 0))
    return field / max(float(field.std()), 1e-6)
