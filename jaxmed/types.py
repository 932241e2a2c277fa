"""The vocabulary that every room speaks: examples, batches, data sets, and checks at the border."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

Example = dict[str, Any]
"""One case on the host: arrays, or what `np.asarray` makes one and a region can be cut out of, as
`jaxmed.data.records.BlockedArray`. Keys, each present only where it is known:

    image      (*spatial, channels) uint8, int16 or float32
    spacing    (ndim,) float32, mm a voxel (1 where unknown)
    label      () int32, or (classes,) int32 of 0 and 1 for multi-label
    mask       (*spatial) int32 class or instance numbers; 0 is background, -1 is ignored
    boxes      (boxes, 2 * ndim) float32, [low..., high...] per array axis in voxels, half-open
    box_label  (boxes,) int32; -1 is padding
    valid      () float32, 0 for padding
    index      () int32, row in the source
    shape      (ndim,) int32, spatial shape in the file's own grid, before any preprocessing
    scale      (ndim,) float32 and
    offset     (ndim,) float32: position here = position in the file's grid * scale + offset
"""
Batch = dict[str, jax.Array]
"""The keys of an Example, each with a leading batch axis."""

Row = dict[str, Any]
"""Scores of one case by name: numbers, or arrays that only the task knows how to summarise."""

Region = tuple[slice, ...]
"""A part of an image: one slice a spatial axis."""

Transform = Callable[[Example], Example]
"""Deterministic, on the host."""

Number = float | jax.Array
"""A number that may be traced, such as one in which models trained together differ."""
Augment = Callable[[jax.Array, dict[str, jax.Array]], dict[str, jax.Array]]
"""Random, on the device, one example at a time: (key, example) -> example."""


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "image"), count_of(2, "image")
    ('1 image', '2 images')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


TASKS = ("classification", "detection", "segmentation")


class UserError(ValueError):
    """A mistake that the user can mend: what names the file or key, and what to do, a line each.

    The command line prints it without a traceback and ends with exit code 2.
    """


class NotFiniteError(UserError):
    """A network's predictions are no numbers."""


class ChannelsError(UserError):
    """An image of another number of channels than the first of its set, and otherwise whole."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without reading its images.

    Attributes:
        name: short name, for titles.
        task: "classification", "detection" or "segmentation".
        ndim: spatial axes of an image, 2 or 3.
        channels: channels of an image.
        class_names: index is class number; of a segmentation, entry 0 is the background.
        kind: where images come from, such as "X-ray" or "MRI"; free text.
        multilabel: whether several classes may hold at once (classification).
        instances: whether masks hold instance numbers instead of classes (segmentation).
        licence: licence of the images, if known.
        citation: whom to cite, if known.
    """

    name: str
    task: str
    ndim: int
    channels: int
    class_names: tuple[str, ...]
    kind: str = ""
    multilabel: bool = False
    instances: bool = False
    licence: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        if self.ndim not in (2, 3):
            raise ValueError(f"ndim is {self.ndim}; expected 2 or 3")


@runtime_checkable
class Source(Protocol):
    """Where examples come from; also a Grain RandomAccessDataSource."""

    @property
    def info(self) -> DatasetInfo:
        """What is known of the set."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """One name a case, unique, free of patient names."""
        ...

    @property
    def patients(self) -> Sequence[str] | None:
        """One patient (or other group that must not be split) a case, or None."""
        ...

    @property
    def labels(self) -> Sequence[Any] | np.ndarray | None:
        """Class of each case, or (classes,) of 0 and 1, which splits spread evenly.

        Where images have one (classification) and it is known without reading them; None elsewhere.
        """
        ...

    @property
    def parts(self) -> Mapping[str, Sequence[int]]:
        """The rows of each given part: "train", "val", "test", and "none" for those not to be used.

        Empty where none is given.
        """
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What was odd about the set and was repaired or left out, a sentence each."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def read(self, index: int, region: Region | None = None) -> Example:
        """One case, or a part of it, in the file's own grid."""
        ...


@runtime_checkable
class Task(Protocol):
    """The one place where classification, detection and segmentation differ.

    Attributes:
        main_score: name of the summarised score that chooses the best checkpoint; higher is better.
    """

    main_score: str

    def loss(
        self,
        apply: Callable[..., tuple[Any, Any]],
        batch: Batch,
        *,
        key: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss of the global batch, and `{"model_state": ..., "metrics": {...}}`.

        `apply(images, key=key)` runs the network in training mode and returns its outputs and its
        new model state. `total(x)` turns a sum over the local batch into one over the global batch.
        """
        ...

    def predict(self, outputs: Any, batch: Batch) -> Any:
        """Turn outputs into predictions on the device; keeps the batch axis."""
        ...

    def combine(self, predictions: Any) -> Any:
        """One prediction from those of several models, along the first axis; on the device."""
        ...

    def restore(self, prediction: Any, example: Example) -> Any:
        """Put the prediction for one preprocessed example into the file's own grid, on the host."""
        ...

    def observe(self, prediction: Any, example: Example) -> Row:
        """What `score` needs of a prediction on the preprocessed grid, before it is restored.

        Args:
            prediction: of one case.
            example: preprocessed; has labels only where they are known.
        """
        ...

    def score(self, prediction: Any, example: Example) -> Row:
        """Scores of one restored prediction against the example as its source returns it.

        The example may also have what `observe` noted.
        """
        ...

    def describe(self, row: Row) -> dict[str, float | str]:
        """What to tell of one scored case; `score`, the higher the better, ranks cases."""
        ...

    def summarize(self, rows: Sequence[Row], *, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of the whole set under each row of `weights` (resamples, cases)."""
        ...


def check_example(example: Example, info: DatasetInfo, *, where: str) -> None:
    """Check one example against what its source promises, in shape, type and range.

    Args:
        example: as a source returns it.
        info: of the source.
        where: the file or case to name in an error.

    Raises:
        UserError: with what was found and what was expected.
    """
    image = example["image"]
    if image.ndim != info.ndim + 1:
        raise UserError(
            f"{where}: image has shape {image.shape}; expected {info.ndim} axes and channels"
        )
    if image.shape[-1] != info.channels:
        raise ChannelsError(
            f"{where}: image has {image.shape[-1]} channels, most images of the set have "
            f"{info.channels}; convert the files, or set --config.data.channels=1 or 3 for all"
        )
    if 0 in image.shape:
        raise UserError(f"{where}: image is empty, shape {image.shape}")
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise UserError(
            f"{where}: image holds NaN or infinite values; repair or leave out the file"
        )
    mask = example.get("mask")
    if mask is not None:
        if mask.shape != image.shape[:-1]:
            raise UserError(
                f"{where}: mask has shape {mask.shape}, its image {image.shape[:-1]}; "
                "they must be on the same grid"
            )
        if not info.instances and (mask.min() < -1 or mask.max() >= len(info.class_names)):
            raise UserError(
                f"{where}: mask holds labels {mask.min()} to {mask.max()}; expected 0 to "
                f"{len(info.class_names) - 1} ({', '.join(info.class_names)}) or -1 for ignored"
            )
    if "label" in example and not info.multilabel:
        label = int(example["label"])
        if not 0 <= label < len(info.class_names):
            raise UserError(
                f"{where}: label {label} is outside the class list 0 to "
                f"{len(info.class_names) - 1} ({', '.join(info.class_names)})"
            )
