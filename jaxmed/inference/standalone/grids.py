"""From an image's own grid to the network's, and back; NumPy alone.

Voxel i covers [i, i + 1). Position in the network's grid = position in the file's * scale + offset.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MAX_VOXELS = 2**31
SAMPLED = 1_000_000
"""Percentiles of larger images are taken from about this many voxels."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image (*spatial, channels) on the network's grid, and where that lies in the file's.

    Attributes:
        image: what the network sees.
        scale: and
        offset: (ndim,) float32, see above.
        shape: spatial shape in the file.
    """

    image: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    shape: tuple[int, ...]


def prepare(image: np.ndarray, spacing: np.ndarray, rules: dict[str, Any]) -> Prepared:
    """Channels, spacing, normalisation and size, in this order.

    Args:
        image: (*spatial, channels) of uint8, int16 or float32.
        spacing: (ndim,) float32, mm a voxel.
        rules: `prepare` of the description.

    Raises:
        ValueError: the image does not convert, or would become too big.
    """
    ndim = image.ndim - 1
    found = Prepared(
        convert_channels(image, rules["channels"]),
        np.ones(ndim, np.float32),
        np.zeros(ndim, np.float32),
        image.shape[:-1],
    )
    if rules["spacing"]:
        wanted = np.asarray(rules["spacing"], np.float64)
        sides = np.rint(np.asarray(image.shape[:-1]) * spacing / wanted)
        target = tuple(int(side) for side in np.maximum(1, sides))
        if math.prod(target) * found.image.shape[-1] > MAX_VOXELS:
            raise ValueError(
                f"an image of shape {image.shape[:-1]} and spacing {spacing.tolist()} mm would "
                f"have shape {target} at {wanted.tolist()} mm; is its spacing right?"
            )
        found = _resize(found, target)
    normalized = normalize(found.image, rules["normalization"], dict(rules["options"]))
    found = dataclasses.replace(found, image=normalized)
    size = tuple(rules["size"])
    if not size:
        return found
    return _resize(found, size) if rules["fit"] == "stretch" else _fit(found, size)


def convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Of a picture, gray from RGB by luma (ITU-R BT.601), or RGB from gray by repeating.

    Raises:
        ValueError: of any other number, and of volumes, whose channels are kinds of scans.
    """
    found = image.shape[-1]
    if found == channels:
        return image
    if image.ndim != 3 or {found, channels} != {1, 3}:
        raise ValueError(f"has {found} channels; the model takes {channels}: give the same ones")
    if found == 1:
        return np.repeat(image, 3, -1)
    luma = image.astype(np.float32) @ np.asarray([[0.299], [0.587], [0.114]], "f")
    return _cast(luma, like=image)


