"""From files to what the network sees: preprocessing on the host, the view of it, the cast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.config import choose
from jaxmed.preprocessing import intensity, patches, spatial
from jaxmed.types import Batch, Example


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Deterministic preprocessing of one case on the host; the same for training and evaluation.

    A class, not a closure, so that worker processes of the loader can be given it.

    Attributes:
        channels: of the network's input.
        size: spatial shape of whole images; empty for tasks that look at patches.
        fit: how an image gets its `size`: "stretch" or "pad".
        spacing: mm to resample to, or empty.
        normalization: a key of `intensity.NORMALIZATIONS`, or "dataset" (done on the device).
        options: of the normalisation.
    """

    channels: int
    size: tuple[int, ...] = ()
    fit: str = "stretch"
    spacing: tuple[float, ...] = ()
    normalization: str = "dataset"
    options: tuple[tuple[str, float], ...] = ()

    def __call__(self, example: Example) -> Example:
        """Preprocess `example`; `scale`, `offset` and `spacing` say what became of its grid."""
        example = spatial.convert_channels(example, channels=self.channels)
        if self.spacing:
            example = spatial.resample(example, spacing=self.spacing)
        # Before any padding, which must not count in an image's own mean and deviation.
        if self.normalization != "dataset":
            known = {"dataset": None, **intensity.NORMALIZATIONS}
            normalize = choose(known, self.normalization, key="data.normalization")
            example = normalize(example, **dict(self.options))
        if self.size:
            change = choose(
                {"stretch": spatial.resize, "pad": spatial.fit}, self.fit, key="data.fit"
            )
            example = change(example, shape=self.size)
        return example


@dataclasses.dataclass(frozen=True)
class PrepareForTraining:
    """Preprocessing, and where the foreground is: searched once a case, not once a patch.

    Attributes:
        prepare: the preprocessing.
    """

    prepare: Prepare

    def __call__(self, example: Example) -> Example:
        """Preprocess `example`; `foreground` are positions for `patches.random_patch`."""
        example = self.prepare(example)
        if "mask" not in example:
            return example
        rng = np.random.default_rng(int(example["index"]))
        return {**example, "foreground": patches.foreground_positions(example["mask"], rng=rng)}


def make_prepare(config: ConfigDict) -> Prepare:
    """The preprocessing that the config describes."""
    data = config.data
    options: tuple[tuple[str, float], ...] = ()
    if data.normalization == "window":
        options = (("level", data.window[0]), ("width", data.window[1]))
    segmentation = config.task == "segmentation"
    return Prepare(
        channels=data.channels,
        size=() if segmentation else tuple(data.size),
        fit=data.fit,
        spacing=tuple(data.spacing),
        normalization=data.normalization,
        options=options,
    )


@dataclasses.dataclass(frozen=True)
class TrainingView:
    """What the training batch holds of a prepared case: a patch, or the case with padded boxes.

    Attributes:
        patch: spatial shape to cut at random, or empty.
        foreground: share of patches around foreground.
        max_boxes: of a padded case with boxes.
        fill: of a patch beyond the image.
    """

    patch: tuple[int, ...] = ()
    foreground: float = 0.33
    max_boxes: int = 0
    fill: float = 0.0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The view of `example` that `rng` chooses; shapes are the same for every case."""
        if self.patch:
            example = patches.random_patch(
                example,
                shape=self.patch,
                rng=rng,
                foreground=self.foreground,
                value=self.fill,
            )
        if "boxes" in example:
            example = patches.pad_boxes(example, max_boxes=self.max_boxes)
        keep = ("image", "label", "mask", "boxes", "box_label", "spacing", "valid", "index")
        return {key: example[key] for key in keep if key in example}


def make_training_view(config: ConfigDict) -> TrainingView:
    """The training view that the config describes."""
    data = config.data
    patch = tuple(data.patch) if config.task == "segmentation" else ()
    return TrainingView(patch, data.foreground, data.max_boxes, fill_value(config))


def fill_value(config: ConfigDict) -> float:
    """What is beyond the image: the set's mean, or the 0 that normalised images are about."""
    if config.data.normalization != "dataset":
        return 0.0
    return float(np.mean(config.data.intensity.mean))


def input_shape(config: ConfigDict) -> tuple[int, ...]:
    """Spatial shape of the network's input."""
    return tuple(config.data.patch if config.task == "segmentation" else config.data.size)


def make_prepare_batch(config: ConfigDict) -> Callable[[Batch], Batch]:
    """Cast images to float32 on the device, and scale them by the set's own statistics."""
    data = config.data
    if data.normalization != "dataset":
        return lambda batch: {**batch, "image": batch["image"].astype(jnp.float32)}
    mean, std = (jnp.asarray(x, jnp.float32) for x in (data.intensity.mean, data.intensity.std))
    clip = tuple(data.intensity.clip)

    def prepare(batch: Batch) -> Batch:
        image = batch["image"].astype(jnp.float32)
        if clip:
            image = jnp.clip(image, jnp.asarray(clip[0]), jnp.asarray(clip[1]))
        return {**batch, "image": (image - mean) / std}

    return prepare
