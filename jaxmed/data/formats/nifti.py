"""NIfTI-1 and NIfTI-2 volumes, `.nii` and `.nii.gz`, through nibabel."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from io import IOBase
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.grid import Grid
from jaxmed.types import Region, UserError

_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}


def _spatial_and_channels(path: Path, header: Any) -> tuple[tuple[int, ...], int]:
    """Spatial shape (3) and number of channels from a header.

    Channels are the three fields of a colour voxel, a fourth axis (the modalities of the Medical
    Segmentation Decathlon) or the fifth axis of a vector image, whose fourth is 1.
    """
    shape = tuple(int(size) for size in header.get_data_shape())
    extra = shape[3:]
    if len(extra) == 2 and extra[0] == 1:
        extra = extra[1:]
    fields = header.get_data_dtype().names
    if len(extra) > 1 or (extra and (extra[0] > common.MAX_CHANNELS or fields)):
        raise UserError(
            f"{path}: shape {shape} has a time or vector axis too long to be channels (at most "
            f"{common.MAX_CHANNELS}); split it into one volume a file"
        )
    channels = len(fields) if fields else (extra[0] if extra else 1)
    return (shape + (1, 1, 1))[:3] if len(shape) < 3 else shape[:3], channels


def _affine(image: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine in millimetres, and notes where the header leaves it open."""
    header = image.header
    notes: tuple[str, ...] = ()
    if not header["sform_code"] and not header["qform_code"]:
        notes = ("the header gives no orientation; nibabel's default, left to right, is assumed",)
    both = header["sform_code"] and header["qform_code"]
    if both and not np.allclose(header.get_sform(), header.get_qform(), rtol=1e-3, atol=1e-3):
        notes = ("its two statements of place, sform and qform, differ; sform is taken",)
    unit = _MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    affine = np.array(image.affine, np.float64)
    affine[:3] *= unit
    return affine, notes


def _stream(path: Path) -> IOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore


def _image(stream: IOBase) -> Any:
    """The header and, not yet read, the voxels of an open stream."""
    size = stream.read(4)
    stream.seek(0)
    is_second = 540 in (int.from_bytes(size, "little"), int.from_bytes(size, "big"))
    return (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_stream(stream)


def grid(path: Path) -> Grid:
    """Of (x, y, z, channels), from the header alone."""
    with _stream(path) as stream:
        image = _image(stream)
        spatial, channels = _spatial_and_channels(path, image.header)
        affine, _ = _affine(image)
        orientation = common.orientation_of(affine, path)
        affine, spacing = common.ras_affine(affine, orientation, spatial)
        return Grid((*common.ras_shape(spatial, orientation), channels), spacing, affine)


def _values(image: Any) -> np.ndarray:
    """The voxels, scaled where the header says so, else in their own type."""
    slope, inter = image.dataobj.slope, image.dataobj.inter
    if slope == 1 and inter == 0:
        values = np.asanyarray(image.dataobj.get_unscaled())
    else:
        values = np.asarray(image.dataobj, np.float32)
    if values.dtype.names:
        values = np.stack([values[name] for name in values.dtype.names], axis=-1)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _bytes_a_number(header: Any) -> int:
    dtype = header.get_data_dtype()
    return dtype.itemsize // len(dtype.names or "1")


def _is_mappable(path: Path, image: Any) -> bool:
    """Whether voxels lie in the file as they are, so that a part can be read alone."""
    return path.suffix.lower() != ".gz" and image.dataobj.slope == 1 and image.dataobj.inter == 0


def read(path: Path, *, max_voxels: int, indices: bool, region: Region | None = None) -> Image:
    """Read a volume, or a region of it; the axes are flipped and permuted to RAS, never resampled.

    Compressed or scaled voxels are all unpacked for a region too.
    """
    del indices  # values are numbers already
    with _stream(path) as stream:
        image = _image(stream)
        spatial, channels = _spatial_and_channels(path, image.header)
        affine, notes = _affine(image)
        orientation = common.orientation_of(affine, path)
        window = common.window_of(common.ras_shape(spatial, orientation), region)
        taken = common.region_shape(window) if _is_mappable(path, image) else spatial
        common.check_size(path, (*taken, channels), max_voxels)
        claimed = math.prod(spatial) * channels * _bytes_a_number(image.header)
        is_packed = path.suffix.lower() == ".gz"
        common.check_room(path, claimed, path.stat().st_size, packed=is_packed)
        values = _values(image).reshape(*spatial, channels)
        if region is not None:  # of a mapped file, only what is copied is read
            values = common.from_ras(
                np.array(common.to_ras(values, orientation)[window]), orientation
            )
        while stream.read(2**20):  # to the end: the checksum of a gzip file comes last
            pass
    values, rounded = common.as_supported(values, path)
    affine, spacing = common.ras_affine(affine, orientation, spatial)
    return Image(
        array=np.ascontiguousarray(common.to_ras(values, orientation)),
        spacing=spacing,
        affine=common.affine_of_region(affine, window),
        kind="nifti",
        orientation=orientation,
        path=path,
        notes=notes + rounded,
    )


def mask_suffix(like: Image) -> str:
    """As the image: compressed or not; of another format compressed."""
    is_plain = like.kind == "nifti" and like.path.suffix.lower() != ".gz"
    return ".nii" if is_plain else ".nii.gz"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a mask with the header of `like`: sform, qform and their codes are kept bit for bit."""
    del names
    assert like.orientation is not None
    _write(path, common.smallest_unsigned(common.from_ras(mask, like.orientation)), like)


def write_image(path: Path, array: np.ndarray, like: Image) -> None:
    """Write float32 (x, y, z, channels) with the header of `like`, or if it is DICOM its affine."""
    if like.kind != "nifti":
        nibabel.Nifti1Image(array, like.affine).to_filename(path)
        return
    assert like.orientation is not None
    _write(path, common.from_ras(array, like.orientation), like)


def _write(path: Path, values: np.ndarray, like: Image) -> None:
    """Write values in the order of the file `like`, whose header is kept but for its texts."""
    with _stream(like.path) as stream:
        original = _image(stream)
    header = original.header.copy()
    header.extensions.clear()  # these and the texts below may hold a patient's name
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        if field in header:
            header[field] = b""
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = 0
    header.set_data_dtype(values.dtype)
    shape = values.shape if values.ndim == 4 else header.get_data_shape()[:3]
    header.set_data_shape(shape)
    if len(shape) == 4:
        header["pixdim"][4] = 1
    # No affine is handed over, so that nibabel has no reason to rewrite the header's.
    type(original)(values.reshape(shape), None, header).to_filename(path)
