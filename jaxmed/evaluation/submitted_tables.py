"""Predictions in tables: boxes as COCO results, and probabilities of classes as CSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.images import image_stem
from jaxmed.data.sources.base import FileSource
from jaxmed.data.sources.masks import read_json
from jaxmed.types import Row, Task, UserError

Score = Callable[[int, Task], Row]
"""(row of the truth, task) -> the scores of that case."""
Read = tuple[Mapping[int, Any], list[str], Score]
"""What was predicted of each row, names that fit no case, and how to score a row."""

_END = re.compile(r"_(mask|masks|label|labels|seg|segmentation|gt|pred|prediction)$", re.IGNORECASE)


class CaseNames:
    """Which row a name means: an id, or a file's name or path with or without its suffix."""

    def __init__(self, truth: FileSource):
        self._rows: dict[str, set[int]] = {}
        for row, case in enumerate(truth.cases):
            files = [*case.images, *([case.mask] if case.mask else [])]
            names = {case.id, *(f.name for f in files), *(_bare(image_stem(f)) for f in files)}
            names |= {"/".join(f.parts[-n:]) for f in files for n in (2, 3)}
            for name in names:
                self._rows.setdefault(name, set()).add(row)

    def find(self, name: str) -> int | None:
        """The row; None where no case or several are called so."""
        path = Path(name.replace("\\", "/"))
        tries = (name, "/".join(path.parts[-3:]), "/".join(path.parts[-2:]), path.name)
        for tried in (*tries, _bare(image_stem(path))):
            rows = self._rows.get(tried, set())
            if len(rows) == 1:
                return next(iter(rows))
        return None


def _bare(stem: str) -> str:
    return _END.sub("", stem)


def read_boxes(path: Path, truth: FileSource) -> Read:
    """Boxes of a JSON list of COCO results.

    Pictures are told by `file_name`, or by `image_id` as in the truth's own JSON; classes by
    `category`, or likewise `category_id`. A picture without boxes is one in which none was found.

    Raises:
        UserError: naming the entry that is no box, or of a class that the truth lacks.
    """
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f"{path}: expected COCO results, a list of boxes with their scores")
    names = CaseNames(truth)
    files, categories = _coco_numbers(truth)
    found: dict[int, list[tuple[list[float], float, int]]] = {}
    strange: dict[str, None] = {}
    for number, entry in enumerate(content):
        where = f"{path} entry {number}"
        for key in ("image_id", "category_id"):
            if not isinstance(entry.get(key), Hashable):
                raise UserError(f"{where}: {key} is {entry[key]!r}; expected a number or a name")
        name = entry.get("file_name", files.get(entry.get("image_id")))
        row = None if name is None else names.find(str(name))
        if row is None:
            strange[str(name or f"image_id {entry.get('image_id')}")] = None
            continue
        kind = entry.get("category", categories.get(entry.get("category_id")))
        if kind not in truth.info.class_names:
            raise UserError(
                f"{where}: category is {kind or entry.get('category_id')!r}; the classes of the "
                f"truth are {', '.join(truth.info.class_names)}"
            )
        found.setdefault(row, []).append((*_box(entry, where), truth.info.class_names.index(kind)))

    def score(row: int, task: Task) -> Row:
        case, predicted = truth.cases[row], found.get(row, [])
        boxes, scores, labels = zip(*predicted, strict=True) if predicted else ((), (), ())
        prediction = {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "scores": np.array(scores, np.float32),
            "labels": np.array(labels, np.int32),
        }
        return task.score(prediction, {"boxes": case.boxes, "box_label": case.box_label})

    return found, list(strange), score


def _box(entry: Mapping[str, Any], where: str) -> tuple[list[float], float]:
    """[row_low, column_low, row_high, column_high] and score of a COCO result."""
    try:
        left, top, width, height = map(float, entry["bbox"])
        score = float(entry["score"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: expected a bbox of four numbers and a score") from error
    if not (np.isfinite([left, top, width, height, score]).all() and width >= 0 and height >= 0):
        raise UserError(f"{where}: bbox is {entry['bbox']} and score {score}; expected numbers")
    return [top, left, top + height, left + width], score


def _coco_numbers(truth: FileSource) -> tuple[dict[Any, str], dict[Any, str]]:
    """File by image_id and name by category_id, as the truth's own JSON has them.

    A number that means different things in several files (of several parts) means nothing.
    """
    files: dict[Any, str] = {}
    categories: dict[Any, str] = {}
    for table in getattr(truth, "tables", ()):
        content = json.loads(table.read_text(encoding="utf-8-sig"))
        for known, rows, key in (
            (files, content["images"], "file_name"),
            (categories, content["categories"], "name"),
        ):
            for row in rows:
                same = known.setdefault(row.get("id"), str(row.get(key))) == str(row.get(key))
                if not same:
                    known[row.get("id")] = ""
    return files, categories


def read_probabilities(path: Path, truth: FileSource) -> Read:
    """Probabilities of a CSV with a line a case: its `file` or `id`, and a column a class.

    Raises:
        UserError: naming the row that is wrong.
    """
    names, classes = CaseNames(truth), truth.info.class_names
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 table: {error}") from error
    columns = list(table[0]) if table else []
    absent = [name for name in classes if name not in columns]
    key = "file" if "file" in columns else "id"
    if absent or key not in columns:
        raise UserError(
            f"{path}: has the columns {', '.join(columns) or 'of an empty file'}; expected file, "
            f"and a probability for each class: {', '.join(classes)}"
        )
    found: dict[int, np.ndarray] = {}
    strange = []
    for number, entry in enumerate(table, start=2):
        row = names.find(entry[key] or "")
        if row is None:
            strange.append(str(entry[key]))
        elif row in found:
            raise UserError(f"{path} row {number}: {entry[key]} is predicted twice")
        else:
            found[row] = _probabilities(entry, classes, f"{path} row {number}")

    def score(row: int, task: Task) -> Row:
        label = np.asarray(truth.cases[row].label, np.int32)
        wrong = np.full(len(classes), 1 / (len(classes) - 1), np.float32)
        wrong[label] = 0
        return task.score(found.get(row, wrong), {"label": label})

    return found, strange, score


def _probabilities(entry: Mapping[str, Any], classes: Sequence[str], where: str) -> np.ndarray:
    try:
        values = np.array([float(entry[name]) for name in classes], np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: holds a probability that is no number") from error
    if not (values >= 0).all() or not np.isclose(values.sum(), 1, atol=0.01):
        raise UserError(
            f"{where}: the probabilities are {', '.join(f'{v:g}' for v in values)}; expected them "
            "to sum to 1"
        )
    return values