def normalize(image: np.ndarray, name: str, options: dict[str, float]) -> np.ndarray:
    """Bring intensities to one range, as float32; "dataset" is left to the program."""
    if name == "dataset":
        return image
    if name == "zscore":
        wide = image.astype(np.float32)
        return np.stack([_standardized(wide[..., c]) for c in range(wide.shape[-1])], -1)
    if name == "percentile":
        wide = image.astype(np.float32)
        flat = wide.reshape(-1, wide.shape[-1])
        bounds = np.percentile(flat[:: max(1, len(flat) // SAMPLED)], [0.5, 99.5], axis=0)
        return _between(wide, *bounds.astype(np.float32))
    if name == "window":
        level, width = options["level"], options["width"]
        bounds = np.asarray([level - width / 2, level + width / 2], np.float32)
        return _between(image.astype(np.float32), *bounds)
    if name == "value_range":
        whole = (0, 255) if image.dtype == np.uint8 else (image.min(), image.max())
        low, high = float(whole[0]), float(whole[1])
        if low == high:
            return np.zeros(image.shape, np.float32)
        return 2 * _between(image.astype(np.float32), *np.asarray([low, high], np.float32)) - 1
    raise ValueError(f"normalisation {name!r} is not known; the model is of a newer version")


def restore_mask(predicted: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Probabilities (*spatial, classes), or instance numbers (*spatial), as a mask of the file.

    What had been cropped away is background.
    """
    scale, offset = prepared.scale.astype(np.float64), prepared.offset.astype(np.float64)
    centres = [
        (np.arange(side) + 0.5) * s + o
        for side, s, o in zip(prepared.shape, scale, offset, strict=True)
    ]
    if predicted.dtype.kind != "f":
        nearest = [
            np.clip(np.floor(c).astype(int), 0, side - 1)
            for c, side in zip(centres, predicted.shape, strict=True)
        ]
        restored = predicted[np.ix_(*nearest)].astype(np.int32)
    else:
        best, restored = None, np.zeros(prepared.shape, np.int32)
        for number, layer in enumerate(_restored_classes(predicted, scale, offset, prepared.shape)):
            if best is None:
                best = layer
                continue
            larger = layer > best
            best[larger] = layer[larger]
            restored[larger] = number
    known = np.ix_(*[(c >= 0) & (c < n) for c, n in zip(centres, predicted.shape, strict=False)])
    framed = np.zeros_like(restored)
    framed[known] = restored[known]
    return framed


def restore_boxes(boxes: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Boxes (n, 2 * ndim) in the file's grid, clipped to its image."""
    corners = boxes.reshape(len(boxes), 2, len(prepared.shape))
    corners = (corners - prepared.offset) / prepared.scale
    corners = np.clip(corners, 0, np.asarray(prepared.shape))
    return corners.reshape(boxes.shape).astype(np.float32)


def _restored_classes(
    probabilities: np.ndarray, scale: np.ndarray, offset: np.ndarray, shape: Sequence[int]
) -> Iterator[np.ndarray]:
    # Padding around the image is cut off first, lest it bleeds in at the border.
    first = np.maximum(0, np.rint(offset)).astype(int)
    last = np.minimum(probabilities.shape[:-1], np.rint(offset + scale * shape)).astype(int)
    part = probabilities[tuple(map(slice, first, last))]
    weights = [
        _weights(inner, side, factor=1 / s, shift=(f - o) / s)
        for inner, side, s, o, f in zip(part.shape, shape, scale, offset, first, strict=False)
    ]
    for c in range(part.shape[-1]):
        yield _interpolate(part[..., c], weights)


def _resize(found: Prepared, shape: tuple[int, ...]) -> Prepared:
    """Stretch or squeeze to a spatial shape; the image keeps its dtype."""
    old = found.image.shape[:-1]
    if old == shape:
        return found
    weights = [
        None if m == n else _weights(n, m, factor=m / n) for n, m in zip(old, shape, strict=True)
    ]
    factor = np.asarray(shape, np.float32) / np.asarray(old, np.float32)
    return dataclasses.replace(
        found,
        image=_cast(_interpolate(found.image, weights), like=found.image),
        scale=(found.scale * factor).astype(np.float32),
        offset=(found.offset * factor).astype(np.float32),
    )


def _fit(found: Prepared, shape: tuple[int, ...]) -> Prepared:
    """Resize until the longest side fits, then pad evenly with each channel's least value."""
    sides = found.image.shape[:-1]
    factor = min(new / old for new, old in zip(shape, sides, strict=True))
    inner = [min(new, max(1, round(old * factor))) for new, old in zip(shape, sides, strict=True)]
    found = _resize(found, tuple(inner))
    before = [-((old - new) // 2) for new, old in zip(shape, inner, strict=True)]
    padded = np.empty((*shape, found.image.shape[-1]), found.image.dtype)
    padded[...] = found.image.min(tuple(range(len(shape))))
    padded[tuple(slice(b, b + n) for b, n in zip(before, inner, strict=True))] = found.image
    offset = (found.offset + np.asarray(before, np.float32)).astype(np.float32)
    return dataclasses.replace(found, image=padded, offset=offset)


def _weights(
    old: int, new: int, *, factor: float, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation along one axis, new position = old * factor + shift.

    The kernel is as wide as a voxel of the coarser grid, which keeps a reduced image free of
    aliasing.

    Returns:
        (new, taps) numbers of old voxels, and their weights.
    """
    width = max(1.0, 1 / factor)
    centres = np.clip((np.arange(new) + 0.5 - shift) / factor, 0.5, old - 0.5) - 0.5
    columns = np.floor(centres - width).astype(int)[:, None] + np.arange(2 * math.ceil(width) + 2)
    weights = np.maximum(0, 1 - np.abs(columns - centres[:, None]) / width)
    weights[(columns < 0) | (columns >= old)] = 0
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return np.clip(columns, 0, old - 1), weights


def _interpolate(
    array: np.ndarray, weights: Sequence[tuple[np.ndarray, np.ndarray] | None]
) -> np.ndarray:
    """Interpolate along each leading axis, in float32 and voxel after voxel as SciPy would."""
    array = array.astype(np.float32)
    for axis, found in enumerate(weights):
        if found is None:
            continue
        columns, shares = found
        rows = np.moveaxis(array, axis, 0)
        total = np.zeros((len(columns), *rows.shape[1:]), np.float32)
        for tap in np.flatnonzero(shares.any(0)):
            share = shares[:, tap].reshape(-1, *(1,) * (rows.ndim - 1))
            total += share * rows[columns[:, tap]]
        array = np.moveaxis(total, 0, axis)
    return np.ascontiguousarray(array)


def _cast(values: np.ndarray, *, like: np.ndarray) -> np.ndarray:
    """Back to the dtype and the range of the original; integers are rounded."""
    values = np.clip(values, like.min(), like.max())
    return (np.rint(values) if like.dtype.kind in "iu" else values).astype(like.dtype)


def _standardized(values: np.ndarray) -> np.ndarray:
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    # A constant image has a deviation of rounding errors.
    if std <= 1e-6 * abs(mean) or std == 0:
        return np.zeros_like(values)
    return ((values - mean) / std).astype(np.float32)


def _between(image: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Clip to low..high and scale that to 0..1; zeros where the two are equal."""
    extent = high - low
    return (np.clip(image, low, high) - low) / np.where(extent > 0, extent, 1).astype(np.float32)
