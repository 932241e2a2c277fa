"""Read and write one image of any format: pixels, spacing, place in space, and what is odd.

Pictures are (rows, cols, channels); volumes are (x, y, z, channels) in RAS order: x grows to the
patient's right, y to the front, z upwards. Axes are only flipped and permuted, never resampled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from jaxmed.data.formats import common
from jaxmed.data.formats.common import MAX_VOXELS, Image
from jaxmed.data.formats.grid import Grid
from jaxmed.data.formats.registry import (
    CUT_FORMATS,
    FORMATS,
    format_of,
    module_of,
    suffix_of,
)
from jaxmed.data.image_writing import write_image, write_mask, write_mask_rows
from jaxmed.types import Region, UserError

__all__ = [
    "MAX_VOXELS",
    "Image",
    "image_files",
    "image_grid",
    "image_shape",
    "image_stem",
    "is_image",
    "list_images",
    "patient_digest",
    "privacy",
    "read_image",
    "read_region",
    "reads_regions",
    "write_image",
    "write_mask",
    "write_mask_rows",
]


def read_image(
    path: str | os.PathLike[str],
    *,
    channels: int | None = None,
    indices: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> Image:
    """Read an image file, or a folder that holds one DICOM series.

    Args:
        path: PNG, JPEG, BMP, TIFF, NIfTI, NRRD, MetaImage, DICOM, `.npy`, or `.npz` that holds
            one array or one called `image`.
        channels: convert to this many; 1 from colours (luminance) or 3 from gray.
        indices: of a picture with a palette, give the numbers (of a label mask), not the colours.
        max_voxels: largest number of values accepted, checked before memory is taken.

    Returns:
        The image, of uint8, int16 or float32; NaN and infinite values are kept as stored.

    Raises:
        UserError: the file is missing, damaged, cut short, too big or of an unknown format.
    """
    return read_region(path, None, channels=channels, indices=indices, max_voxels=max_voxels)


def read_region(
    path: str | os.PathLike[str],
    region: Region | None,
    *,
    channels: int | None = None,
    indices: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> Image:
    """Read a part of an image: the same as that part of what `read_image` gives.

    Of TIFF only the tiles or strips that the region touches are decoded; `.npy`, and NIfTI that is
    neither compressed nor scaled, are mapped. Other formats are read whole and cut.

    Args:
        path: as of `read_image`, as are the options.
        region: one slice a spatial axis, without steps; None is the whole image.
        channels: convert to this many.
        indices: numbers of a palette instead of its colours.
        max_voxels: largest number of values of the region; of the whole image where the format
            must be read whole.

    Returns:
        The part, with the affine of its own first voxel; its notes are of the part alone.

    Raises:
        UserError: the file is missing, damaged, cut short, too big or of an unknown format.
        ValueError: the region is empty, has steps or another number of axes.
    """
    path = Path(path)
    name = format_of(path)
    module, options = module_of(name), {"max_voxels": max_voxels, "indices": indices}
    window = region
    if region is not None:
        # Checked here, as what goes wrong below is the fault of the file.
        shape = image_shape(path)
        if min(shape) <= 0:
            raise UserError(f"{path}: the image is empty, shape {shape}; leave out the file")
        window = common.window_of(shape[:-1], region)
    with common.reading(path, private=name == "dicom"):
        image: Image
        if name in CUT_FORMATS:
            image = module.read(path, region=window, **options)
        else:
            image = _cut(module.read(path, **options), window)
        if not image.array.flags.writeable:
            image = dataclasses.replace(image, array=image.array.copy())
    return image if channels is None else _with_channels(image, channels)


def _cut(image: Image, window: Region | None) -> Image:
    if window is None:
        return image
    return dataclasses.replace(
        image,
        array=np.ascontiguousarray(image.array[window]),
        affine=common.affine_of_region(image.affine, window),
    )


def _with_channels(image: Image, channels: int) -> Image:
    found = image.array.shape[-1]
    if found == channels:
        return image
    if found == 1 and channels == 3:
        return dataclasses.replace(image, array=np.repeat(image.array, 3, axis=-1))
    if found == 3 and channels == 1:
        return dataclasses.replace(image, array=_luminance(image.array))
    raise UserError(
        f"{image.path}: has {found} channels, which cannot become {channels}; only gray and "
        "colour (1 and 3) convert, so set the number of channels to what the files have"
    )


def _luminance(array: np.ndarray) -> np.ndarray:
    """Gray of RGB by ITU-R BT.601; gray stored as RGB comes back exactly."""
    gray = array.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    if array.dtype.kind in "iu":
        gray = np.rint(gray)
    return gray.astype(array.dtype)[..., None]


def reads_regions(path: str | os.PathLike[str]) -> bool:
    """Whether `read_region` reads few rows of this file at the cost of few rows."""
    path = Path(path)
    name = format_of(path)
    if name != "tiff":
        return name in CUT_FORMATS
    with common.reading(path):
        return bool(module_of(name).reads_regions(path))


def image_grid(path: str | os.PathLike[str]) -> Grid:
    """Shape, spacing and affine that `read_image` would give, from the header alone."""
    path = Path(path)
    name = format_of(path)
    with common.reading(path, private=name == "dicom"):
        return module_of(name).grid(path)


def image_shape(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The shape (*spatial, channels) that `read_image` would give, from the header alone."""
    return image_grid(path).shape


