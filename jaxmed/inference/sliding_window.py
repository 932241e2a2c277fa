"""Cover an image of any size with windows of one size, and blend what the network says of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jaxmed.types import Region


def window_regions(
    shape: Sequence[int], window: Sequence[int], *, overlap: float = 0.5
) -> list[Region]:
    """Regions of size `window` that cover an image evenly, neighbours overlapping at least so much.

    Args:
        shape: spatial shape of the image; along an axis shorter than the window, one region that
            has the image in its middle, as training pads it, and begins before 0.
        window: spatial shape of a window.
        overlap: share of a window, at least, that it has in common with its neighbour; [0, 1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected a share from 0 to below 1")
    starts = []
    for size, width in zip(shape, window, strict=True):
        last = size - width
        step = max(1, int(width * (1 - overlap)))
        count = 1 + max(0, math.ceil(last / step))
        # The middle is where `patches.random_patch` puts an image that is smaller than the patch.
        first = min(0, last // 2)
        starts.append(np.linspace(first, max(first, last), count).round().astype(int))
    return [
        tuple(slice(int(s), int(s) + w) for s, w in zip(start, window, strict=True))
        for start in itertools.product(*starts)
    ]


def extract(image: Any, region: Region, *, fill: float = 0.0) -> np.ndarray:
    """The part of (*spatial, channels) in `region`; beyond the image it is `fill`.

    Args:
        image: an array, or what gives one for a region, as `BandedImage`.
        region: of the size wanted.
        fill: beyond the image.
    """
    inside = image[tuple(slice(max(0, s.start), s.stop) for s in region)]
    before = [max(0, -s.start) for s in region]
    after = [
        s.stop - s.start - b - n for s, b, n in zip(region, before, inside.shape, strict=False)
    ]
    if not any(before + after):
        return inside
    widths = [*zip(before, after, strict=True)] + [(0, 0)] * (inside.ndim - len(region))
    return np.pad(inside, widths, constant_values=np.asarray(fill).astype(inside.dtype))


@lru_cache(maxsize=8)
def importance(window: tuple[int, ...]) -> np.ndarray:
    """Weight of each voxel of a window: a Gaussian, since a network knows least about the border.

    The spread is an eighth of the side, as in nnU-Net (doi 10.1038/s41592-020-01008-z); the floor
    keeps corners that only one window sees from dividing by nearly nothing.
    """
    weight = np.ones((), np.float64)
    for side in window:
        axis = (np.arange(side) - (side - 1) / 2) / (side / 8)
        weight = weight[..., None] * np.exp(-0.5 * axis**2)
    return np.maximum(weight, 1e-3).astype(np.float32)


class Blend:
    """The weighted mean of overlapping windows over one image.

    The canvas may be lower than the image. Windows must then come with their first rows in order,
    as `window_regions` gives them, and rows that no further window touches be taken off.

    Args:
        shape: spatial shape of the image.
        channels: of what is blended.
        rows: of the canvas (along the first axis), at least those of a window; None for all.

    Attributes:
        first: row of the image at which the canvas begins.
    """

    def __init__(self, shape: Sequence[int], channels: int, *, rows: int | None = None):
        canvas = (shape[0] if rows is None else min(rows, shape[0]), *shape[1:])
        self._rows = shape[0]
        self._sum = np.zeros((*canvas, channels), np.float32)
        self._weight = np.zeros((*canvas, 1), np.float32)
        self.first = 0

    def add(self, region: Region, values: np.ndarray) -> None:
        """Add (*window, channels) values of one window; what lies beyond the image is left out."""
        weight = importance(tuple(s.stop - s.start for s in region))[..., None]
        region = (slice(region[0].start - self.first, region[0].stop - self.first), *region[1:])
        on_canvas = tuple(slice(max(0, s.start), s.stop) for s in region)
        target = self._sum[on_canvas]
        before = [max(0, -s.start) for s in region]
        inside = tuple(slice(b, b + n) for b, n in zip(before, target.shape[:-1], strict=True))
        target += (values * weight)[inside]
        self._weight[on_canvas] += weight[inside]

    def take(self, until: int) -> np.ndarray:
        """The blended rows from `first` up to `until`, from where the canvas then begins."""
        count = until - self.first
        taken = self._sum[:count] / self._weight[:count]
        for canvas in (self._sum, self._weight):
            canvas[:-count] = canvas[count:]
            canvas[-count:] = 0
        self.first = until
        return taken

    def result(self) -> np.ndarray:
        """The blended (*spatial, channels) values, as far as they were not taken off."""
        rows = self._rows - self.first
        return self._sum[:rows] / self._weight[:rows]
