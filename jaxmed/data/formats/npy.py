"""Plain NumPy arrays, `.npy`; never pickled objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.types import Region, UserError

_COLOURS = 4


def _full_shape(path: Path, found: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with a channel axis.

    Two axes are an image. Three are an image with channels where the last has at most 4, else a
    volume. Four are a volume with channels.
    """
    if len(found) == 2 or (len(found) == 3 and found[-1] > _COLOURS):
        return (*found, 1)
    if len(found) == 3 or (len(found) == 4 and found[-1] <= common.MAX_CHANNELS):
        return found
    raise UserError(
        f"{path}: shape {found}; expected (rows, cols), (rows, cols, 1 to {_COLOURS} channels), "
        f"(x, y, z) or (x, y, z, up to {common.MAX_CHANNELS} channels)"
    )


def shape(path: Path) -> tuple[int, ...]:
    """(*spatial, channels) from the header alone."""
    return _full_shape(path, np.load(path, mmap_mode="r", allow_pickle=False).shape)


def read(path: Path, *, max_voxels: int, indices: bool, region: Region | None = None) -> Image:
    """Read an array, or a region of it; where its axes point is not known."""
    del indices  # values are numbers already
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    full = _full_shape(path, stored.shape)
    window = common.window_of(full[:-1], region)
    common.check_size(path, (*common.region_shape(window), full[-1]), max_voxels)
    # The file is mapped, so that only what is copied is read.
    part = np.array(stored[window])
    array, notes = common.as_supported(part.reshape(*part.shape[: len(window)], full[-1]), path)
    return Image(
        array=np.ascontiguousarray(array),
        spacing=np.ones(len(full) - 1, np.float32),
        affine=None,
        kind="npy",
        orientation=None,
        path=path,
        notes=notes,
    )


def mask_suffix(like: Image) -> str:
    """The same."""
    del like
    return ".npy"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a mask as an array of its spatial shape."""
    del like, names
    with open(path, "wb") as stream:
        np.save(stream, common.smallest_unsigned(mask), allow_pickle=False)
