"""Bring intensities of any scanner and dtype to one range, as float32.

Each function is (example, *, options) -> example and changes `image` alone. A constant image gives
zeros (the lower end of the range, if it has one), never NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxmed.types import Example, UserError

SAMPLED = 1_000_000
"""Percentiles of larger images are taken from about this many voxels, evenly spread."""


def zscore(example: Example, *, foreground: bool = False) -> Example:
    """Zero mean and unit variance for each channel, for intensities in arbitrary units (MRI).

    Args:
        example: with `image`.
        foreground: count only voxels that are not zero in the channel, and leave the others at
            zero: for images whose surround was set to zero, such as skull-stripped brains.

    >>> zscore({"image": np.array([[[1.0], [3.0]]])})["image"].ravel().tolist()
    [-1.0, 1.0]
    """
    image = example["image"].astype(np.float32)
    scaled = np.zeros_like(image)
    for channel in range(image.shape[-1]):
        values = image[..., channel]
        chosen = values != 0 if foreground else np.ones(values.shape, bool)
        if chosen.any():
            scaled[..., channel][chosen] = _standardized(values[chosen])
    return {**example, "image": scaled}


def standardize(example: Example, *, mean: np.ndarray, std: np.ndarray) -> Example:
    """The z-score by given means and deviations (channels,), which may be those of more voxels."""
    image = example["image"].astype(np.float32)
    return {**example, "image": _scaled(image, mean, std)}


def percentile(example: Example, *, low: float = 0.5, high: float = 99.5) -> Example:
    """Clip each channel to its percentiles and bring it to 0..1: robust to single bright voxels."""
    _check_order("percentiles", low, high)
    image = example["image"].astype(np.float32)
    flat = image.reshape(-1, image.shape[-1])
    bounds = np.percentile(flat[:: max(1, len(flat) // SAMPLED)], [low, high], axis=0)
    return between({**example, "image": image}, bounds=bounds)


def between(example: Example, *, bounds: np.ndarray) -> Example:
    """Clip each channel to given bounds (2, channels) and bring them to 0..1."""
    image = example["image"].astype(np.float32, copy=False)
    return {**example, "image": _between(image, *bounds.astype(np.float32))}


def window(example: Example, *, level: float = 40.0, width: float = 400.0) -> Example:
    """A radiologist's window in Hounsfield units, to 0..1; the default is of soft tissue.

    >>> scan = {"image": np.array([[[-1000.0], [40.0], [240.0], [1000.0]]])}  # air, tissue, bone
    >>> window(scan, level=40, width=400)["image"].ravel().tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    if width <= 0:
        raise UserError(f"preprocessing: window width is {width}; set a positive number of HU")
    image = example["image"].astype(np.float32)
    bounds = np.asarray([level - width / 2, level + width / 2], np.float32)
    return {**example, "image": _between(image, *bounds)}


def value_range(
    example: Example, *, low: float | None = None, high: float | None = None
) -> Example:
    """Bring low..high to -1..1; by default the whole range of uint8, or that of the image.

    Of uint8 images black stays black and white stays white, whatever the picture shows: what
    networks pretrained on photographs expect, and what keeps stains comparable.
    """
    image = example["image"]
    whole = (0, 255) if image.dtype == np.uint8 else (image.min(), image.max())
    low = float(whole[0]) if low is None else low
    high = float(whole[1]) if high is None else high
    if low == high:
        return {**example, "image": np.zeros(image.shape, np.float32)}
    _check_order("value range", low, high)
    unit = _between(image.astype(np.float32), *np.asarray([low, high], np.float32))
    return {**example, "image": 2 * unit - 1}


NORMALIZATIONS: dict[str, Callable[..., Example]] = {
    "zscore": zscore,
    "percentile": percentile,
    "window": window,
    "value_range": value_range,
}


def _standardized(values: np.ndarray) -> np.ndarray:
    # float64 sums: the squares of a large CT overflow the digits of float32.
    return _scaled(values, values.mean(dtype=np.float64), values.std(dtype=np.float64))


def _scaled(
    values: np.ndarray, mean: np.ndarray | np.floating, std: np.ndarray | np.floating
) -> np.ndarray:
    # A constant image has a deviation of rounding errors, which must not be blown up to one.
    flat = (std <= 1e-6 * np.abs(mean)) | (std == 0)
    if np.all(flat):
        return np.zeros_like(values)
    scaled = ((values - mean) / np.where(flat, 1, std)).astype(np.float32)
    if np.any(flat):
        scaled[..., flat] = 0
    return scaled


def _between(
    image: np.ndarray, low: np.ndarray | np.floating, high: np.ndarray | np.floating
) -> np.ndarray:
    """Clip to low..high and scale that to 0..1; zeros where the two are equal."""
    extent = high - low
    return (np.clip(image, low, high) - low) / np.where(extent > 0, extent, 1).astype(np.float32)


def _check_order(name: str, low: float, high: float) -> None:
    if not low < high:
        raise UserError(f"preprocessing: {name} {low} to {high}; set a low one below the high one")
