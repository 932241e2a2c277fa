"""An exported model: from an image to what it shows, on the image's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import grids
from .boxes import select_boxes
from .contents import Contents, ModelError
from .decisions import decide
from .files import supported
from .instances import separate_instances
from .programs import Run, load_program
from .windows import predict_windows

LARGE = 2**24
"""Pixels beyond which jaxmed searches a picture part by part, and squeezes it into no network."""


def load(path: str | Path) -> Model:
    """Open an artefact: the zip file, or the folder with an ONNX network.

    Raises:
        ModelError: it is no such thing, damaged, or of another version.
    """
    contents = Contents(path)
    description = contents.description()
    return Model(description, load_program(contents, description))


class Model:
    """Predicts one image after another.

    Args:
        description: what the artefact says of itself.
        run: the network.
    """

    def __init__(self, description: dict[str, Any], run: Run):
        self.description = description
        self.run = run

    @property
    def class_names(self) -> list[str]:
        """In the order of the probabilities; of masks the background first."""
        return self.description["class_names"]

    def predict(self, image: np.ndarray, *, spacing: Sequence[float] | None = None) -> Any:
        """What the network makes of one image, on the image's own grid.

        Args:
            image: (*spatial, channels) or (*spatial): pictures (rows, columns), volumes (x, y, z)
                in RAS order; uint8, int16 or float32 as in the file. Other types become the first
                of these that holds all their values.
            spacing: mm a voxel, one number an axis; needed where the model resamples.

        Returns:
            Probabilities (classes,); or a dict of boxes ([low..., high...] in the order of the
            array's axes), scores and labels; or a mask (*spatial) int32.

        Raises:
            ModelError: the image is not of the kind that the model takes, or the network predicts
                what is no number.
        """
        image = self._checked(supported(np.asarray(image)))
        ndim = image.ndim - 1
        if spacing is None and (trained := self.description["prepare"]["spacing"]):
            raise ModelError(f"give spacing, in mm: the model resamples to {trained}")
        sides = np.asarray(np.ones(ndim) if spacing is None else spacing, np.float32)
        if sides.shape != (ndim,) or not ((sides > 0) & np.isfinite(sides)).all():
            raise ModelError(f"spacing is {spacing}; expected {ndim} positive numbers of mm")
        if self.description["task"] == "detection" and ndim == 2 and image[..., 0].size > LARGE:
            raise ModelError(
                f"image has shape {image.shape}; pictures of more than {LARGE} pixels are searched "
                "part by part, by jaxmed's predict.py alone: cut it into tiles"
            )
        try:
            prepared = grids.prepare(image, sides, self.description["prepare"])
        except ValueError as error:
            raise ModelError(f"image {error}") from error
        task = self.description["task"]
        if task == "segmentation":
            return self._mask(prepared)
        found = {name: x[0] for name, x in self.run(_float(prepared.image)[None]).items()}
        _check_finite(*found.values())
        return found["probabilities"] if task == "classification" else self._boxes(found, prepared)

    def decide(self, probabilities: np.ndarray) -> dict[str, Any]:
        """What a classification decides by the operating point of its validation part, if any.

        Returns:
            `calibrated` probabilities, the class names `decision` and of the conformal `set`; of
            several labels at once no set. {} where nothing was fixed.
        """
        return decide(probabilities, self.description["decisions"], self.class_names)

    def _mask(self, prepared: grids.Prepared) -> np.ndarray:
        rules = self.description["windows"]
        probabilities = predict_windows(
            lambda images: self.run(images)["probabilities"],
            prepared.image,
            window=rules["size"],
            overlap=rules["overlap"],
            fill=rules["fill"],
            batch_size=rules["batch"],
        )
        _check_finite(probabilities)
        if self.description["instances"]:
            smallest = self.description["smallest"]
            numbers = separate_instances(probabilities, smallest=smallest)
            return grids.restore_mask(numbers, prepared)
        return grids.restore_mask(probabilities, prepared)

    def _boxes(
        self, found: dict[str, np.ndarray], prepared: grids.Prepared
    ) -> dict[str, np.ndarray]:
        if "labels" not in found:
            found = select_boxes(found["boxes"], found["scores"], **self.description["suppression"])
        boxes = grids.restore_boxes(found["boxes"], prepared)
        low, high = np.split(boxes, 2, axis=-1)
        # Padding has no label, and what lies in the padding of an image no extent in it.
        kept = (found["labels"] >= 0) & (high > low).all(-1)
        return {
            "boxes": boxes[kept],
            "scores": found["scores"][kept],
            "labels": found["labels"][kept],
        }

    def _checked(self, image: np.ndarray) -> np.ndarray:
        """The image with its channels, if it is what the model takes."""
        ndim, rules = self.description["ndim"], self.description["trained_on"]
        if image.ndim == ndim and (ndim == 2 or image.shape[-1] not in (3, 4)):
            image = image[..., None]
        if image.ndim != ndim + 1 or 0 in image.shape:
            raise ModelError(
                f"image has shape {image.shape}; the model takes {ndim} spatial axes: give "
                "(*spatial, channels)"
            )
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise ModelError("image holds NaN or infinite values; repair it")
        found, wanted = image.shape[-1], rules["channels"]
        coloured = found > 1 and (image[..., :1] != image[..., 1:3]).any()
        if coloured and wanted == 1 and rules["gray_only"]:
            raise ModelError(f"image has {found} channels; the model was trained on gray images")
        if found != wanted and (ndim != 2 or {found, wanted} != {1, 3}):
            raise ModelError(f"image has {found} channels; the model takes {wanted}")
        if self.description["prepare"]["normalization"] == "dataset":
            deep = rules["dtypes"] == ["uint8"] and image.dtype != np.uint8
            if deep or (image.dtype == np.uint8 and "uint8" not in rules["dtypes"]):
                raise ModelError(
                    f"image is of {image.dtype}; the model was trained on "
                    f"{', '.join(rules['dtypes'])} and scales by that set's mean: convert it"
                )
        return image


def _check_finite(*arrays: np.ndarray) -> None:
    if any(np.isnan(array).any() for array in arrays):
        raise ModelError(
            "the network predicts what is no number (NaN): the image holds extreme values, or, "
            "where all images fare alike, its training diverged"
        )


def _float(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image, np.float32)
