"""Plain NumPy arrays, `.npy`, or one of them in `.npz`; never pickled objects."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.grid import Grid
from jaxmed.types import Region, UserError

_COLOURS = 4
_MOST_PACKED = 1032
"""Bytes that one byte of a packed archive can become at most."""
_LONGER = "{}: holds more than its header says; copy or export it again"


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


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, int]]:
    """A stream at the start of the array, and the bytes that follow at most.

    Raises:
        UserError: an archive holds no array, or several without one called `image` or `arr_0`.
    """
    if path.suffix.lower() != ".npz":
        with open(path, "rb") as stream:
            yield stream, path.stat().st_size
        return
    with zipfile.ZipFile(path) as archive:
        arrays = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        chosen = [arrays[name] for name in ("image", "arr_0") if name in arrays]
        if len(arrays) != 1 and not chosen:
            a_set = "; as a data set of MedMNIST evaluate.py and explain.py read it"
            raise UserError(
                f"{path}: holds the arrays {', '.join(sorted(arrays)) or 'none'}; expected one, "
                f"or one called image{a_set if 'test_images' in arrays else ''}"
            )
        entry = (chosen or list(arrays.values()))[0]
        # What the archive says of its size may be a lie; what is packed bounds it.
        bound = entry.compress_size * (_MOST_PACKED if entry.compress_type else 1)
        with archive.open(entry) as stream:
            yield stream, min(entry.file_size, bound, path.stat().st_size * _MOST_PACKED)


def _header(path: Path, stream: Any, room: int) -> tuple[int, ...]:
    """The shape that a header states, once there is enough behind it.

    Raises:
        UserError: the array holds Python objects, or is cut short.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}
    found, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(stream)
    if dtype.hasobject:
        raise UserError(f"{path}: holds Python objects, which are not read; save plain numbers")
    if math.prod(found) * dtype.itemsize > room:
        raise UserError(f"{path}: the file is cut short; copy or export it again")
    return tuple(int(size) for size in found)


def grid(path: Path) -> Grid:
    """Of (*spatial, channels), from the header alone."""
    with _open(path) as (stream, room):
        shape = _full_shape(path, _header(path, stream, room))
        return Grid(shape, np.ones(len(shape) - 1, np.float32))


def read(path: Path, *, max_voxels: int, indices: bool, region: Region | None = None) -> Image:
    """Read an array, or a region of it; where its axes point is not known."""
    del indices  # values are numbers already
    with _open(path) as (stream, room):
        full = _full_shape(path, _header(path, stream, room))
    window = common.window_of(full[:-1], region)
    common.check_size(path, (*common.region_shape(window), full[-1]), max_voxels)
    if path.suffix.lower() == ".npz":
        common.check_size(path, full, max_voxels)  # a packed array is read whole
        with _open(path) as (stream, _):
            stored = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # at the end an archive checks its sum
                raise UserError(_LONGER.format(path))
    else:
        # The file is mapped, so that only what is copied is read.
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if stored.offset + stored.nbytes != path.stat().st_size:
            raise UserError(_LONGER.format(path))
    part = np.array(stored[window])
    array, notes = common.as_supported(part.reshape(*part.shape[: len(window)], full[-1]), path)
    if len(window) == 3:
        notes += (common.UNSIZED,)
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
    """An array by itself."""
    del like
    return ".npy"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a mask as an array of its spatial shape."""
    del like, names
    with open(path, "wb") as stream:
        np.save(stream, common.smallest_unsigned(mask), allow_pickle=False)


def write_image(path: Path, array: np.ndarray, like: Image) -> None:
    """Write (*spatial, channels) as it is."""
    del like
    with open(path, "wb") as stream:
        np.save(stream, array, allow_pickle=False)
