"""What of an image is seen on a flat page: which slice, which way up, how bright."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

DARK = 100
"""An 8-bit picture whose 99th percentile is not above this shows little unless it is stretched."""


@dataclasses.dataclass(frozen=True)
class View:
    """What of an image is seen: all of it, or one slice of a volume.

    Attributes:
        shape: spatial shape of the whole image.
        slice: along the last axis of a volume, else None.
    """

    shape: tuple[int, ...]
    slice: int | None

    def cut(self, array: np.ndarray) -> np.ndarray:
        """What is seen of an array (*spatial, ...), as (rows, columns, ...)."""
        if self.slice is None:
            return array
        return np.swapaxes(array[:, :, self.slice], 0, 1)[::-1, ::-1]

    def rectangle(self, box: np.ndarray) -> tuple[float, float, float, float] | None:
        """Row, column, height and width of a box, or None where it is not on the slice."""
        if self.slice is None:
            low_row, low_col, high_row, high_col = box.tolist()
            return low_row, low_col, high_row - low_row, high_col - low_col
        x, y, z, high_x, high_y, high_z = box.tolist()
        if not z < self.slice + 1 or not high_z > self.slice:
            return None
        return self.shape[1] - high_y, self.shape[0] - high_x, high_y - y, high_x - x

    def aspect(self, spacing: np.ndarray | None) -> float:
        """Height of a pixel over its width."""
        if spacing is None:
            return 1.0
        rows, columns = (0, 1) if self.slice is None else (1, 0)
        return float(spacing[rows]) / float(spacing[columns])


def choose_view(
    shape: tuple[int, ...],
    masks: Sequence[np.ndarray | None],
    boxes: Sequence[np.ndarray | None],
) -> View:
    """The slice with the largest foreground: of the truth, else of the prediction, else boxes."""
    if len(shape) == 2:
        return View(shape, None)
    for mask in masks:
        if mask is not None and (mask > 0).any():
            return View(shape, int((mask > 0).sum((0, 1)).argmax()))
    planes = np.arange(shape[2])[:, None] + 0.5
    for found in boxes:
        if found is not None and len(found):
            size = np.prod(found[:, 3:5] - found[:, :2], axis=-1)
            area = (size * ((found[:, 2] < planes) & (planes < found[:, 5]))).sum(-1)
            if area.any():
                return View(shape, int(area.argmax()))
    return View(shape, shape[2] // 2)


def window(image: np.ndarray) -> np.ndarray:
    """(rows, columns[, 3]) float from 0 to 1; values that are not finite are black.

    Colours of 8 bits are shown as they are, save where nearly all are dark, as in fluorescence.
    """
    coloured = image.shape[-1] == 3
    image = image if coloured else image[..., 0]
    if coloured and image.dtype == np.uint8 and np.percentile(image, 99) > DARK:
        return image / 255.0
    image = np.asarray(image, np.float64)
    finite = np.isfinite(image)
    if not finite.any():
        return np.zeros(image.shape)
    low, high = np.percentile(image[finite], [1, 99])
    if high <= low:  # nearly all voxels are equal
        low, high = image[finite].min(), image[finite].max()
    image = (np.where(finite, image, low) - low) / max(float(high - low), 1e-12)
    return np.clip(image, 0, 1)
