"""What all image formats share: the Image, its RAS order, its limits, and how reading fails."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from jaxmed.data.formats.grid import Grid
from jaxmed.types import Region, UserError

MAX_VOXELS = 2**31
"""Numbers (voxels times channels) that a file may claim before it is refused unread."""

MAX_CHANNELS = 32
"""A fourth axis up to this long is taken for channels (modalities), a longer one for time."""

UNSIZED = "does not state all sides of its voxels; 1 mm is assumed for others"
"""What readers note of such a volume."""

EXACT_FLOAT32 = 2**24
"""Whole numbers up to this size are exact in float32."""

Orientation = tuple[tuple[int, int], ...]
"""For every axis of the file: the axis of the RAS array it becomes, and -1 where it is flipped."""


@dataclasses.dataclass(frozen=True)
class Image:
    """One image as read from its file; holds neither names nor numbers of patients.

    Attributes:
        array: (*spatial, channels) of uint8, int16 or float32. 2-D: (rows, cols, channels);
            volumes: (x, y, z, channels) in RAS order where the file says which way is up.
        spacing: (ndim,) float32, mm a voxel; 1 where unknown.
        affine: (4, 4) float64 from voxel indices of `array` to RAS+ millimetres, or None.
        kind: "png", "jpeg", "bmp", "tiff", "nifti", "nrrd", "metaimage", "dicom" or "npy".
        orientation: how the axes of the file were reordered, or None where they were not.
        path: the file, or the folder of a DICOM series.
        notes: what is odd about the file, a sentence each.
    """

    array: np.ndarray
    spacing: np.ndarray
    affine: np.ndarray | None
    kind: str
    orientation: Orientation | None
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid:
        """Where its voxels lie."""
        return Grid(self.array.shape, self.spacing, self.affine)


def starts_as_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do; they often come without a suffix."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM" and path.name.upper() != "DICOMDIR"
    except OSError:
        return False


def check_size(path: Path, shape: tuple[int, ...], max_voxels: int) -> None:
    """Refuse a file by the shape in its header, before memory is taken for it.

    Raises:
        UserError: the shape is empty, or holds more than `max_voxels` numbers.
    """
    count = math.prod(int(size) for size in shape)
    if count <= 0:
        raise UserError(f"{path}: the image is empty, shape {tuple(shape)}; leave out the file")
    if count > max_voxels:
        raise UserError(
            f"{path}: shape {tuple(shape)} has {count} values, more than the limit "
            f"max_voxels={max_voxels}; cut or downsample the image, or raise the limit"
        )


def safe_path(text: str, *, where: str) -> str:
    """A relative path with forward slashes, as written in a table, an annotation or a header.

    Raises:
        UserError: if the path is absolute or leads out of its folder.
    """
    path = PurePosixPath(text.strip().replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:", str(path)):
        raise UserError(f"{where}: path {text!r} leads out of the folder; give a relative path")
    return path.as_posix()


def check_room(path: Path, claimed: int, there: int, *, packed: bool) -> None:
    """Refuse a header that claims more bytes than the file can hold, before memory is taken.

    Args:
        path: of the file.
        claimed: bytes of all voxels.
        there: bytes of the file.
        packed: whether it is compressed, by deflate, which shrinks 1032 to 1 at most.

    Raises:
        UserError: the file is too short.
    """
    if claimed > there * (1032 if packed else 1):
        raise UserError(f"{path}: the file is cut short; copy or export it again")


def window_of(shape: Sequence[int], region: Region | None) -> Region:
    """The slices of a region with start and stop as numbers inside the image; None is all of it.

    Raises:
        ValueError: if the region has steps, or another number of axes, or is empty.
    """
    if region is None:
        return tuple(slice(0, int(size)) for size in shape)
    if len(region) != len(shape):
        raise ValueError(f"region has {len(region)} slices, the image {len(shape)} spatial axes")
    bounds = [part.indices(int(size)) for part, size in zip(region, shape, strict=True)]
    if any(stop <= start or step != 1 for start, stop, step in bounds):
        raise ValueError(f"region {region} of an image of shape {tuple(shape)} is empty or steps")
    return tuple(slice(start, stop) for start, stop, _ in bounds)


def region_shape(region: Region) -> tuple[int, ...]:
    """The shape of slices that have a start and a stop."""
    return tuple(part.stop - part.start for part in region)


def affine_of_region(affine: np.ndarray | None, region: Region) -> np.ndarray | None:
    """The affine of a part of an image whose own is `affine`."""
    if affine is None:
        return None
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ [part.start for part in region]
    return moved


def as_supported(array: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Convert to uint8, int16 or float32, the first of them that holds every value of the type.

    The choice depends on the type alone, never on the values, so that all files of a set agree.

    Returns:
        The array, and notes on what could not be kept exactly.

    Raises:
        UserError: the values are no plain numbers.
    """
    if array.dtype == bool:
        return array.astype(np.uint8), ()
    if array.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: values are of type {array.dtype}; expected integers or real numbers, "
            "so convert the file"
        )
    for dtype in (np.uint8, np.int16):
        if np.can_cast(array.dtype, dtype):
            return array.astype(dtype, copy=False), ()
    notes: tuple[str, ...] = ()
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2:
        low, high = int(array.min()), int(array.max())
        if max(-low, high) > EXACT_FLOAT32:
            notes = (f"integers from {low} to {high} are rounded to float32",)
    with np.errstate(over="ignore"):  # becomes infinite, which the data checks report
        return array.astype(np.float32, copy=False), notes


