"""NRRD (`.nrrd`, `.nhdr`) and MetaImage (`.mha`, `.mhd`), 2-D and 3-D, through SimpleITK."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.grid import Grid
from jaxmed.types import UserError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_META = (".mha", ".mhd")
_CHUNK = 2**20


def _header(path: Path) -> Any:
    """A reader that has read the header: sizes are known, memory is not yet taken."""
    if not path.exists():
        raise FileNotFoundError(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetDimension() not in (2, 3):
        raise UserError(
            f"{path}: has {reader.GetDimension()} axes; expected 2 or 3, so split it into one "
            "image a file"
        )
    return reader


def _affine(reader: Any) -> np.ndarray:
    """(4, 4) from voxel indices in the file's order to RAS+ millimetres (ITK's own is LPS+)."""
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(reader.GetSpacing())
    affine[:3, 3] = reader.GetOrigin()
    return _LPS_TO_RAS @ affine


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a header, and where it ends."""
    fields: dict[str, str] = {}
    with open(path, "rb") as stream:
        for line in stream:
            text = line.decode("latin-1").strip()
            key, _, value = text.partition("=" if path.suffix.lower() in _META else ":")
            fields[key.strip().lower()] = value.strip()
            # A blank line ends a NRRD header, this key that of MetaImage.
            if not text or "elementdatafile" in fields:
                break
        return fields, stream.tell()


def _data_name(fields: Mapping[str, str]) -> str:
    return fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or ""


def files(path: Path) -> list[Path]:
    """The header, and the file that holds the voxels where that is another.

    Of names that stand for several files, all that lie beside the header.
    """
    name = _data_name(_fields(path)[0])
    if name.lower() in ("", "local"):
        return [path]
    data = path.parent / Path(name).name
    if data.is_file():
        return [path, data]
    return sorted(beside for beside in path.parent.iterdir() if beside.is_file())


def _compressed_data(path: Path) -> tuple[Path, int] | None:
    """The file and offset at which gzip or zlib data begin; None where they are not compressed."""
    fields, offset = _fields(path)
    is_packed = fields.get("encoding") in ("gzip", "gz")
    if not is_packed and fields.get("compresseddata", "").lower() != "true":
        return None
    name = _data_name(fields)
    if name.lower() in ("", "local"):
        return path, offset
    skips = any(fields.get(f"{what} skip", "0") != "0" for what in ("line", "byte"))
    apart = path.parent / name
    return (apart, 0) if apart.is_file() and not skips else None


def _check_compressed(path: Path) -> None:
    """Unpack compressed voxels once to nowhere, which raises on damage.

    ITK itself fills what it cannot unpack with what happened to be in memory, and looks at no
    checksum.
    """
    found = _compressed_data(path)
    if found is None:
        return
    unpacker = zlib.decompressobj(wbits=47)  # 47: zlib or gzip, as the data begin
    with open(found[0], "rb") as stream:
        stream.seek(found[1])
        while not unpacker.eof:
            packed = unpacker.unconsumed_tail or stream.read(_CHUNK)
            if not unpacker.decompress(packed, _CHUNK) and not packed:
                raise UserError(f"{path}: the file is cut short; copy or export it again")


def grid(path: Path) -> Grid:
    """Of (rows, cols, channels) or (x, y, z, channels), from the header alone."""
    reader = _header(path)
    size, channels = tuple(reader.GetSize()), int(reader.GetNumberOfComponents())
    if len(size) == 2:
        return Grid((*size[::-1], channels), np.array(reader.GetSpacing()[::-1], np.float32))
    affine = _affine(reader)
    orientation = common.orientation_of(affine, path)
    affine, spacing = common.ras_affine(affine, orientation, size)
    return Grid((*common.ras_shape(size, orientation), channels), spacing, affine)


def read(path: Path, *, max_voxels: int, indices: bool) -> Image:
    """Read an image; the axes of a volume are flipped and permuted to RAS, never resampled."""
    del indices  # values are numbers already
    reader = _header(path)
    size, channels = tuple(reader.GetSize()), int(reader.GetNumberOfComponents())
    common.check_size(path, (*size, channels), max_voxels)
    kind = "metaimage" if path.suffix.lower() in _META else "nrrd"
    _check_compressed(path)
    # A copy: a view would look into memory that ends with the ITK image.
    stored = SimpleITK.GetArrayFromImage(reader.Execute())
    values, notes = common.as_supported(stored.reshape(*size[::-1], channels), path)
    if len(size) == 2:
        spacing = np.array(reader.GetSpacing()[::-1], np.float32)
        return Image(values, spacing, None, kind, None, path, notes)
    affine = _affine(reader)
    orientation = common.orientation_of(affine, path)
    # (z, y, x, channels) to the file's (i, j, k, channels), then to RAS
    array = common.to_ras(values.transpose(2, 1, 0, 3), orientation)
    affine, spacing = common.ras_affine(affine, orientation, size)
    array = np.ascontiguousarray(array)
    return Image(array, spacing, affine, kind, orientation, path, notes)


def mask_suffix(like: Image) -> str:
    """One file, even where the image has a header and voxels apart."""
    return ".nrrd" if like.kind == "nrrd" else ".mha"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a mask with the origin, spacing and directions of `like`."""
    del names
    _write(path, common.smallest_unsigned(mask)[..., None], like)


def write_image(path: Path, array: np.ndarray, like: Image) -> None:
    """Write float32 (*spatial, channels) with the origin, spacing and directions of `like`."""
    _write(path, array, like)


def _write(path: Path, values: np.ndarray, like: Image) -> None:
    reader = _header(like.path)
    if like.orientation is not None:
        values = common.from_ras(values, like.orientation).transpose(2, 1, 0, 3)
    is_vector = values.shape[-1] > 1
    image = SimpleITK.GetImageFromArray(values if is_vector else values[..., 0], isVector=is_vector)
    image.SetOrigin(reader.GetOrigin())
    image.SetSpacing(reader.GetSpacing())
    image.SetDirection(reader.GetDirection())
    SimpleITK.WriteImage(image, str(path), useCompression=True)
