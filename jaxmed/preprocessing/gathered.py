"""Normalise parts of an image by the statistics of the whole, which are gathered band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from jaxmed.preprocessing import intensity
from jaxmed.types import Example


def normalization_of_whole(
    name: str, bands: Callable[[], Iterable[np.ndarray]], *, pixels: int, **options: float
) -> Callable[[Example], Example]:
    """What `intensity.NORMALIZATIONS[name]` does to a whole image, for any part of it.

    Equal to it, percentiles included; of the z-score up to the rounding of float64 sums.

    Args:
        name: of the normalisation.
        bands: gives the rows of the image, (rows, columns, channels) at a time, in order. They are
            gone through once, or not at all where nothing must be gathered.
        pixels: rows x columns of the whole.
        options: of the normalisation.
    """
    if name == "zscore":
        mean, std = _moments(bands())
        return partial(intensity.standardize, mean=mean, std=std)
    if name == "percentile":
        bounds = _percentiles(bands(), pixels=pixels, **options)
        return partial(intensity.between, bounds=bounds)
    if name == "value_range":
        given = options or _extremes(bands())
        return lambda example: intensity.value_range(example, **given)
    return partial(intensity.NORMALIZATIONS[name], **options)


def _moments(bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (channels,) over all bands.

    Sums of squares are about each band's own mean and then moved (Chan et al. 1983, doi
    10.1080/00031305.1983.10483115): those about zero would lose the digits of a large CT.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for band in bands:
        flat = band.reshape(-1, band.shape[-1]).astype(np.float64)
        own = flat.mean(0)
        shift, total = own - mean, count + len(flat)
        squares = squares + ((flat - own) ** 2).sum(0) + shift**2 * (count * len(flat) / total)
        mean, count = mean + shift * (len(flat) / total), total
    return mean, np.sqrt(squares / count)


def _percentiles(
    bands: Iterable[np.ndarray], *, pixels: int, low: float = 0.5, high: float = 99.5
) -> np.ndarray:
    """Percentiles (2, channels) of the same voxels that `intensity.percentile` samples."""
    step = max(1, pixels // intensity.SAMPLED)
    sampled, seen = [], 0
    for band in bands:
        flat = band.reshape(-1, band.shape[-1])
        sampled.append(flat[-seen % step :: step].astype(np.float32))
        seen += len(flat)
    return np.percentile(np.concatenate(sampled), [low, high], axis=0)


def _extremes(bands: Iterable[np.ndarray]) -> dict[str, float]:
    """Least and greatest value; none where the type says them."""
    low, high = np.inf, -np.inf
    for band in bands:
        if band.dtype == np.uint8:
            return {}
        low, high = min(low, float(band.min())), max(high, float(band.max()))
    return {"low": low, "high": high}