def drop_alpha(array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Leave out the last channel, opacity, and note it if it said anything."""
    alpha = array[..., -1]
    if (alpha == alpha.flat[0]).all():
        return array[..., :-1], ()
    return array[..., :-1], ("the opacity (alpha) channel varies; it was left out",)


def orientation_of(affine: np.ndarray, path: Path) -> Orientation:
    """The flips and permutation that bring the axes of a file nearest to RAS+.

    Args:
        affine: (4, 4) from voxel indices of the file to RAS+ millimetres.
        path: to name in an error.

    Raises:
        UserError: the affine is not finite or not invertible.
    """
    import nibabel

    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(
            f"{path}: the position of the voxels in space (affine) is broken: "
            f"{affine[:3].tolist()}; repair the header"
        )
    return tuple((int(axis), int(sign)) for axis, sign in nibabel.io_orientation(affine))


def to_ras(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Reorder file axes (i, j, k, ...) to RAS (x, y, z, ...); further axes stay last."""
    flipped = array[tuple(slice(None, None, sign) for _, sign in orientation)]
    order = np.argsort([axis for axis, _ in orientation]).tolist()
    return np.transpose(flipped, order + list(range(len(orientation), array.ndim)))


def from_ras(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """The inverse of `to_ras`."""
    order = [axis for axis, _ in orientation]
    array = np.transpose(array, order + list(range(len(orientation), array.ndim)))
    return array[tuple(slice(None, None, sign) for _, sign in orientation)]


def ras_affine(
    affine: np.ndarray, orientation: Orientation, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The affine of the reordered array, and the spacing of its axes.

    Args:
        affine: (4, 4) of the file's axes.
        orientation: as from `orientation_of`.
        shape: spatial shape in the file's order.

    Returns:
        (4, 4) float64 and (3,) float32 millimetres.
    """
    moved = np.array(affine, np.float64)
    for i, (axis, sign) in enumerate(orientation):
        moved[:3, axis] = sign * affine[:3, i]
        if sign < 0:
            moved[:3, 3] += affine[:3, i] * (shape[i] - 1)
    return moved, np.linalg.norm(moved[:3, :3], axis=0).astype(np.float32)


def ras_shape(shape: tuple[int, ...], orientation: Orientation) -> tuple[int, ...]:
    """The spatial shape after `to_ras`."""
    order = np.argsort([axis for axis, _ in orientation])
    return tuple(int(shape[i]) for i in order)


def smallest_unsigned(mask: np.ndarray, largest: int = 2**32 - 1) -> np.ndarray:
    """The mask in the smallest of uint8, uint16 and uint32 that holds it.

    Raises:
        UserError: values are negative, not whole, or above `largest`.
    """
    broken = mask.dtype.kind not in "iu" and bool((mask != np.rint(mask)).any())
    if broken or (mask.size and (mask.min() < 0 or mask.max() > largest)):
        raise UserError(
            f"mask holds values from {mask.min()} to {mask.max()}; this format takes "
            f"whole numbers from 0 to {largest}"
        )
    top = int(mask.max(initial=0))
    return mask.astype(np.uint8 if top < 2**8 else np.uint16 if top < 2**16 else np.uint32)


class _Quiet:
    """Silences Python warnings while any thread is inside.

    `warnings.catch_warnings` restores the filters it found on entry, so that two threads leaving
    in the wrong order would keep them silent for ever; hence only the first enters and the last
    leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._context = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._context.__exit__(None, None, None)


_quiet = _Quiet()


@contextlib.contextmanager
def reading(path: Path, *, private: bool = False, verb: str = "read") -> Iterator[None]:
    """Turn whatever a library raises about a file into a UserError that names the file.

    Args:
        path: of the file.
        private: leave out the library's own words, which may quote a patient's name (DICOM).
        verb: what was being done.
    """
    try:
        with _quiet:
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file; check the path") from None
    except MemoryError as error:
        raise UserError(f"{path}: too big for the memory of this machine; cut the image") from error
    except Exception as error:
        said = type(error).__name__
        if not private and "SimpleITK" not in str(error):  # which tells where it was compiled
            said += ": " + " ".join(str(error).split())[:200]
        advice = _BROKEN if verb == "read" and not isinstance(error, PermissionError) else _ACCESS
        message = f"{path}: cannot be {verb} ({said}); {advice}"
        raise UserError(message) from (None if private else error)


_BROKEN = "the file may be cut short, damaged or of another format than its name says"
_ACCESS = "check that there is permission, and space on the disk"
