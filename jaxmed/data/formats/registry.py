"""Which module reads and writes which format, by the suffix of a file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from jaxmed.data.formats import common
from jaxmed.types import UserError

FORMATS = {
    ".ome.tiff": "tiff",
    ".ome.tif": "tiff",
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "itk",
    ".nhdr": "itk",
    ".mha": "itk",
    ".mhd": "itk",
    ".png": "picture",
    ".jpeg": "picture",
    ".jpg": "picture",
    ".bmp": "picture",
    ".tiff": "tiff",
    ".tif": "tiff",
    ".dicom": "dicom",
    ".dcm": "dicom",
    ".npy": "npy",
    ".npz": "npy",
}
"""Longest suffix first, so that the first match is the right one."""

CUT_FORMATS = ("tiff", "npy", "nifti")
"""Formats that read a region without reading all."""

KINDS = {"png": "picture", "jpeg": "picture", "bmp": "picture", "nrrd": "itk", "metaimage": "itk"}
"""Formats of the kinds of image that are not called by their own name."""


def suffix_of(path: Path) -> str:
    """The suffix of a file that names its format, or ""."""
    name = path.name.lower()
    return next((end for end in FORMATS if name.endswith(end) and name != end), "")


def module_of(name: str) -> ModuleType:
    """The module of a format, imported when it is first needed: the libraries are heavy."""
    if name == "nifti":
        from jaxmed.data.formats import nifti

        return nifti
    if name == "itk":
        from jaxmed.data.formats import itk

        return itk
    if name == "picture":
        from jaxmed.data.formats import picture

        return picture
    if name == "tiff":
        from jaxmed.data.formats import tiff

        return tiff
    if name == "npy":
        from jaxmed.data.formats import npy

        return npy
    from jaxmed.data.formats import dicom

    return dicom


def format_of(path: Path) -> str:
    """The format of a file, by its name, or where that says nothing by how it begins.

    Raises:
        UserError: there is no such file, or it is of no known format.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.is_dir():
        return "dicom"
    name = FORMATS.get(suffix_of(path))
    if name is None and common.starts_as_dicom(path):
        return "dicom"
    if name is None:
        raise UserError(
            f"{path}: format not known; expected one of {' '.join(sorted(FORMATS))}, or DICOM"
        )
    return name
