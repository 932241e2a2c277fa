"""Segmentation: overlap and surface scores of one case, in mm and in the file's own grid.

The rule for empty masks, class by class:
    neither truth nor prediction holds it:  every score is NaN; the case does not count for it
    only one of them holds it:              dice, iou and nsd are 0, and hd95 is the diagonal of
                                            the image, the worst there is, so that a structure
                                            that is missed never improves a mean
Voxels whose truth is -1 are taken out of both masks first. Summarise with
`jaxmed.metrics.mean_scores`; `count_cases` says how many cases each mean rests on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

from jaxmed.metrics import mean_defined

OVERLAPS = ("dice", "iou")
SCORES = (*OVERLAPS, "hd95", "nsd")


def score_masks(
    prediction: Integer[np.ndarray, "*spatial"],
    truth: Integer[np.ndarray, "*spatial"],
    *,
    spacing: Sequence[float | int] | np.ndarray,
    class_names: Sequence[str],
    tolerance: float | int = 1.0,
    surfaces: bool = True,
) -> dict[str, float]:
    """Scores of one case: `NAME/CLASS` of each foreground class, and NAME, their mean.

    Args:
        prediction: class numbers.
        truth: class numbers; 0 is background, -1 is ignored.
        spacing: mm a voxel.
        class_names: index is class number, the background included.
        tolerance: distance in mm that `nsd` forgives.
        surfaces: whether to measure `hd95` and `nsd`, which take most of the time.

    Returns:
        dice and iou; hd95 in mm, the greater of the two directed 95th percentiles of the distance
        between surfaces; nsd, the share of both surfaces that lies within `tolerance` of the other.
        NaN where undefined.

    >>> truth = np.zeros((8, 8), int)
    >>> truth[2:6, 2:6] = 1
    >>> shifted = np.roll(truth, 1, axis=0)
    >>> scores = score_masks(shifted, truth, spacing=(1, 1), class_names=("air", "organ"))
    >>> {name: round(scores[name], 3) for name in ("dice", "iou", "hd95", "nsd")}
    {'dice': 0.75, 'iou': 0.6, 'hd95': 1.0, 'nsd': 1.0}
    """
    spacing = np.asarray(spacing, np.float64)
    diagonal = float(np.linalg.norm(np.array(truth.shape) * spacing))
    prediction = np.where(truth < 0, 0, prediction)
    # Along an axis of one voxel every voxel would be surface: a flat volume is an image.
    flat = tuple(axis for axis, size in enumerate(truth.shape) if size == 1)
    prediction, truth = prediction.squeeze(flat), truth.squeeze(flat)
    spacing = np.array([s for axis, s in enumerate(spacing) if axis not in flat])
    scores = {}
    for c, name in enumerate(class_names):
        if c:
            values = score_class(
                prediction == c,
                truth == c,
                spacing=spacing,
                tolerance=tolerance,
                worst=diagonal,
                surfaces=surfaces,
            )
            scores.update({f"{score}/{name}": v for score, v in values.items()})
    kinds = SCORES if surfaces else OVERLAPS
    means = {s: [scores[f"{s}/{name}"] for name in class_names[1:]] for s in kinds}
    return {s: float(mean_defined(np.array(values))) for s, values in means.items()} | scores


def score_class(
    prediction: Bool[np.ndarray, "*spatial"],
    truth: Bool[np.ndarray, "*spatial"],
    *,
    spacing: Sequence[float | int] | np.ndarray,
    tolerance: float | int,
    worst: float,
    surfaces: bool = True,
) -> dict[str, float]:
    """Scores of one class; `worst` is hd95 where only one of the masks is empty."""
    voxels, both = int(prediction.sum()) + int(truth.sum()), int((prediction & truth).sum())
    if voxels == 0:
        return dict.fromkeys(SCORES if surfaces else OVERLAPS, float("nan"))
    scores = {"dice": 2 * both / voxels, "iou": both / (voxels - both)}
    if not surfaces:
        return scores
    scores |= {"hd95": worst, "nsd": 0.0}
    if prediction.any() and truth.any():
        outward, inward = surface_distances(prediction, truth, spacing=spacing)
        scores["hd95"] = float(max(np.percentile(outward, 95), np.percentile(inward, 95)))
        near = (outward <= tolerance).sum() + (inward <= tolerance).sum()
        scores["nsd"] = float(near / (len(outward) + len(inward)))
    return scores


def surface_distances(
    a: Bool[np.ndarray, "*spatial"],
    b: Bool[np.ndarray, "*spatial"],
    *,
    spacing: Sequence[float | int] | np.ndarray,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """Distance in mm from each surface voxel of `a` to the surface of `b`, and the reverse.

    Surface voxels are those of a mask with a face neighbour outside it (or outside the image);
    distances are between voxel centres. Neither mask may be empty.
    """
    box = ndimage.find_objects((a | b).astype(np.int8))[0]  # outside it there is no surface
    edges = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (a, b)]
    to_a, to_b = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
    return to_b[edges[0]], to_a[edges[1]]
