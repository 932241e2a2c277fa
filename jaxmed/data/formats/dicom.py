"""DICOM: single pictures, multi-frame volumes, and folders holding one series, through pydicom.

Errors and notes never quote the contents of a file, which may be a patient's name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.pixels

from jaxmed.data.formats import common
from jaxmed.data.formats import dicom_geometry as geometry
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.grid import Grid
from jaxmed.types import UserError

# What it logs may quote a patient's name; what matters ends in a UserError or a note.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

SUFFIXES = (".dcm", ".dicom")
_NO_IMAGE = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC", "ECG", "AU")
_LISTING = ["SeriesInstanceUID", "Modality", "ImagePositionPatient", "Rows", "SOPClassUID"]


@dataclasses.dataclass(frozen=True)
class Listed:
    """What listing a folder needs to know of one of its DICOM files."""

    path: Path
    series: str
    has_position: bool
    is_image: bool


def files_of(folder: Path) -> list[Path]:
    """The DICOM files directly in a folder, sorted by name; hidden ones are left out.

    A file named `.dcm` that is none is among them, for a broken slice must not go missing.
    """
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in SUFFIXES or common.starts_as_dicom(p))


def listed(path: Path) -> Listed:
    """Read the few header fields that listing needs."""
    with common.reading(path, private=True):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_LISTING))
        return Listed(
            path=path,
            series=str(header.get("SeriesInstanceUID", path.name)),
            has_position="ImagePositionPatient" in header,
            is_image="Rows" in header and str(header.get("Modality", "")) not in _NO_IMAGE,
        )


def patient(path: Path) -> str:
    """The patient's number in a file, or in the first file of a folder; "" where it has none."""
    file = next(iter(files_of(path)), path) if path.is_dir() else path
    with common.reading(file, private=True):
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID", "") or "").strip()


def _header(path: Path) -> Any:
    with common.reading(path, private=True):
        header = pydicom.dcmread(path, stop_before_pixels=True)
    if header.get("Modality") in _NO_IMAGE or not header.get("Rows"):
        raise UserError(f"{path}: this DICOM file holds no picture, or is cut short; leave it out")
    return header


def _headers(path: Path) -> dict[Path, Any]:
    """The header of a file, or of every picture in a folder, which must be of one series."""
    if not path.is_dir():
        return {path: _header(path)}
    found = [entry for entry in map(listed, files_of(path)) if entry.is_image]
    if not found:
        raise UserError(f"{path}: the folder holds no DICOM pictures; name a file, or another one")
    series = {entry.series: entry.path.name for entry in found}
    if len(series) > 1:
        raise UserError(
            f"{path}: holds {len(series)} DICOM series (of {', '.join(list(series.values())[:3])}"
            "...); give each series a folder of its own"
        )
    return {entry.path: _header(entry.path) for entry in found}


def _is_picture(headers: dict[Path, Any]) -> bool:
    """Whether all there is is one frame; else it is a volume."""
    return len(headers) == 1 and all(geometry.frames_of(header) == 1 for header in headers.values())


def _volume(headers: dict[Path, Any]) -> tuple[list[geometry.Frame], np.ndarray, tuple[str, ...]]:
    """The slices in order, their affine in the order (column, row, slice), and notes."""
    frames = [
        geometry.frame_of(file, header, number)
        for file, header in headers.items()
        for number in range(geometry.frames_of(header))
    ]
    geometry.check_alike(frames, headers)
    frames = geometry.in_order(frames)
    return frames, *geometry.affine_of(frames)


def _volume_shape(header: Any, frames: Sequence[geometry.Frame]) -> tuple[int, int, int]:
    return int(header.Columns), int(header.Rows), len(frames)


def grid(path: Path) -> Grid:
    """Of (rows, cols, channels) or (x, y, z, channels), from headers alone."""
    headers = _headers(path)
    header = next(iter(headers.values()))
    if _is_picture(headers):
        size = (int(header.Rows), int(header.Columns), geometry.channels_of(header))
        return Grid(size, _picture_spacing(header)[0])
    frames, affine, _ = _volume(headers)
    stored = _volume_shape(header, frames)
    orientation = common.orientation_of(affine, path)
    affine, spacing = common.ras_affine(affine, orientation, stored)
    spatial = common.ras_shape(stored, orientation)
    return Grid((*spatial, geometry.channels_of(header)), spacing, affine)


def _stored_range(header: Any) -> tuple[int, int]:
    """Smallest and largest value that the stored bits can hold."""
    bits = int(header.get("BitsStored", 16))
    if header.get("PixelRepresentation", 0):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _is_measured(header: Any) -> bool:
    """Whether values are of a physical scale, however they are to be shown."""
    return header.get("Modality") in ("CT", "PT") or header.get("RescaleType") == "HU"