def patient_digest(path: str | os.PathLike[str]) -> str:
    """What tells the patient of a DICOM file or series from others, but not who it is.

    "" where the file names none, cannot be read, or is of another format.
    """
    path = Path(path)
    if not path.is_dir() and not _is_dicom(path):
        return ""
    from jaxmed.data.formats import dicom

    try:
        name = dicom.patient(path)
    except UserError:
        return ""
    return hashlib.sha256(name.encode()).hexdigest()[:16] if name else ""


def privacy(path: str | os.PathLike[str]) -> tuple[Counter[str], bool]:
    """In how many files of a DICOM image each identifying tag is filled, and if it has a text.

    Never the values. Nothing of other formats, which have no tags.

    Raises:
        UserError: a file cannot be read.
    """
    path = Path(path)
    if not path.is_dir() and not _is_dicom(path):
        return Counter(), False
    from jaxmed.data.formats import dicom, dicom_privacy

    return dicom_privacy.privacy(dicom.files_of(path) if path.is_dir() else [path])


def image_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that an image lies in: the slices of a folder, or a header and its voxels.

    Raises:
        OSError: where one cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(path.iterdir())
    if suffix_of(path) in (".mhd", ".nhdr"):
        from jaxmed.data.formats import itk

        return itk.files(path)
    return [path]


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image by its name or is DICOM, or a folder directly holds DICOM."""
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any(_is_dicom(child) for child in path.iterdir() if child.is_file())
    return path.is_file() and (bool(suffix_of(path)) or common.starts_as_dicom(path))


def image_stem(path: str | os.PathLike[str]) -> str:
    """The name without folder and image suffix.

    >>> image_stem("scans/a.nii.gz"), image_stem("a.b.png"), image_stem("1.2.840")
    ('a', 'a.b', '1.2.840')
    """
    path = Path(path)
    return path.name[: len(path.name) - len(suffix_of(path))]


def _is_dicom(path: Path) -> bool:
    """By its name, or where that says nothing, by how it begins."""
    known = FORMATS.get(suffix_of(path))
    return known == "dicom" or (known is None and common.starts_as_dicom(path))


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """All images in a folder and its subfolders, sorted.

    Hidden files and folders are left out, as are DICOM files without a picture (reports,
    segmentations). A folder with the slices of one DICOM series is one image, listed by the
    folder.

    Raises:
        UserError: the folder is missing, or mixes the slices of several DICOM series.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    images: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = sorted(Path(place) / name for name in names if not name.startswith("."))
        named = [path for path in files if FORMATS.get(suffix_of(path), "dicom") != "dicom"]
        images += named + _dicom_images(Path(place), [p for p in files if _is_dicom(p)])
    return sorted(images)


def _dicom_images(folder: Path, files: list[Path]) -> list[Path]:
    """The folder where its files are the slices of one series, else the files themselves."""
    if not files:
        return []
    from jaxmed.data.formats import dicom

    pictures = [found for found in map(dicom.listed, files) if found.is_image]
    slices: dict[str, int] = {}
    for found in pictures:
        # Views of an X-ray may share a series too, but lie nowhere in space.
        if found.has_position:
            slices[found.series] = slices.get(found.series, 0) + 1
    if all(count == 1 for count in slices.values()):
        return [found.path for found in pictures]
    if len(slices) == 1 and sum(slices.values()) == len(pictures):
        return [folder]
    raise UserError(
        f"{folder}: mixes slices of {len(slices)} DICOM series with {len(pictures)} pictures in "
        "all; give each series a folder of its own"
    )
