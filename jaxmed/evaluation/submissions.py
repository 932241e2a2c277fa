"""Predictions of any program, from files: masks, COCO boxes, or a table of probabilities.

Cases that nothing was predicted for count as failed (an empty mask, no boxes, no probability for
what is true): leaving them out would reward a program for the cases it gave up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmed.data.images import list_images, read_image
from jaxmed.data.sources.base import Case, FileSource, check_same_grid, make_ids, usual_kind
from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.coco import Coco
from jaxmed.data.sources.findings import Findings, some
from jaxmed.data.sources.layouts import guess_layout, open_folder
from jaxmed.data.sources.masks import whole_numbers
from jaxmed.data.sources.msd import Decathlon
from jaxmed.data.sources.pairs import ImageMaskPairs, classes_of_masks
from jaxmed.data.sources.voc import PascalVOC
from jaxmed.evaluation.submitted_tables import (
    CaseNames,
    Read,
    Score,
    read_boxes,
    read_probabilities,
)
from jaxmed.types import DatasetInfo, Row, Task, UserError, count_of

_BESIDE = (
    "overlays",
    "probabilities",
    "entropy",
    "mutual_information",
)  # what predict.py writes beside the masks


def find_kind(path: Path) -> tuple[str, Path]:
    """The task that predictions are of, and the file or folder that holds them.

    Raises:
        UserError: where there is nothing of the kind.
    """
    if path.is_dir():
        for name in ("predictions.csv", "detections.json"):
            if (path / name).is_file():
                path = path / name
                break
    if not path.exists():
        raise UserError(f"--predictions={path}: no such file or folder")
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in (".csv", ".json"):
        raise UserError(
            f"--predictions={path}: expected a folder of masks, a .json of COCO results, or a .csv "
            "of probabilities"
        )
    kinds = {".csv": "classification", ".json": "detection"}
    return ("segmentation" if path.is_dir() else kinds[suffix]), path


def open_truth(path: Path, task: str, *, masks: str = "semantic") -> FileSource:
    """The data set that predictions are scored against, or just a folder of its masks.

    Invalid boxes are left out and counted in its notes.
    """
    layout = guess_layout(path) if path.is_dir() else None
    if task == "classification":
        return ClassFolders(path)
    if task == "detection":
        return (
            PascalVOC(path, invalid="drop")
            if layout == "Pascal VOC"
            else Coco(path, invalid="drop")
        )
    if layout == "Medical Segmentation Decathlon":
        return Decathlon(path)
    if layout == "images and masks":
        return ImageMaskPairs(path, masks=masks)
    return _open_masks(path, masks)


def _open_masks(path: Path, meaning: str) -> FileSource:
    """A folder of masks alone, as a data set whose images are the masks."""
    root = open_folder(path, layout="masks")
    files = list_images(root)
    if not files:
        raise UserError(f"--truth={path}: holds no masks")
    findings = Findings(root)
    names, reader = classes_of_masks(root, files, meaning, None, findings)
    findings.finish()
    ndim, channels = usual_kind([[file] for file in files], channels=None)
    info = DatasetInfo(
        name=root.resolve().name,
        task="segmentation",
        ndim=ndim,
        channels=channels,
        class_names=names,
        instances=meaning == "instance",
    )
    ids = make_ids(root, files)
    cases = [
        Case(id=name, images=(file,), mask=file) for name, file in zip(ids, files, strict=True)
    ]
    return FileSource(info, cases, notes=findings.notes, read_mask=reader)


def read_predictions(path: Path, truth: FileSource, rows: Sequence[int]) -> tuple[Score, list[str]]:
    """How to score each of some rows, and notes on what is missing or fits no case.

    Args:
        path: of `find_kind`.
        truth: of `open_truth`.
        rows: that are scored.

    Raises:
        UserError: where the predictions cannot be read, or fit no case at all.
    """
    read = {
        "classification": read_probabilities,
        "detection": read_boxes,
        "segmentation": _read_masks,
    }[truth.info.task]
    found, strange, score = read(path, truth)
    own = [row for row in rows if row in found]
    nothing = truth.info.task == "detection" and not found and not strange  # no box anywhere
    if not own and not nothing:
        shown = f"of {some(strange)}" if strange else "no prediction at all"
        raise UserError(
            f"--predictions={path}: fits no case of the truth ({some(list(truth.ids))}); it has "
            f"{shown}: names must be the same but for the suffix"
        )
    notes = []
    missing = [truth.ids[row] for row in rows if row not in found]
    if missing:
        what = {"classification": "wrong", "detection": "without boxes", "segmentation": "empty"}
        notes.append(
            f"{len(missing)} of {len(rows)} cases have no prediction and count as "
            f"{what[truth.info.task]}: {some(missing)}"
        )
    if strange:
        notes.append(f"{len(strange)} predictions fit no case and are left out: {some(strange)}")
    others = len(found) - len(own)
    if others:
        notes.append(f"the predictions of {count_of(others, 'case')} of other parts are left out")
    return score, notes


def _read_masks(path: Path, truth: FileSource) -> Read:
    """Masks in a folder, which have the names of the true ones, or of their images."""
    names, strange = CaseNames(truth), []
    found: dict[int, Path] = {}
    for file in list_images(path):
        relative = file.relative_to(path)
        if relative.parts[0] in _BESIDE:
            continue
        row = names.find(relative.as_posix())
        if row is None:
            strange.append(relative.as_posix())
        elif row in found:
            raise UserError(f"{file} and {found[row]} are both of case {truth.ids[row]}; keep one")
        else:
            found[row] = file

    def score(row: int, task: Task) -> Row:
        example = truth[row]
        predicted = np.zeros_like(example["mask"])
        if row in found:
            predicted = _read_mask(found[row], truth, row)
        return task.score(predicted, example)

    return found, strange, score


def _read_mask(path: Path, truth: FileSource, row: int) -> np.ndarray:
    """A predicted mask on the grid of the true one; UserError where it is on another."""
    stored, place = read_image(path, indices=True), truth.cases[row].mask
    assert place is not None  # of every case of a set for segmentation
    check_same_grid(path, stored, place, read_image(place, indices=True))
    mask, info = whole_numbers(stored.array, path), truth.info
    if info.instances:
        return mask
    if (
        len(info.class_names) == 2
        and mask.max(initial=0) == 255
        and set(np.unique(mask)) <= {0, 255}
    ):
        return mask // 255
    if mask.min(initial=0) < 0 or mask.max(initial=0) >= len(info.class_names):
        raise UserError(
            f"{path}: holds {mask.min()} to {mask.max()}; the classes of the truth are 0 to "
            f"{len(info.class_names) - 1} ({', '.join(info.class_names)})"
        )
    return mask
