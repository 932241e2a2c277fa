"""Boxes in annotation files: what is wrong with one, and a source made of them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmed.data.images import image_shape
from jaxmed.data.sources.base import Case, usual_kind
from jaxmed.data.sources.findings import Findings, some
from jaxmed.types import DatasetInfo, UserError, count_of

RARE = 5  # objects of a class; fewer may be a slip of the pen
TOLERANCE = 1.0  # pixels: tools that count from 0 instead of 1, or round, miss the border by this


@dataclasses.dataclass(frozen=True)
class Object:
    """One annotated object of a picture.

    Attributes:
        name: of its class.
        box: row_low, col_low, row_high, col_high; half-open, in pixels.
        where: what to call it in an error.
    """

    name: str
    box: tuple[float, float, float, float]
    where: str


def header_shape(path: Path, findings: Findings) -> tuple[int, ...] | None:
    """Rows and columns from the file's header; None, and a finding, if it cannot be read."""
    try:
        shape = image_shape(path)
    except UserError as error:
        findings.invalid.append(str(error))
        return None
    if len(shape) != 3:
        findings.problems.append(f"{path.name} is a volume, shape {shape}; boxes are of pictures")
        return None
    return shape[:2]


def usable_objects(
    objects: Sequence[Object], shape: tuple[int, ...], findings: Findings
) -> list[Object]:
    """The objects with sound boxes, cut at the image's border; the others go to `findings.invalid`.

    A box may leave the image by one pixel: files that count from 0 and from 1 are mixed up so often
    that an error would help nobody. What is cut is counted in the notes by the caller, who sees it
    from a box that changed.
    """
    usable = []
    for thing in objects:
        low, high = np.array(thing.box[:2]), np.array(thing.box[2:])
        shown = f"box {', '.join(f'{value:g}' for value in thing.box)} (row, column, low to high)"
        if not all(math.isfinite(value) for value in thing.box):
            findings.invalid.append(f"{thing.where}: {shown} is not of numbers")
        elif (high <= low).any():
            findings.invalid.append(f"{thing.where}: {shown} has no area")
        elif (low < -TOLERANCE).any() or (high > np.array(shape) + TOLERANCE).any():
            findings.invalid.append(
                f"{thing.where}: {shown} is outside its image of {shape[0]}x{shape[1]} pixels"
            )
        else:
            low, high = np.clip(low, 0, shape), np.clip(high, 0, shape)
            if (high <= low).any():
                findings.invalid.append(f"{thing.where}: {shown} is outside its image")
                continue
            box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
            usable.append(dataclasses.replace(thing, box=box))
    return usable


def note_cut_boxes(count: int, findings: Findings) -> None:
    """Say how many boxes were cut at the border."""
    if count:
        findings.notes.append(
            f"{count} boxes leave their image by up to one pixel and are cut at its border."
        )


def pack_boxes(
    objects: Sequence[Object], class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) float32 and labels (n,) int32 as an Example holds them."""
    boxes = np.array([thing.box for thing in objects], np.float32).reshape(-1, 4)
    labels = np.array([class_names.index(thing.name) for thing in objects], np.int32)
    return boxes, labels


def choose_classes(
    found: Sequence[str], given: Sequence[str] | None, objects: Sequence[Object], findings: Findings
) -> tuple[str, ...]:
    """The class names, as given or as found; objects of no known class are invalid."""
    names = tuple(given) if given is not None else tuple(found)
    counts = Counter(thing.name for thing in objects)
    rare = [n for n in names if 0 < counts[n] < RARE and counts[n] < 0.05 * len(objects)]
    if rare and given is None:
        findings.notes.append(f"Fewer than {RARE} objects are of {some(rare)}: is a name misspelt?")
    unknown: dict[str, list[str]] = defaultdict(list)
    for thing in objects:
        if thing.name not in names:
            unknown[thing.name].append(thing.where)
    for name, places in unknown.items():
        findings.invalid.append(
            f"unknown class {name!r} in {count_of(len(places), 'object')}, {some(places)}; class "
            f"names are {', '.join(names)}"
        )
    return names


def detection_info(
    root: Path, cases: Sequence[Case], names: Sequence[str], channels: int | None, kind: str
) -> DatasetInfo:
    """The info of a set of pictures with boxes; looks at the headers of some pictures.

    Raises:
        UserError: if there is no picture or no class left.
    """
    if not cases or not names:
        raise UserError(f"{root}: no annotated {'class' if cases else 'image'} is left; check path")
    ndim, found = usual_kind([case.images for case in cases], channels=channels)
    return DatasetInfo(
        name=root.resolve().name,
        task="detection",
        ndim=ndim,
        channels=found,
        class_names=tuple(names),
        kind=kind,
    )
