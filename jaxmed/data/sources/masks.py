"""Masks in files: from whatever was stored to class or instance numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.images import Image, read_image, read_region
from jaxmed.data.sources.base import check_same_grid
from jaxmed.data.sources.findings import Findings, some
from jaxmed.types import Region, UserError

MANY_VALUES = 1000  # more than this in one file is no class mask
MANY_CLASSES = 20  # more than this, with no names for them, are instance numbers


@dataclasses.dataclass(frozen=True)
class MaskReader:
    """Reads one mask on the grid of its image; called as `reader(path, image)`.

    Attributes:
        binary: whether any value but 0 means 1: masks of {0, 255}.
        ignored: the stored number that becomes -1, if there is one.
    """

    binary: bool = False
    ignored: int | None = None

    def __call__(self, path: Path, image: Image, region: Region | None = None) -> np.ndarray:
        """Mask (*spatial) int32 of class or instance numbers, -1 where ignored.

        Where `image` is a region of its file, so is the mask.

        Raises:
            UserError: if the file is no mask, or not on the grid of its image.
        """
        stored = read_region(path, region, indices=True)
        check_same_grid(path, stored, image.path, image)
        mask = whole_numbers(stored.array, path)
        if self.binary:
            strange = np.setdiff1d(mask, (0, 255))
            if strange.size:
                raise UserError(
                    f"{path}: mask holds {some([str(value) for value in strange])}; the masks of "
                    "this set are of 0 and 255"
                )
            return mask // 255
        if self.ignored is not None:
            return np.where(mask == self.ignored, np.int32(-1), mask)
        return mask


def whole_numbers(array: np.ndarray, path: Path) -> np.ndarray:
    """The one channel of a mask as int32.

    Args:
        array: (*spatial, channels) as read.
        path: to name in an error.

    Raises:
        UserError: if it holds colours, or numbers that are not whole.
    """
    mask = array[..., 0]
    if array.shape[-1] > 1 and (array != array[..., :1]).any():
        raise UserError(
            f"{path}: mask has {array.shape[-1]} channels (colours); expected one number a voxel"
        )
    if mask.dtype.kind == "f" and not (np.isfinite(mask).all() and (mask == np.rint(mask)).all()):
        raise UserError(f"{path}: mask holds numbers that are not whole; is it an image?")
    if mask.min(initial=0) < -1:
        raise UserError(f"{path}: mask holds {mask.min():g}; expected 0, 1, 2, ... or -1, ignored")
    return mask.astype(np.int32)


def stored_values(paths: Sequence[Path], findings: Findings) -> dict[int, Path]:
    """Every value that occurs in the masks, with a file that holds it; reads all of them once.

    Masks that cannot be understood are passed over here, since reading their case says so; where
    there is no other, they are added to the problems of `findings`.
    """
    found: dict[int, Path] = {}
    broken: list[str] = []
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, values in zip(paths, pool.map(_values, paths), strict=True):
            if isinstance(values, UserError):
                broken.append(str(values))
                continue
            for value in values:
                found.setdefault(value, path)
    if not found:
        findings.problems += broken
    return found


def _values(path: Path) -> list[int] | UserError:
    try:
        values = np.unique(whole_numbers(read_image(path, indices=True).array, path)).tolist()
    except UserError as error:
        return error
    if len(values) > MANY_VALUES:
        return UserError(
            f"{path}: mask holds {len(values)} values; are these instances or an image?"
        )
    return values


def classes_of_values(
    values: dict[int, Path], findings: Findings
) -> tuple[tuple[str, ...], MaskReader]:
    """Class names and a reader, from the values that masks hold where nothing names the classes.

    Values that leave gaps are added to the problems of `findings`.
    """
    numbers = sorted(set(values) - {-1})
    if numbers in ([255], [0, 255]):
        findings.notes.append("The masks hold 0 and 255; 255 is taken for class 1, the object.")
        return ("background", "object"), MaskReader(binary=True)
    if not values or numbers in ([], [0]):
        findings.problems.append("all masks are empty: no voxel belongs to an object")
        return ("background", "object"), MaskReader()
    if numbers[0] < 0 or sorted({0, *numbers}) != list(range(numbers[-1] + 1)):
        shown = f"{numbers[:12]}"[1:-1] + (", ..." if len(numbers) > 12 else "")
        lossy = values[numbers[-1]].suffix.lower() in (".jpg", ".jpeg")
        reason = (
            "JPEG does not keep numbers: save masks as PNG"
            if lossy
            else (
                "number the classes 0, 1, 2, ... without gaps, or name them all (class_names, or a "
                "classes.txt with background first), or, if these are objects, set "
                "data.masks=instance (of evaluate.py --predictions: --masks=instance)"
            )
        )
        places = ", ".join(f"{n} in {values[n].name}" for n in numbers[:12] if n > 0)
        findings.problems.append(f"the masks hold the values {shown} ({places}): {reason}")
        return ("background", "object"), MaskReader()
    if numbers[-1] > MANY_CLASSES:
        findings.problems.append(
            f"the masks hold numbers up to {numbers[-1]}, as of objects: say so with "
            "--config.data.masks=instance (of evaluate.py --predictions: --masks=instance), or, if "
            "these are classes, name them all (class_names, or a classes.txt, background first)"
        )
        return ("background", "object"), MaskReader()
    names = ["object"] if numbers[-1] == 1 else [f"class_{n}" for n in range(1, numbers[-1] + 1)]
    found = ", ".join(map(str, sorted(values)))
    findings.notes.append(f"The masks hold the values {found}; no file names the classes.")
    return ("background", *names), MaskReader()


def check_class_names(names: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Class names of a segmentation, the first of which is the background.

    Raises:
        UserError: if it is not, or names are repeated or too few.
    """
    names = tuple(str(name).strip() for name in names)
    if len(names) < 2 or names[0].lower() != "background":
        raise UserError(
            f"{where}: class names are {', '.join(names) or 'empty'}; expected background first "
            "and then one name a class"
        )
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"{where}: class names {', '.join(names)} are repeated or empty")
    return ("background", *names[1:])


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; mend or replace it") from error


def json_classes(path: Path, dataset: Any) -> tuple[tuple[str, ...], int | None]:
    """Class names from the `labels` of a dataset.json, and the number that is to be ignored.

    Labels are `{"0": "background", ...}` (Decathlon) or `{"background": 0, ...}` (nnU-Net 2),
    where one called "ignore" is left out of training and scores.

    Raises:
        UserError: if the numbers are not 0, 1, 2, ... with the background at 0.
    """
    labels = dataset.get("labels") if isinstance(dataset, dict) else None
    if not isinstance(labels, dict) or not labels:
        raise UserError(f"{path}: has no labels; expected {{'0': 'background', '1': NAME, ...}}")
    try:
        pairs = [_number_and_name(key, value) for key, value in labels.items()]
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: labels are {labels}; expected one number a class (regions of several "
            "classes are not supported)"
        ) from None
    ignored = next((number for number, name in pairs if name.lower() == "ignore"), None)
    classes = sorted(pair for pair in pairs if pair[0] != ignored)
    if [number for number, _ in classes] != list(range(len(classes))):
        raise UserError(
            f"{path}: labels have the numbers {[number for number, _ in classes]}; "
            "expected 0, 1, 2, ... without gaps"
        )
    return check_class_names([name for _, name in classes], where=str(path)), ignored


def _number_and_name(key: str, value: Any) -> tuple[int, str]:
    if _is_number(key) and not _is_number(value):
        return int(key), str(value)
    return int(value), str(key)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit())
