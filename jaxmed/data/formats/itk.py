"""NRRD (`.nrrd`, `.nhdr`) and MetaImage (`.mha`, `.mhd`), 2-D and 3-D, through SimpleITK."""

from __future__ import annotations

import math
import re
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
_SPACES = {
    *("left-posterior-superior", "lps", "right-anterior-superior", "ras"),
    *("left-anterior-superior", "las"),
}
"""Of NRRD, those that ITK tells apart."""
_DECISIVE = {
    *("elementdatafile", "data file", "compresseddata", "encoding"),
    *("dimsize", "elementspacing", "transformmatrix", "rotation", "orientation"),
    *("offset", "position", "origin"),
    *("sizes", "spacings", "space", "space directions", "space origin"),
}
"""What must not be stated twice: which voxels, and where."""
_MILLIMETRES = {
    **{"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1e3, "nm": 1e-6},
    **{"um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3},
}


def _header(path: Path) -> Any:
    """A reader that has read the header: sizes are known, memory is not yet taken."""
    if not path.exists():
        raise FileNotFoundError(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    _data_names(path)  # refused where they lead elsewhere
    reader.ReadImageInformation()
    if reader.GetDimension() not in (2, 3):
        raise UserError(
            f"{path}: has {reader.GetDimension()} axes; expected 2 or 3, so split it into one "
            "image a file"
        )
    return reader


def _affine(reader: Any, unit: float) -> np.ndarray:
    """(4, 4) from voxel indices in the file's order to RAS+ millimetres (ITK's own is LPS+)."""
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(reader.GetSpacing()) * unit
    affine[:3, 3] = np.array(reader.GetOrigin()) * unit
    return _LPS_TO_RAS @ affine


def _unit(path: Path) -> tuple[float, tuple[str, ...]]:
    """Millimetres a unit of the header, which ITK does not look at, and notes; 1 where not said."""
    fields, _ = _fields(path)
    keys = ("distanceunits", "space units", "units")
    said = next((fields[key] for key in keys if fields.get(key)), "")
    words = {word for word in said.replace('"', " ").split() if word not in ("?", "none")}
    if not words:
        return 1.0, ()
    if len(words) > 1 or not words <= _MILLIMETRES.keys():
        return 1.0, (f"its unit of length, {' '.join(sorted(words))!r}, is taken for mm",)
    return _MILLIMETRES[words.pop()], ()


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a header as ITK takes them, and where it ends.

    Raises:
        UserError: one is stated twice, of which ITK and others may believe different ones.
    """
    fields: dict[str, str] = {}
    is_meta = path.suffix.lower() in _META
    with open(path, "rb") as stream:
        for line in stream:
            if not is_meta and not line.rstrip(b"\r\n"):  # ends a NRRD header
                break
            text = line.decode("latin-1").strip()
            # MetaIO takes either sign; in NRRD := is of free text, and # of a comment.
            key = re.split("[=:]", text, maxsplit=1)[0]
            sign, value = text[len(key) : len(key) + 1], text[len(key) + 1 :]
            if not is_meta and (sign == "=" or value.startswith("=") or text.startswith("#")):
                continue
            key, value = key.strip().lower(), value.strip()
            key = "data file" if key == "datafile" else key  # NRRD's two names of one field
            if fields.setdefault(key, value) != value and key in _DECISIVE:
                raise UserError(f"{path}: its header states {key} twice; get it anew")
            if is_meta and key == "elementdatafile":
                break
        return fields, stream.tell()


def _geometry_notes(path: Path) -> tuple[str, ...]:
    """Notes where the header of a volume leaves ITK to assume where and how large voxels are."""
    fields, _ = _fields(path)
    notes = []
    if path.suffix.lower() in _META:
        told = fields.keys() & {"transformmatrix", "rotation", "orientation"}
        sized = bool(fields.keys() & {"elementspacing", "elementsize"})
    else:
        told = fields.keys() & {"space", "space directions"}
        spacings = [word for word in fields.get("spacings", "").split() if word.lower() != "nan"]
        sized = "space directions" in fields or len(spacings) >= 3
        space = fields.get("space", "").lower().removesuffix("-time")
        if told and space not in _SPACES:
            said = f"its space, {fields['space']!r}," if space else "its space, of no name,"
            notes.append(f"{said} is taken for left-posterior-superior")
    if not told:
        notes.append("the header gives no orientation; left, posterior, superior is assumed")
    if not sized:
        notes.append(common.UNSIZED)
    return tuple(notes)


def _data_name(fields: Mapping[str, str]) -> str:
    return fields.get("elementdatafile") or fields.get("data file") or ""


def _data_names(path: Path) -> list[str]:
    """The files of the voxels, as the header names them; none where they follow it.

    Raises:
        UserError: a name leads out of the header's folder.
    """
    fields, offset = _fields(path)
    name = _data_name(fields)
    if name.lower() in ("", "local"):
        return []
    names = [name]
    if name.split()[0].lower() == "list":
        with open(path, "rb") as stream:
            stream.seek(offset)
            lines = stream.read(_CHUNK).decode("latin-1").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    return [common.safe_path(name, where=str(path)) for name in names]


def files(path: Path) -> list[Path]:
    """The header, and the files that hold the voxels where these are others.

    Of a pattern that stands for several files, all that lie in its folder.
    """
    named = [path.parent / name for name in _data_names(path)]
    if all(file.is_file() for file in named):
        return [path, *named]
    return [path, *sorted(beside for beside in named[0].parent.iterdir() if beside.is_file())]


def _compressed_data(path: Path) -> tuple[Path, int] | None:
    """The file and offset at which gzip or zlib data begin; None where they are not compressed."""
    fields, offset = _fields(path)
    is_packed = fields.get("encoding", "").lower() in ("gzip", "gz")
    said = fields.get("compresseddata", "")
    if said[:1] not in ("", *"TtFfNn10"):  # of which MetaIO takes the first letter
        raise UserError(f"{path}: CompressedData is {said!r}; expected True or False")
    if not is_packed and said[:1] not in tuple("Tt1"):
        return None
    name = _data_name(fields)
    if name.lower() in ("", "local"):
        return path, offset
    skips = any(fields.get(f"{what} skip", "0") != "0" for what in ("line", "byte"))
    apart = path.parent / name
    return (apart, 0) if apart.is_file() and not skips else None


def _check_whole(path: Path, claimed: int) -> None:
    """Make sure that there are so many bytes of voxels; unpack compressed ones once to nowhere.

    ITK itself fills what it cannot unpack with what happened to be in memory, and looks at no
    checksum; for what is not compressed it takes the memory before it looks.
    """
    found = _compressed_data(path)
    there = sum(file.stat().st_size for file in files(path))
    fields, _ = _fields(path)
    encoding = fields.get("encoding", "raw").lower()
    apart = _data_name(fields).lower() not in ("", "local")
    if encoding in ("gzip", "gz") and found is None and apart:
        raise UserError(
            f"{path}: its compressed voxels lie in several files, or behind a line skip or byte "
            "skip, where nothing tells whether they are whole; save them as one file"
        )
    if encoding in ("raw", "gzip", "gz"):
        common.check_room(path, claimed, there, packed=found is not None)
    if found is None:
        return
    count = 0
    unpacker = zlib.decompressobj(wbits=47)  # 47: zlib or gzip, as the data begin
    with open(found[0], "rb") as stream:
        stream.seek(found[1])
        while not unpacker.eof:
            packed = unpacker.unconsumed_tail or stream.read(_CHUNK)
            unpacked = len(unpacker.decompress(packed, _CHUNK))
            count += unpacked
            if not unpacked and not packed:
                break
        length = stream.tell() - found[1] - len(unpacker.unused_data)
    common.check_room(path, claimed, count, packed=False)
    if not unpacker.eof:  # damage may lengthen the stream, so that its checksum is never reached
        raise UserError(
            f"{path}: its compressed voxels are damaged (no end, no checksum); get it anew"
        )
    if path.suffix.lower() in _META and fields.get("compresseddatasize") != str(length):
        # ITK reads as many bytes as this says, and goes on with what was in memory otherwise.
        raise UserError(
            f"{path}: CompressedDataSize is {fields.get('compresseddatasize', 'missing')}, there "
            f"are {length} bytes; save it anew"
        )


def grid(path: Path) -> Grid:
    """Of (rows, cols, channels) or (x, y, z, channels), from the header alone."""
    reader = _header(path)
    size, channels = tuple(reader.GetSize()), int(reader.GetNumberOfComponents())
    unit, _ = _unit(path)
    if len(size) == 2:
        spacing = np.array(reader.GetSpacing()[::-1], np.float32) * np.float32(unit)
        return Grid((*size[::-1], channels), spacing)
    affine = _affine(reader, unit)
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
    pixel = SimpleITK.Image([1] * len(size), reader.GetPixelID(), channels)
    _check_whole(path, math.prod(size) * channels * pixel.GetSizeOfPixelComponent())
    # A copy: a view would look into memory that ends with the ITK image.
    stored = SimpleITK.GetArrayFromImage(reader.Execute())
    values, notes = common.as_supported(stored.reshape(*size[::-1], channels), path)
    unit, unknown = _unit(path)
    notes += unknown + (_geometry_notes(path) if len(size) == 3 else ())
    if len(size) == 2:
        spacing = np.array(reader.GetSpacing()[::-1], np.float32) * np.float32(unit)
        return Image(values, spacing, None, kind, None, path, notes)
    affine = _affine(reader, unit)
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