def _rescaled(header: Any, pixels: np.ndarray, number: int) -> np.ndarray:
    """Stored values to those of the modality, such as Hounsfield units.

    The type follows from the header alone: uint8 or int16 where all possible results fit, else
    float32.
    """
    low, high = _stored_range(header)
    if header.get("PhotometricInterpretation") == "MONOCHROME1" and not _is_measured(header):
        # Low is white there. Once, and before rescaling: pydicom leaves it as stored.
        pixels = (low + high) - pixels.astype(np.int64)
    if "ModalityLUTSequence" in header:
        return np.asarray(pydicom.pixels.apply_modality_lut(pixels, header), np.float32)
    name = "PixelValueTransformationSequence"
    stated = geometry.frame_field(header, number, name, "RescaleSlope")
    slope = 1.0 if stated is None else float(stated)
    if slope == 0:
        raise UserError("RescaleSlope is 0, which makes all values one; repair the header")
    intercept = float(geometry.frame_field(header, number, name, "RescaleIntercept") or 0.0)
    if slope != 1 or intercept % 1:
        return (pixels.astype(np.float64) * slope + intercept).astype(np.float32)
    values = pixels.astype(np.int64) + int(intercept)
    # By the header, so that slices agree; by the values, for headers that lie about their bits.
    low = min(low + int(intercept), int(values.min()))
    high = max(high + int(intercept), int(values.max()))
    for dtype in (np.uint8, np.int16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.float32)


def _pixels(path: Path, header: Any) -> list[np.ndarray]:
    """All frames of a file, each (rows, cols, channels)."""
    count, channels = geometry.frames_of(header), geometry.channels_of(header)
    with common.reading(path, private=True):
        dataset = pydicom.dcmread(path)
        if not any(name in dataset for name in ("PixelData", "FloatPixelData")):
            raise UserError(f"{path}: the pixels are missing; the file may be cut short")
        stored = pydicom.pixels.pixel_array(dataset)  # colours become RGB
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            stored = pydicom.pixels.apply_color_lut(stored, dataset)
            stored = (stored >> 8).astype(np.uint8) if stored.dtype.itemsize > 1 else stored
        stored = stored.reshape(count, header.Rows, header.Columns, channels)
        if stored.dtype.kind == "f" or channels > 1:
            return [common.as_supported(frame, path)[0] for frame in stored]
        return [_rescaled(dataset, frame, number) for number, frame in enumerate(stored)]


def _picture_spacing(header: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """(row, column) millimetres of a single picture, and notes."""
    stated = geometry.frame_field(header, 0, "PixelMeasuresSequence", "PixelSpacing")
    if stated:
        return np.array(stated, np.float32), ()
    if header.get("ImagerPixelSpacing"):
        note = "the spacing is that at the X-ray detector; the body is magnified"
        return np.array(header.ImagerPixelSpacing, np.float32), (note,)
    return np.ones(2, np.float32), ()


def read(path: Path, *, max_voxels: int, indices: bool) -> Image:
    """Read a picture, a multi-frame volume, or the series in a folder."""
    del indices  # colours are colours here
    headers = _headers(path)
    file, header = next(iter(headers.items()))
    if _is_picture(headers):
        common.check_size(
            file, (header.Rows, header.Columns, geometry.channels_of(header)), max_voxels
        )
        spacing, notes = _picture_spacing(header)
        return Image(_pixels(file, header)[0], spacing, None, "dicom", None, file, notes)
    frames, affine, notes = _volume(headers)
    spatial = _volume_shape(header, frames)
    common.check_size(path, (*spatial, geometry.channels_of(header)), max_voxels)
    pixels = {file: _pixels(file, header) for file, header in headers.items()}
    array = np.stack([pixels[frame.path][frame.number] for frame in frames])
    array, _ = common.as_supported(array, path)
    orientation = common.orientation_of(affine, path)
    # (slice, row, column, channel) to (column, row, slice, channel), then to RAS
    array = common.to_ras(array.transpose(2, 1, 0, 3), orientation)
    affine, spacing = common.ras_affine(affine, orientation, spatial)
    array = np.ascontiguousarray(array)
    return Image(array, spacing, affine, "dicom", orientation, path, notes)


def mask_suffix(like: Image) -> str:
    """A DICOM segmentation object is a file."""
    del like
    return ".dcm"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a DICOM SEG that refers to the slices of `like`."""
    from jaxmed.data.formats import dicom_seg

    if like.orientation is None:
        dicom_seg.write(path, mask[None], [like.path], names, thickness=1.0)
        return
    headers = _headers(like.path)
    frames, affine, _ = _volume(headers)
    # (column, row, slice) to (slice, row, column)
    planes = common.from_ras(mask, like.orientation).transpose(2, 1, 0)
    files = [frame.path for frame in frames]
    if len(headers) == 1:  # a multi-frame file, whose own order is kept
        planes = planes[np.argsort([frame.number for frame in frames])]
        files = list(headers)
    thickness = round(float(np.linalg.norm(affine[:3, 2])), 6)
    dicom_seg.write(path, planes, files, names, thickness=thickness)
