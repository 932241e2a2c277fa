"""Scored cases on disk, from which every score can be computed again without a network."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.tasks.classification import Classification
from jaxmed.tasks.detection import Detection
from jaxmed.tasks.segmentation import Segmentation
from jaxmed.types import DatasetInfo, Row, Task, UserError

ROWS_FILE = "rows.npz"


@dataclasses.dataclass(frozen=True)
class ScoredCases:
    """The scores of the cases of one part, as an evaluation leaves them.

    Attributes:
        ids: names of the cases.
        rows: what `Task.score` said of each.
        groups: a number for the patient (or other group) of each; its own where none is known.
        folds: the fold whose models predicted each; -1 where the same models predicted all.
    """

    ids: tuple[str, ...]
    rows: tuple[Row, ...]
    groups: tuple[int, ...]
    folds: tuple[int, ...]

    @cached_property
    def known(self) -> frozenset[str]:
        """The ids, to look one up."""
        return frozenset(self.ids)

    @property
    def by_place(self) -> dict[int, Row]:
        """Rows by their place, as `summarize_cases` takes them."""
        return dict(enumerate(self.rows))

    @property
    def fold_places(self) -> list[Collection[int]]:
        """Places of each fold's cases; nothing without folds."""
        numbers = sorted(set(self.folds) - {-1})
        return [{p for p, fold in enumerate(self.folds) if fold == n} for n in numbers]

    def take(self, ids: Sequence[str]) -> ScoredCases:
        """Some of the cases, in the order asked for."""
        place = {name: number for number, name in enumerate(self.ids)}
        chosen = [place[name] for name in ids]
        return ScoredCases(
            tuple(self.ids[i] for i in chosen),
            tuple(self.rows[i] for i in chosen),
            tuple(self.groups[i] for i in chosen),
            tuple(self.folds[i] for i in chosen),
        )


def save_rows(path: Path, cases: ScoredCases) -> None:
    """Write scored cases as arrays, without pickle: each score's values and shapes, end to end."""
    arrays: dict[str, np.ndarray] = {
        "ids": np.array(cases.ids, np.str_),
        "groups": np.array(cases.groups, np.int32),
        "folds": np.array(cases.folds, np.int32),
    }
    for name in dict.fromkeys(name for row in cases.rows for name in row):
        values = [np.asarray(row.get(name, np.nan)) for row in cases.rows]
        arrays[f"values {name}"] = np.concatenate([value.ravel() for value in values])
        arrays[f"shapes {name}"] = np.array([value.shape for value in values], np.int32)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]


def load_rows(path: Path) -> ScoredCases:
    """Read what `save_rows` wrote.

    Raises:
        UserError: where the file is missing or no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        ids = arrays.pop("ids").tolist()
        groups, folds = (tuple(arrays.pop(name).tolist()) for name in ("groups", "folds"))
        rows: list[Row] = [{} for _ in ids]
        for key, shapes in arrays.items():
            kind, _, name = key.partition(" ")
            if kind == "shapes":
                sizes = shapes.prod(axis=1, dtype=int)  # of a number the empty product, 1
                parts = np.split(arrays[f"values {name}"], np.cumsum(sizes)[:-1])
                for row, part, shape in zip(rows, parts, shapes, strict=True):
                    row[name] = part.reshape(shape) if len(shape) else part[0]
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; evaluate again with evaluate.py, which writes it"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate again") from error
    return ScoredCases(tuple(ids), tuple(rows), groups, folds)


def number_groups(names: Sequence[str] | None, count: int) -> tuple[int, ...]:
    """A number for each patient, in order of first appearance: their names stay out of outputs."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(name, len(numbers)) for name in names or range(count))


def make_scorer(
    info: DatasetInfo, *, nsd_tolerance: float = 1.0, score_threshold: float = 0.3
) -> Task:
    """A task that scores and summarises, and trains nothing."""
    if info.task == "classification":
        return Classification(info.class_names, multilabel=info.multilabel)
    if info.task == "detection":
        return Detection(info.class_names, score_threshold=score_threshold)
    return Segmentation(info.class_names, instances=info.instances, nsd_tolerance=nsd_tolerance)


def scoring_of(task: Task) -> dict[str, float]:
    """What a task scores cases by beside its classes, as `make_scorer` takes it.

    `nsd_tolerance` in mm of a segmentation, `score_threshold` of a detection.
    """
    if isinstance(task, Detection):
        return {"score_threshold": float(task.score_threshold)}
    if isinstance(task, Segmentation):
        return {"nsd_tolerance": float(task.nsd_tolerance)}
    return {}


def scored_cases(
    ids: Sequence[str],
    scores: Mapping[int, Row],
    *,
    patients: Sequence[str] | None,
    folds: Mapping[int, int],
) -> ScoredCases:
    """Gather what an evaluation knows of its cases; all but `scores` is by row of the source."""
    own = None if patients is None else [patients[row] for row in scores]
    return ScoredCases(
        tuple(ids[row] for row in scores),
        tuple(scores.values()),
        number_groups(own, len(scores)),
        tuple(folds.get(row, -1) for row in scores),
    )
