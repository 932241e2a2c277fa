"""PNG, JPEG and BMP pictures, through Pillow; colour PNG of 16 bits through imagecodecs.

JPEG files that ask to be turned (EXIF orientation) are left as stored, because annotations are
drawn on the stored pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL.Image
import PIL.ImageFile

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.grid import Grid
from jaxmed.types import UserError

_KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "BMP": "bmp"}
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I": 1, "F": 1, "P": 3}
_CHANNELS |= {"RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3, "RGBX": 3}


def _png_header(path: Path) -> tuple[int, int] | None:
    """Bits a sample and colour type of a PNG file, or None of another file."""
    with open(path, "rb") as stream:
        start = stream.read(26)
    return (start[24], start[25]) if start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) > 25 else None


def _open(path: Path) -> Any:
    """The picture with its header read; pixels are not."""
    if PIL.ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError(
            f"{path}: not read while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which makes up "
            "missing pixels; set it to False"
        )
    try:
        picture = PIL.Image.open(path, formats=("PNG", "JPEG", "BMP"))
    except PIL.Image.DecompressionBombError:
        raise UserError(
            f"{path}: more than {2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)} pixels, the limit of this "
            "format; save it as TIFF or cut it into tiles"
        ) from None
    if picture.mode not in _CHANNELS:
        raise UserError(f"{path}: pixels are of mode {picture.mode}; save it as gray or RGB")
    return picture


def grid(path: Path) -> Grid:
    """Of (rows, cols, channels), from the header alone; opacity is no channel."""
    with _open(path) as picture:
        shape = (picture.height, picture.width, _CHANNELS[picture.mode])
        return Grid(shape, np.ones(2, np.float32))


def _deep_colour(path: Path) -> np.ndarray:
    """Pixels of a 16-bit PNG with several channels, which Pillow would cut to 8 bits."""
    pixels = imagecodecs.png_decode(path.read_bytes())
    return np.atleast_3d(pixels)


def _pixels(path: Path, picture: Any, indices: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels (rows, cols, channels) and notes."""
    bits, colour = _png_header(path) or (8, 0)
    picture.load()  # always: checks that the file is whole
    if bits == 16 and colour in (2, 4, 6):
        deep = _deep_colour(path)
        return common.drop_alpha(deep) if colour in (4, 6) else (deep, ())
    if picture.mode == "P" and indices:
        return np.asarray(picture)[..., None], ()
    if picture.mode == "1":
        bits, picture = 1, picture.convert("L")
    if picture.mode == "L" and bits in (1, 2, 4):
        if indices:
            return np.asarray(picture)[..., None] // (255 // (2**bits - 1)), ()
        return np.asarray(picture)[..., None], (f"{bits}-bit gray, spread over 0 to 255",)
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode in ("CMYK", "YCbCr", "RGBX"):
        note = f"converted from {picture.mode} to RGB"
        return np.asarray(picture.convert("RGB")), (note,)
    array = np.asarray(picture)
    if picture.mode in ("LA", "RGBA"):
        return common.drop_alpha(array)
    return np.atleast_3d(array), ()


def read(path: Path, *, max_voxels: int, indices: bool) -> Image:
    """Read a picture; `indices` keeps the numbers of a palette instead of its colours."""
    with _open(path) as picture:
        common.check_size(
            path, (picture.height, picture.width, len(picture.getbands())), max_voxels
        )
        array, notes = _pixels(path, picture, indices)
        if (several := getattr(picture, "n_frames", 1)) > 1:
            notes = (f"holds {several} pictures; the first is used", *notes)
        kind = _KINDS[picture.format]
    array, rounded = common.as_supported(array, path)
    return Image(
        array=np.ascontiguousarray(array),
        spacing=np.ones(2, np.float32),  # the resolution in such files is that of a printer
        affine=None,
        kind=kind,
        orientation=None,
        path=path,
        notes=notes + rounded,
    )


def mask_suffix(like: Image) -> str:
    """PNG, for JPEG would change the numbers."""
    del like
    return ".png"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a mask as gray PNG of 8 or 16 bits."""
    del like, names
    PIL.Image.fromarray(common.smallest_unsigned(mask, 2**16 - 1)).save(path, format="PNG")
