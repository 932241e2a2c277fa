"""Phantoms: an embedded data set with exact truth, drawn when asked for, nothing to download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data.sources.base import crop_example, make_example, row_number
from jaxmed.data.sources.phantom_body import LESIONS, Patient, draw_body
from jaxmed.data.sources.phantom_cells import KINDS, draw_cells
from jaxmed.data.sources.phantom_scene import Scene, hulls
from jaxmed.types import TASKS, DatasetInfo, Example, Region, UserError

_CELL_NAMES = tuple(kind.name for kind in KINDS)
_CLASS_NAMES = {
    ("cells", "classification"): _CELL_NAMES,
    ("cells", "detection"): _CELL_NAMES,
    ("cells", "segmentation"): ("background", *_CELL_NAMES),
    ("cells", "instances"): ("background", "cell"),
    ("body", "classification"): ("no lesion", "lesion"),
    ("body", "detection"): LESIONS,
    ("body", "segmentation"): ("background", "organ", "lesion"),
    ("body", "instances"): ("background", "lesion"),
}
_NUMBERS = {"cells": 1, "body": 2}  # keep the random numbers of the kinds apart
_VISITS = (0, 1, 1, 2, 2, 2)  # of every six body images, one patient has 1, one 2, and one 3
_SMALLEST = 16


class Phantoms:
    """Made-up images with exact truth; fulfils `jaxmed.types.Source`.

    An image is a function of kind, ndim, size, seed and index alone: every process, in any order,
    sees the same pixels, and all tasks are asked of the same images.

    `cells` is a field of round, elongated and atypical cells under a microscope (uint8), with
    debris. Its class is the kind that most of its cells are of. `body` is a section or a volume
    of an abdomen in Hounsfield units (int16) with cysts and tumours in a liver, or none; its class
    is whether there is a lesion, and a patient has one to three images.

    Args:
        kind: "cells" or "body".
        task: which truth examples carry: "classification", "detection" or "segmentation".
        ndim: 2 or 3.
        size: voxels along every axis, or one number an axis; 16 or more.
        count: number of images.
        seed: of everything.
        instances: masks number the cells, or the lesions, instead of naming classes.

    Raises:
        UserError: if an argument is none of these.
    """

    def __init__(
        self,
        kind: str = "cells",
        *,
        task: str = "segmentation",
        ndim: int = 2,
        size: int | Sequence[int] = 64,
        count: int = 400,
        seed: int = 0,
        instances: bool = False,
    ):
        _check_choice("kind", kind, tuple(_NUMBERS))
        _check_choice("task", task, TASKS)
        _check_choice("ndim", ndim, (2, 3))
        if instances and task != "segmentation":
            raise UserError(f"instances is set for {task}; it is a choice of segmentation only")
        if count < 1 or seed < 0:
            raise UserError(f"count is {count} and seed {seed}; count starts at 1, seed at 0")
        self._kind, self._seed = kind, seed
        self._shape = _as_shape(size, ndim)
        self.info = DatasetInfo(
            name=f"phantom {kind}",
            task=task,
            ndim=ndim,
            channels=1,
            class_names=_CLASS_NAMES[kind, "instances" if instances else task],
            kind={"cells": "microscopy (made up)", "body": "CT (made up)"}[kind],
            instances=instances,
            licence="Apache-2.0",
        )
        self.ids: Sequence[str] = [f"{kind}_{row:05d}" for row in range(count)]
        # Cells have no patients: every image is a group of its own.
        groups = [_patient(row) if kind == "body" else row for row in range(count)]
        self.patients: Sequence[str] | None = None
        if kind == "body":
            self.patients = [f"patient_{group:05d}" for group in groups]
        self.labels: Sequence[Any] | None = None  # drawn with the images
        self.parts: Mapping[str, Sequence[int]] = _cut(groups)
        self.notes: Sequence[str] = ["The images are made up; scores say nothing of real ones."]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return self.read(index)

    def read(self, index: int, region: Region | None = None) -> Example:
        """Draw one image, or cut a region out of it; see `jaxmed.types.Source`.

        Raises:
            IndexError: if there is no such row.
        """
        row = row_number(index, len(self))
        scene = self.draw(row)
        example = make_example(scene.image[..., None], index=row, spacing=scene.spacing)
        example.update(self._truth(scene))
        return crop_example(example, region)

    def draw(self, index: int) -> Scene:
        """The scene of one row: its image and all that is known of it, whatever the task."""
        number = _NUMBERS[self._kind]
        rng = np.random.default_rng([self._seed, number, index])
        if self._kind == "cells":
            return draw_cells(rng, self._shape)
        # The third number keeps a patient's stream apart from that of an image.
        patient = Patient.draw(self._seed, number, _patient(index), 1)
        return draw_body(rng, self._shape, patient=patient)

    def cause(self, index: int) -> np.ndarray:
        """Which voxels (*spatial) make an image's class: lesions, or cells of the main kind."""
        scene = self.draw(row_number(index, len(self)))
        chosen = scene.kinds >= 0 if self._kind == "body" else scene.kinds == self._label(scene)
        return np.concatenate([[False], chosen])[scene.objects]

    def _truth(self, scene: Scene) -> Example:
        """The label keys of the task."""
        if self.info.task == "classification":
            return {"label": np.asarray(self._label(scene), np.int32)}
        if self.info.task == "detection":
            return {"boxes": hulls(scene.objects), "box_label": scene.kinds.astype(np.int32)}
        if self.info.instances:
            return {"mask": scene.objects}
        if scene.organ is None:
            classes = np.concatenate([[0], scene.kinds + 1]).astype(np.int32)
            return {"mask": classes[scene.objects]}
        mask = np.where(scene.objects > 0, 2, scene.organ)
        return {"mask": mask.astype(np.int32)}

    def _label(self, scene: Scene) -> int:
        if self._kind == "cells":
            return int(np.argmax(np.bincount(scene.kinds, minlength=len(KINDS))))
        return int(len(scene.kinds) > 0)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")


def _as_shape(size: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    shape = (size,) * ndim if isinstance(size, int) else tuple(int(n) for n in size)
    if len(shape) != ndim:
        raise UserError(f"size is {size}; expected one number, or {ndim} for ndim={ndim}")
    if min(shape) < _SMALLEST:
        raise UserError(f"size is {size}; expected {_SMALLEST} or more, objects would vanish")
    return shape


def _patient(index: int) -> int:
    """Number of the patient of a body image."""
    block, visit = divmod(index, len(_VISITS))
    return 3 * block + _VISITS[visit]


def _cut(groups: Sequence[int]) -> dict[str, list[int]]:
    """Rows of train, val and test, about 70/15/15 in order; a cut never divides a group."""
    count = len(groups)
    borders = [0, *(i for i in range(1, count) if groups[i] != groups[i - 1]), count]
    first, second = (min(b for b in borders if b >= count * part - 1e-9) for part in (0.7, 0.85))
    rows = {
        "train": list(range(first)),
        "val": list(range(first, second)),
        "test": list(range(second, count)),
    }
    return {part: numbers for part, numbers in rows.items() if numbers}
