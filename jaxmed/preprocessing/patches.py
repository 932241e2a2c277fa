"""Where the host looks: random windows of a fixed shape, and boxes of a fixed number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmed.preprocessing.spatial import window
from jaxmed.types import Example, UserError

FOUND = ("foreground", "foreground_number")
"""Keys of what `find_foreground` adds to an example."""


def random_patch(
    example: Example,
    *,
    shape: Sequence[int],
    rng: np.random.Generator,
    foreground: float = 0.33,
    value: float | None = 0.0,
) -> Example:
    """Cut a window of a fixed shape at a random place, now and then about something labelled.

    With probability `foreground` the window is centred, as far as the border allows, on a random
    voxel of a random class (or instance) that is present, or on a random box: rare and small things
    would otherwise hardly ever be seen (nnU-Net uses 0.33).

    An image smaller than the window is padded on both sides by `value`, by default 0: the mean of a
    normalised image, and what the sliding window pads with. Padding of the mask is -1, so that it
    carries no loss. Boxes are clipped, and dropped where less than 0.3 of their area is left.

    Args:
        example: normalised; what `find_foreground` adds, if there, is drawn from in place of a
            search through the mask; it is left out of the result.
        shape: of the window.
        rng: the only source of randomness.
        foreground: probability, 0 to 1.
        value: of the padding; None for the least value of each channel.

    Raises:
        UserError: if the shape has not one positive side an axis, or the probability is none.
    """
    start = random_corner(example, shape=shape, rng=rng, foreground=foreground)
    rest = {name: array for name, array in example.items() if name not in FOUND}
    return window(rest, start=start, shape=shape, value=value)


def random_corner(
    example: Example, *, shape: Sequence[int], rng: np.random.Generator, foreground: float = 0.33
) -> list[int]:
    """Where the window that `random_patch` cuts begins; below 0 where the image is smaller.

    Arguments and errors are those of `random_patch`; in place of `image` and `mask` the example may
    have `sides`, the spatial shape, and what was found of the foreground.
    """
    sides = example["image"].shape[:-1] if "image" in example else example["sides"].tolist()
    if len(shape) != len(sides) or min(shape) < 1 or not 0 <= foreground <= 1:
        raise UserError(
            f"preprocessing: patch {tuple(shape)} of a {len(sides)}-D image, foreground "
            f"{foreground}; set {len(sides)} positive sides and a probability"
        )
    oversampled = rng.random() < foreground
    centre = _foreground_centre(example, rng) if oversampled else None
    start: list[int] = []
    for axis, (new, old) in enumerate(zip(shape, sides, strict=True)):
        if old <= new:
            start.append((old - new) // 2)
        elif centre is None:
            start.append(int(rng.integers(0, old - new + 1)))
        else:
            start.append(int(np.clip(int(centre[axis]) - new // 2, 0, old - new)))
    return start


def find_foreground(
    mask: np.ndarray, *, rng: np.random.Generator, per_class: int = 10_000
) -> dict[str, np.ndarray]:
    """Labelled voxels for `random_patch`, not too many a class.

    Worth it where one large mask is cut into many patches: the search is done once.

    Returns:
        `foreground`, positions (n, ndim) int32, and `foreground_number`, the number in the mask at
        each, (n,).
    """
    labelled = np.flatnonzero(mask > 0)
    numbers = mask.ravel()[labelled]
    chosen = []
    for number in np.unique(numbers):
        voxels = labelled[numbers == number]
        chosen.append(rng.choice(voxels, min(per_class, voxels.size), replace=False))
    flat = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    positions = np.stack(np.unravel_index(flat, mask.shape), -1).astype(np.int32)
    return {"foreground": positions, "foreground_number": mask.ravel()[flat]}


def pad_boxes(example: Example, *, max_boxes: int) -> Example:
    """Give `boxes` and `box_label` a fixed number of rows; the last step, as shapes must agree.

    Raises:
        UserError: if there are more boxes, since dropping some would teach that they are nothing.
    """
    boxes, labels = example["boxes"], example["box_label"]
    if len(boxes) > max_boxes:
        raise UserError(
            f"case {int(example.get('index', -1))}: {len(boxes)} boxes, max_boxes is {max_boxes}; "
            f"set data.max_boxes={len(boxes)} or more"
        )
    padded = np.zeros((max_boxes, boxes.shape[-1]), np.float32)
    padded[: len(boxes)] = boxes
    padded_labels = np.full(max_boxes, -1, np.int32)
    padded_labels[: len(labels)] = labels
    return {**example, "boxes": padded, "box_label": padded_labels}


def _foreground_centre(example: Example, rng: np.random.Generator) -> np.ndarray | None:
    """A voxel to look at, or None where nothing is labelled."""
    if "mask" in example or "foreground" in example:
        if "foreground" in example:
            positions, numbers = (example[name] for name in FOUND)
        else:
            mask = example["mask"]
            positions = np.flatnonzero(mask > 0)
            numbers = mask.ravel()[positions]
        if not len(positions):
            return None
        present = np.flatnonzero(np.bincount(numbers))
        voxel = rng.choice(positions[numbers == rng.choice(present)])
        return np.asarray(voxel if voxel.ndim else np.unravel_index(voxel, mask.shape))
    if len(example.get("boxes", ())):
        low, high = np.asarray(rng.choice(example["boxes"])).reshape(2, -1)
        return (low + high) / 2
    return None
