"""Image files in, masks in the same format and geometry out: nibabel, imageio, or NumPy alone.

Other formats are read by jaxmed itself.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np

from .contents import ModelError

PICTURES = (".png", ".jpeg", ".jpg", ".bmp")
SUFFIXES = (".nii.gz", ".nii", *PICTURES, ".npy")
STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
"""Of the files of `PICTURES`."""
MODES = ("1", "L", "LA", "I;16", "I;16B", "I", "F", "P", "RGB", "RGBA")
MAX_VALUES = 2**31
MAX_CHANNELS = 32
ORIGIN_FILE = "predicted_by.json"
"""In a folder of predictions: the network that made them."""
UNSIZED = "does not state all sides of its voxels; 1 mm is assumed for others"
SECONDS_TO_WRITE = 5
"""How long the note of another process may be empty."""
MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}
TEXTS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")


@dataclasses.dataclass(frozen=True)
class File:
    """One image as read.

    Attributes:
        path: of the file.
        array: (*spatial, channels) of uint8, int16 or float32; volumes in RAS order.
        spacing: (ndim,) float32, mm a voxel.
        orientation: (3, 2) axis and flip of each axis of the file, as nibabel gives it, or None.
        note: what was left out, or "".
    """

    path: Path
    array: np.ndarray
    spacing: np.ndarray
    orientation: np.ndarray | None = None
    note: str = ""


def suffix_of(path: Path) -> str:
    """The suffix of a file that can be read here, or ""."""
    return next((end for end in SUFFIXES if path.name.lower().endswith(end)), "")


def read(path: Path) -> File:
    """Read an image file.

    Raises:
        ModelError: the file is missing, damaged, too big or of another format.
    """
    suffix = suffix_of(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; check the path")
    if not suffix:
        raise ModelError(f"{path}: format is not read here; convert it to {' '.join(SUFFIXES)}")
    reader = _read_nifti if suffix.startswith(".nii") else _read_picture
    try:
        return _read_npy(path) if suffix == ".npy" else reader(path)
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{path}: needs {error.name}, which is missing: python -m pip install {error.name}"
        ) from error
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: cannot be read ({type(error).__name__}: {told})") from error


def write_mask(path: Path, mask: np.ndarray, like: File) -> Path:
    """Write a mask (*spatial) in the format and geometry of its image; pictures become PNG.

    Raises:
        ModelError: it would replace the image, or cannot be written.
    """
    suffix = suffix_of(like.path)
    ending = ".png" if suffix in PICTURES else suffix
    path = path.with_name(path.name[: len(path.name) - len(suffix)] + ending)
    if path.exists() and path.samefile(like.path):
        raise ModelError(f"{path}: is the image itself; write to another folder")
    top = int(mask.max(initial=0))
    stored = mask.astype(np.uint8 if top < 2**8 else np.uint16 if top < 2**16 else np.uint32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".npy":
            with path.open("wb") as stream:
                np.save(stream, stored, allow_pickle=False)
        elif ending == ".png":
            import imageio.v3

            imageio.v3.imwrite(path, stored, extension=".png")
        else:
            _write_nifti(path, stored, like)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error}); make room there") from error
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one go, so that nobody reads half of it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text(text, encoding="utf-8", newline="")
    os.replace(draft, path)


def claim(output: Path, origin: dict[str, Any]) -> None:
    """Make a folder for predictions, with a note of whose they are.

    Only a folder with that note is written to again: masks and pictures have the names of their
    images, as annotations beside them may have.

    Args:
        output: the folder, which need not be there.
        origin: what `ORIGIN_FILE` in it says.

    Raises:
        ModelError: see `check_output`, or it cannot be written.
    """
    check_output(output, origin)
    note = output / ORIGIN_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Of those that begin at once only one can.
        with note.open("x", encoding="utf-8") as stream:
            try:
                stream.write(json.dumps(origin, indent=2) + "\n")
                stream.flush()
            except OSError:
                note.unlink()
                raise
    except FileExistsError:
        check_output(output, origin)
    except OSError as error:
        raise ModelError(f"{output}: cannot be written ({error}); choose another folder") from error


def check_output(output: Path, origin: dict[str, Any]) -> None:
    """Make sure that a folder for predictions holds nothing but earlier ones by the same weights.

    Masks and pictures have the names of their images, as annotations beside these may have, and
    would replace them.

    Args:
        output: the folder, which need not be there.
        origin: what `ORIGIN_FILE` in it is to say.

    Raises:
        ModelError: it holds files of another origin.
    """
    note = output / ORIGIN_FILE
    # What begins with a dot is of the system, or about to become the note.
    if not output.is_dir() or all(path.name.startswith(".") for path in output.iterdir()):
        return
    if not note.is_file():
        raise ModelError(
            f"--output={output}: holds files that are no predictions (there is no {ORIGIN_FILE}), "
            "which might be replaced; choose another folder"
        )
    try:
        latest = time.monotonic() + SECONDS_TO_WRITE
        while not (told := note.read_text(encoding="utf-8")) and time.monotonic() < latest:
            time.sleep(0.01)  # another process is about to write it
        known = json.loads(told)
    except (OSError, ValueError) as error:
        raise ModelError(f"{note}: cannot be read ({error}); choose another folder") from error
    if known != origin:
        raise ModelError(
            f"--output={output}: holds predictions by other weights; choose another folder"
        )


def _checked(path: Path, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    if not 0 < count <= MAX_VALUES:
        raise ModelError(f"{path}: shape {shape} has {count} values; expected 1 to {MAX_VALUES}")


def supported(array: np.ndarray) -> np.ndarray:
    """As the first of uint8, int16 and float32 that holds every value of its type."""
    if array.dtype.kind not in "biuf":
        raise ModelError(f"values are of type {array.dtype}; expected real numbers")
    if array.dtype == bool:
        return array.astype(np.uint8)
    for dtype in (np.uint8, np.int16):
        if np.can_cast(array.dtype, dtype):
            return array.astype(dtype, copy=False)
    return array.astype(np.float32, copy=False)


def _read_npy(path: Path) -> File:
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    _checked(path, stored.shape)
    if stored.offset + stored.nbytes != path.stat().st_size:
        raise ModelError(f"{path}: holds more than its header says; save it again")
    shape = stored.shape
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] > 4):
        shape = (*shape, 1)
    if len(shape) not in (3, 4) or shape[-1] > MAX_CHANNELS:
        raise ModelError(f"{path}: shape {shape}; expected an image or a volume with channels")
    array = supported(np.array(stored).reshape(shape))
    note = UNSIZED if len(shape) == 4 else ""
    return File(path, array, np.ones(len(shape) - 1, np.float32), note=note)


def _read_picture(path: Path) -> File:
    import imageio.v3

    with path.open("rb") as stream:
        start = stream.read(26)
    is_png = start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) == 26
    bits, colour = (start[24], start[25]) if is_png else (8, 0)
    if bits == 16 and colour in (2, 4, 6):
        raise ModelError(f"{path}: colours of 16 bits would lose half; save it with 8")
    if not start.startswith(STARTS):
        raise ModelError(f"{path}: is no {' '.join(PICTURES)}, whatever its name; convert it")
    opened: Any = imageio.v3.imopen(path, "r")
    with opened as file:
        mode = file.metadata(index=0, exclude_applied=False).get("mode")
        if mode not in MODES:  # such as CMYK, whose black would be taken for opacity
            raise ModelError(f"{path}: pixels are of mode {mode}; save it as gray or RGB")
        _checked(path, file.properties(index=0).shape)
        several = file.properties(index=...).n_images
        # JPEGs that ask to be turned (EXIF) are taken as stored, as their annotations are.
        array = np.atleast_3d(file.read(index=0, rotate=False))
    notes = [f"holds {several} pictures; the first is used"] if several > 1 else []
    if array.dtype == bool:
        bits, array = 1, array.astype(np.uint8) * 255
    if bits < 8 and colour == 0:
        notes.append(f"{bits}-bit gray, spread over 0 to 255")
    if array.shape[-1] in (2, 4):  # the last is opacity
        array, opacity = array[..., :-1], array[..., -1]
        if np.ptp(opacity):
            notes.append("the opacity (alpha) channel varies; it was left out")
    spacing = np.ones(2, np.float32)
    return File(path, np.ascontiguousarray(supported(array)), spacing, note="; ".join(notes))


def _read_nifti(path: Path) -> File:
    import nibabel

    image: Any = nibabel.load(path)
    shape = tuple(int(side) for side in image.header.get_data_shape())
    extra = shape[4:] if len(shape) == 5 and shape[3] == 1 else shape[3:]
    fields = image.header.get_data_dtype().names
    if len(extra) > 1 or (extra and (extra[0] > MAX_CHANNELS or fields)):
        raise ModelError(f"{path}: shape {shape} has a time axis; split it into one volume a file")
    _checked(path, shape)
    if path.suffix.lower() == ".gz":
        # To the end, which nibabel does not read: the checksum comes last.
        with gzip.open(path) as stream:
            while stream.read(2**20):
                pass
    notes: list[str] = []
    if image.dataobj.slope == 1 and image.dataobj.inter == 0:
        values = np.asanyarray(image.dataobj.get_unscaled())
    else:
        values = np.asarray(image.dataobj, np.float32)
    if values.dtype.names:
        values = np.stack([values[name] for name in values.dtype.names], axis=-1)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    spatial = (shape + (1, 1, 1))[:3]
    if values.dtype.kind in "iu" and values.dtype.itemsize > 2:
        low, high = int(values.min()), int(values.max())
        if max(-low, high) > 2**24:
            notes.append(f"integers from {low} to {high} are rounded to float32")
    values = supported(values.reshape(*spatial, -1))
    affine = np.array(image.affine, np.float64)
    affine[:3] *= MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ModelError(f"{path}: its affine is broken; repair the header")
    header = image.header
    if not header["sform_code"] and not header["qform_code"]:
        notes.append(
            "the header gives no orientation; nibabel's default, left to right, is assumed"
        )
    both = header["sform_code"] and header["qform_code"]
    if both and not np.allclose(header.get_sform(), header.get_qform(), rtol=1e-3, atol=1e-3):
        notes.append("its two statements of place, sform and qform, differ; sform is taken")
    orientation = nibabel.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order].astype(np.float32)
    array = nibabel.apply_orientation(values, orientation)
    told = "; ".join(notes)
    return File(path, np.ascontiguousarray(array), spacing, orientation, note=told)


def _write_nifti(path: Path, mask: np.ndarray, like: File) -> None:
    """With the header of the image: its affines and their codes are kept bit for bit."""
    import nibabel

    assert like.orientation is not None
    flipped = np.transpose(mask, like.orientation[:, 0].astype(int))
    stored = flipped[tuple(slice(None, None, int(flip)) for flip in like.orientation[:, 1])]
    original: Any = nibabel.load(like.path)
    header = original.header.copy()
    header.extensions.clear()  # these and the texts may hold a patient's name
    for field in TEXTS:
        if field in header:
            header[field] = b""
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = header["vox_offset"] = 0
    header.set_data_dtype(stored.dtype)
    shape = header.get_data_shape()[:3]
    header.set_data_shape(shape)
    type(original)(stored.reshape(shape), None, header).to_filename(path)
