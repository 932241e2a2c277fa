"""Predict pictures too large to be held at float32, such as whole slides, part by part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.trained import TrainedRun, check_image
from jaxmed.data.formats.dicom_seg import check_available
from jaxmed.data.images import Image, image_shape, read_image, read_region, reads_regions
from jaxmed.data.sources.base import make_example
from jaxmed.inference.banded_image import BandedImage
from jaxmed.inference.predictor import check_finite
from jaxmed.inference.sliding_window import window_regions
from jaxmed.inference.standalone.model import LARGE
from jaxmed.inference.tiles import cores, merge_boxes
from jaxmed.inference.writers import BoxWriter, MaskWriter
from jaxmed.preprocessing.gathered import normalization_of_whole
from jaxmed.preprocessing.spatial import convert_channels, resampled_shape
from jaxmed.types import Example, UserError

_ROWS = 256
"""Rows read at a time where statistics of the whole are gathered."""

_LEAST_SCORE = 0.01
"""Boxes below it are left out, as a picture of any size may have any number of boxes."""


def is_large(path: Path, run: TrainedRun) -> bool:
    """Whether a file is predicted by `predict_large`: a picture of more than `LARGE` pixels.

    Raises:
        UserError: its header cannot be read.
    """
    if run.info.ndim != 2 or run.info.task == "classification" or path.is_dir():
        return False
    shape = image_shape(path)
    return len(shape) == 3 and math.prod(shape[:-1]) > LARGE


def predict_large(
    path: Path, index: int, name: str, run: TrainedRun, writer: Any
) -> tuple[str, tuple[str, ...]]:
    """Predict one large picture and hand it to the writer.

    Segmentation is the same as of the whole: only windows are held, and of instances the rows that
    they reach over. Detection sees tiles as large as the images it was trained on, each as a case
    of its own; boxes are those whose centre lies nearer to the middle of their tile than to that
    of another, after suppression over all tiles.

    Args:
        path: of the file.
        index: of the file among all that are predicted.
        name: of the file.
        run: a 2-D segmentation or detection.
        writer: a MaskWriter or BoxWriter.

    Returns:
        What to say of it, and what its reader noted.

    Raises:
        UserError: the file is broken, or would have to be resampled.
    """
    picture = _LargePicture(path, run)
    if isinstance(writer, MaskWriter):
        bands = run.predict.bands(picture.prepared)
        rows = run.experiment.task.restore_bands(bands)
        told = writer.add_rows(name, picture.corner, rows, shape=picture.shape[:-1])
    else:
        assert isinstance(writer, BoxWriter)
        told = writer.add(index, name, picture.corner, _detect(picture, run))
    return told, tuple(picture.notes)


class _LargePicture:
    """A picture on disk, whose parts are read, checked and normalised when asked for.

    Attributes:
        shape: (rows, columns, channels) of the file.
        corner: the first pixel with the geometry of the file.
        prepared: the whole, ready for the network, on the file's own grid.
        notes: of the reader, on the parts read so far.
    """

    def __init__(self, path: Path, run: TrainedRun):
        self._path = path
        self._run = run
        self._prepare = run.experiment.prepare
        self.shape = image_shape(path)
        self.notes: dict[str, None] = {}  # in the order they came
        self._whole: Image | None = None
        if not reads_regions(path):
            self._whole = read_image(path)  # at the depth of the file, which is mostly 8 bits
        self.corner = self._read((slice(0, 1), slice(0, 1)))
        if run.info.task == "segmentation":
            self._check_spacing()
            if self.corner.kind == "dicom":
                check_available(path)  # before the work
        self.prepared = BandedImage(self._prepared_rows, (*self.shape[:-1], self._prepare.channels))

    def _check_spacing(self) -> None:
        wanted, sides = self._prepare.spacing, self.shape[:-1]
        if wanted and resampled_shape(sides, self.corner.spacing, wanted) != sides:
            given = " x ".join(f"{mm:g}" for mm in self.corner.spacing)
            raise UserError(
                f"{self._path}: {sides[0]} x {sides[1]} pixels of {given} mm; images of more than "
                f"{LARGE} pixels are not resampled to the run's data.spacing "
                f"{' x '.join(f'{mm:g}' for mm in wanted)}: save it with that spacing"
            )

    def _read(self, region: tuple[slice, slice]) -> Image:
        if self._whole is None:
            part = read_region(self._path, region)
        else:
            part = dataclasses.replace(self._whole, array=self._whole.array[region])
        self.notes.update(dict.fromkeys(part.notes))
        return part

    def _rows(self, rows: slice) -> np.ndarray:
        """Rows with the network's channels, checked, in the type of the file."""
        array = self._read((rows, slice(0, self.shape[1]))).array
        check_image(self._run, array, str(self._path))
        return convert_channels({"image": array}, channels=self._prepare.channels)["image"]

    @cached_property
    def _normalize(self) -> Any:
        if self._prepare.normalization == "dataset":  # on the device
            return lambda example: example
        height, width = self.shape[:-1]
        return normalization_of_whole(
            self._prepare.normalization,
            lambda: (self._rows(slice(i, min(i + _ROWS, height))) for i in range(0, height, _ROWS)),
            pixels=height * width,
            **dict(self._prepare.options),
        )

    def _prepared_rows(self, rows: slice) -> np.ndarray:
        return self._normalize({"image": self._rows(rows)})["image"]


def _detect(picture: _LargePicture, run: TrainedRun) -> dict[str, np.ndarray]:
    """Boxes, scores and labels in the file's own grid."""
    shape = picture.shape[:-1]
    # Runs of before it was noted take tiles of the network's input.
    typical = run.run["data"].get("median_shape") or run.experiment.config.data.size
    tile = [min(a, b) for a, b in zip(typical, shape, strict=True)]
    regions = window_regions(shape, tile, overlap=run.experiment.config.evaluation.overlap)
    prepare = dataclasses.replace(run.experiment.prepare, normalization="dataset")

    def examples() -> Iterator[Example]:
        for number, region in enumerate(regions):
            part = picture.prepared[region]
            spacing = picture.corner.spacing
            yield prepare(make_example(part, index=number, spacing=spacing))

    found: list[dict[str, np.ndarray]] = []
    for (example, raw), region, core in zip(
        run.predict(examples()), regions, cores(regions), strict=True
    ):
        boxes = run.experiment.task.restore(check_finite(raw), example)
        low = np.array([part.start for part in region], np.float32)
        boxes["boxes"] = boxes["boxes"] + np.concatenate([low, low])
        kept = (boxes["scores"] >= _LEAST_SCORE) & core.holds(boxes["boxes"])
        found.append({key: value[kept] for key, value in boxes.items()})
    return merge_boxes(found, iou_threshold=run.experiment.task.iou_threshold)
