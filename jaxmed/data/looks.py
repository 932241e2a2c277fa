"""One look at a case: what is kept of it to compare it with all others of its set."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.data.burnt_in import longest_row
from jaxmed.types import Example

BROKEN = "broken case"
OTHER_CHANNELS = "other number of channels"
"""Kinds of findings that keep a set from being used as it is."""

THUMBNAIL = {2: 24, 3: 12}
"""Values a side of the small copy by which near duplicates are found, by the number of axes."""
SAME_BOX = 0.8
"""Overlap from which two boxes of one label are one object marked twice."""
SAMPLED = 4096
"""Voxels by which different values are counted."""
FEWEST_VALUES = 16
"""Different values of an image that is taken for a photograph or scan."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at a case tells; small, whatever the size of the image."""

    problem: str = ""
    kind: str = BROKEN
    digest: str = ""
    thumbnail: np.ndarray | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    classes: frozenset[int] = frozenset()
    doubled: tuple[tuple[int, int], ...] = ()
    at_top: float = 0.0
    characters: int = 0  # in the longest row of what looks like text
    notes: tuple[str, ...] = ()  # of the reader, on what a file holds that the image does not


def pack(look: Look) -> dict[str, Any]:
    """A look as JSON has it; `unpack` makes it one again."""
    small = look.thumbnail
    return {
        **dataclasses.asdict(look),
        "thumbnail": None if small is None else base64.b64encode(small.tobytes()).decode(),
        "classes": sorted(look.classes),
    }


def unpack(packed: Mapping[str, Any]) -> Look:
    """The look that `pack` was given."""
    small = packed["thumbnail"]
    return Look(
        **{
            **packed,
            "thumbnail": None if small is None else np.frombuffer(base64.b64decode(small), "f4"),
            "classes": frozenset(packed["classes"]),
            "doubled": tuple((i, j) for i, j in packed["doubled"]),
            "notes": tuple(packed["notes"]),
        }
    )


def look_at(example: Example) -> Look:
    """What one case tells, by its image and its labels."""
    image = example["image"]
    content = repr((image.shape, str(image.dtype))).encode() + np.ascontiguousarray(image).tobytes()
    flat = image.reshape(-1, image.shape[-1])
    low, high = float(flat.min()), float(flat.max())
    numbers = {
        "mean": float(flat.mean(dtype=np.float64)),
        "standard deviation": float(flat.std(dtype=np.float64)),
        "range of values": high - low,
        "number of voxels": float(flat.shape[0]),
        **{
            f"spacing along axis {axis}": float(value)
            for axis, value in enumerate(example["spacing"])
        },
    }
    classes: frozenset[int] = frozenset()
    doubled: list[tuple[int, int]] = []
    if "mask" in example:
        classes = frozenset(np.unique(example["mask"]).tolist())
    elif "box_label" in example:
        classes = frozenset(example["box_label"].tolist())
        doubled = _same_boxes(example["boxes"], example["box_label"])
    elif "label" in example:
        label = np.asarray(example["label"])
        on = np.flatnonzero(label) if label.ndim else label[None]
        classes = frozenset(int(c) for c in on)
    digest = hashlib.sha256(content).hexdigest()
    # Of an image of few values, such as a drawing, none is a limit that was hit.
    few = different_values(image) < FEWEST_VALUES
    at_top = 0.0 if few else float((flat == high).mean())
    return Look(
        digest=digest,
        thumbnail=_thumbnail(image),
        numbers=numbers,
        classes=classes,
        doubled=tuple(doubled),
        at_top=at_top,
        characters=longest_row(image) if image.ndim == 3 else 0,
    )


def different_values(image: np.ndarray) -> int:
    """Different values among some thousand voxels of an image, and its least and greatest."""
    flat = image.reshape(-1, image.shape[-1])
    some = flat[:: max(1, len(flat) // SAMPLED)]
    return np.union1d(some, [flat.min(), flat.max()]).size


def _thumbnail(image: np.ndarray) -> np.ndarray | None:
    """A small copy with mean 0 and length 1, alike for images that look alike; None of a flat one.

    Means over blocks, so that noise and compression hardly show; brightness and contrast do not
    matter.
    """
    small = image.astype(np.float32).mean(-1)
    for axis, side in enumerate(small.shape):
        cuts = np.linspace(0, side, min(side, THUMBNAIL[small.ndim]) + 1).astype(int)
        sums = np.add.reduceat(small, cuts[:-1], axis=axis)
        shape = [-1 if i == axis else 1 for i in range(small.ndim)]
        small = sums / np.diff(cuts).reshape(shape)
    small = small - small.mean()
    length = np.linalg.norm(small)
    if length <= 1e-6 * max(1.0, float(np.abs(image).max())):
        return None
    return (small / length).ravel().astype(np.float32)


def _same_boxes(boxes: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    ndim = boxes.shape[-1] // 2
    low, high = boxes[:, :ndim], boxes[:, ndim:]
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    both = np.maximum(sides, 0).prod(-1)
    volume = (high - low).prod(-1)
    overlap = both / np.maximum(volume[:, None] + volume[None] - both, 1e-9)
    same = np.triu((overlap > SAME_BOX) & (labels[:, None] == labels[None]), 1)
    return [(int(i), int(j)) for i, j in np.argwhere(same)]
