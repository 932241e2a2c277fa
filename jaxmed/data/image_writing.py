"""Write masks and numbers in the format and geometry of the image they belong to."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.registry import KINDS, module_of, suffix_of
from jaxmed.types import UserError


def write_mask(
    path: str | os.PathLike[str], mask: np.ndarray, like: Image, *, names: Sequence[str] = ()
) -> Path:
    """Write a mask in the format and geometry of the image it belongs to.

    Args:
        path: where to; a known suffix is replaced by, and a missing one completed to, that of the
            format: NIfTI, NRRD, MetaImage, TIFF and `.npy` stay, PNG, JPEG and BMP become PNG,
            DICOM becomes DICOM SEG, `.npz` becomes `.npy`.
        mask: (*spatial) whole numbers from 0, on the grid of `like.array`.
        like: the image as read; its file must still be there, for its header is copied.
        names: of the numbers from 0, for formats that can hold them (DICOM SEG).

    Returns:
        The path written.

    Raises:
        UserError: the mask does not fit the image or format, or would replace the image.
    """
    mask, path = np.asarray(mask), Path(path)
    if mask.shape != like.array.shape[:-1]:
        raise UserError(
            f"{path}: mask has shape {mask.shape}, its image {like.array.shape[:-1]}; put it back "
            "on the grid of the image first"
        )
    mask = mask.astype(np.uint8) if mask.dtype == bool else mask
    module = module_of(KINDS.get(like.kind, like.kind))
    with _new_file(path, like, module.mask_suffix(like)) as (path, part), _writing(path, like):
        module.write_mask(part, mask, like, names)
    return path


def write_image(path: str | os.PathLike[str], array: np.ndarray, like: Image) -> Path:
    """Write numbers, such as probabilities, in the geometry of the image they belong to.

    Args:
        path: where to; a known suffix is replaced by, and a missing one completed to, that of the
            format: NIfTI, NRRD, MetaImage and `.npy` stay, PNG, JPEG, BMP and TIFF become TIFF;
            DICOM becomes NIfTI (its axes in RAS order), or TIFF where it is one picture.
        array: (*spatial, channels), stored as float32, on the grid of `like.array`.
        like: the image as read; its file must still be there, for its header is copied.

    Returns:
        The path written.

    Raises:
        UserError: the array does not fit the image, or would replace it.
    """
    array, path = np.asarray(array, np.float32), Path(path)
    if array.shape[:-1] != like.array.shape[:-1]:
        raise UserError(
            f"{path}: array has shape {array.shape}, its image {like.array.shape}; put it back "
            "on the grid of the image first"
        )
    kind = KINDS.get(like.kind, like.kind)
    if kind == "dicom":
        kind = "nifti" if like.affine is not None else "tiff"
    module = module_of("tiff" if kind == "picture" else kind)
    with _new_file(path, like, module.mask_suffix(like)) as (path, part), _writing(path, like):
        module.write_image(part, array, like)
    return path


def write_mask_rows(
    path: str | os.PathLike[str],
    rows: Iterable[np.ndarray],
    like: Image,
    *,
    shape: Sequence[int],
    dtype: type[np.unsignedinteger[Any]],
    names: Sequence[str] = (),
) -> Path:
    """Write the mask of a picture as its rows come; of TIFF, only a few of them are held.

    Masks in other formats are gathered in `dtype` first.

    Args:
        path: as of `write_mask`.
        rows: (rows, columns) of whole numbers from 0, in order, in all `shape`.
        like: a region of the image, such as its first pixel; its file must still be there.
        shape: (rows, columns) of the image.
        dtype: that holds all numbers.
        names: of the numbers from 0, for formats that can hold them.

    Returns:
        The path written.

    Raises:
        UserError: the disk is full, or the mask would replace the image.
    """
    path = Path(path)
    if like.kind != "tiff":
        mask, done = np.empty(tuple(shape), dtype), 0
        for part in rows:
            mask[done : done + len(part)] = part
            done += len(part)
        # Of the image only the shape counts here, which takes no memory.
        blank = np.broadcast_to(np.zeros((), np.uint8), (*shape, 1))
        return write_mask(path, mask, dataclasses.replace(like, array=blank), names=names)
    module = module_of("tiff")
    with _new_file(path, like, module.mask_suffix(like)) as (path, hidden):
        try:
            module.write_mask_rows(hidden, rows, like, shape=tuple(shape), dtype=dtype)
        except OSError as error:  # alone: what goes wrong with `rows` has its own message
            raise UserError(f"{path}: cannot be written ({error})") from error
    return path


def _writing(path: Path, like: Image) -> contextlib.AbstractContextManager[None]:
    return common.reading(path, private=like.kind == "dicom", verb="written")


@contextlib.contextmanager
def _new_file(path: Path, like: Image, suffix: str) -> Iterator[tuple[Path, Path]]:
    """The path with the suffix of the format, and a hidden one to write to, which is renamed to it.

    Whole or not at all, and never in place of the image itself.
    """
    name = path.name[: len(path.name) - len(suffix_of(path))] + suffix
    path = path.with_name(name)
    sources = like.path.iterdir() if like.path.is_dir() else [like.path]
    if path.exists() and any(path.samefile(source) for source in sources):
        raise UserError(f"{path}: is the image itself or a file of it; write the mask elsewhere")
    # A hidden name in the same folder, then one rename.
    part = path.with_name(f".{uuid.uuid4().hex}.{name}")
    try:
        with _writing(path, like):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield path, part
        with _writing(path, like):
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
