"""Cover an image with windows of one size, and blend what the network says of each; NumPy alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
Region = tuple[slice, ...]


def predict_windows(
    run: Run,
    image: np.ndarray,
    *,
    window: Sequence[int],
    overlap: float,
    fill: float,
    batch_size: int,
) -> np.ndarray:
    """The weighted mean of a dense prediction over overlapping windows.

    Args:
        run: (batch_size, *window, channels) -> (batch_size, *window, classes).
        image: (*spatial, channels).
        window: spatial shape of a window.
        overlap: share, at least, that neighbours have in common.
        fill: what a window sees beyond the image.
        batch_size: windows at a time; the last batch is filled up, so that all have one shape.

    Returns:
        (*spatial, classes) float32.
    """
    regions = window_regions(image.shape[:-1], window, overlap=overlap)
    weight = _importance(window)
    total = np.zeros(0, np.float32)
    weights = np.zeros((*image.shape[:-1], 1), np.float32)
    for start in range(0, len(regions), batch_size):
        part = regions[start : start + batch_size]
        seen = np.stack([_extract(image, region, fill) for region in part])
        filled = np.zeros((batch_size, *seen.shape[1:]), np.float32)
        filled[: len(part)] = seen
        found = run(filled)
        if not total.size:
            total = np.zeros((*image.shape[:-1], found.shape[-1]), np.float32)
        for region, values in zip(part, found, strict=False):
            inside = tuple(slice(max(0, s.start), s.stop) for s in region)
            before = [max(0, -s.start) for s in region]
            kept = tuple(
                slice(b, b + n) for b, n in zip(before, total[inside].shape[:-1], strict=True)
            )
            total[inside] += (values * weight)[kept]
            weights[inside] += weight[kept]
    return total / weights


def window_regions(shape: Sequence[int], window: Sequence[int], *, overlap: float) -> list[Region]:
    """Regions that cover an image evenly; one about the middle along a side that is shorter."""
    starts = []
    for size, width in zip(shape, window, strict=True):
        last = size - width
        count = 1 + max(0, math.ceil(last / max(1, int(width * (1 - overlap)))))
        first = min(0, last // 2)
        starts.append(np.linspace(first, max(first, last), count).round().astype(int))
    return [
        tuple(slice(int(s), int(s) + w) for s, w in zip(start, window, strict=True))
        for start in itertools.product(*starts)
    ]


def _extract(image: np.ndarray, region: Region, fill: float) -> np.ndarray:
    """The part of an image in a region; beyond the image it is `fill`, in the image's type."""
    inside = image[tuple(slice(max(0, s.start), s.stop) for s in region)]
    before = [max(0, -s.start) for s in region]
    sides = [s.stop - s.start for s in region]
    after = [n - b - m for n, b, m in zip(sides, before, inside.shape, strict=False)]
    widths = [*zip(before, after, strict=True), (0, 0)]
    return np.pad(inside, widths, constant_values=np.asarray(fill).astype(inside.dtype))


def _importance(window: Sequence[int]) -> np.ndarray:
    """(*window, 1): a Gaussian whose spread is an eighth of the side, since a border knows less."""
    weight = np.ones((), np.float64)
    for side in window:
        axis = (np.arange(side) - (side - 1) / 2) / (side / 8)
        weight = weight[..., None] * np.exp(-0.5 * axis**2)
    return np.maximum(weight, 1e-3).astype(np.float32)[..., None]
