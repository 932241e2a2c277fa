"""From files to what the network sees: preprocessing on the host, the view of it, the cast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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
        return self.finish(example)

    def finish(self, example: Example) -> Example:
        """A fixed number of boxes, and no more keys than the step needs."""
        if "boxes" in example:
            example = patches.pad_boxes(example, max_boxes=self.max_boxes)
        keep = ("image", "label", "mask", "boxes", "box_label", "spacing", "valid", "index")
        return {key: example[key] for key in keep if key in example}


@dataclasses.dataclass(frozen=True)
class ChoiceOfView:
    """The same view of a case that the device holds: which case, and where to cut.

    It draws what `TrainingView` draws, so training sees the same, bit for bit.

    Attributes:
        view: what would be cut on the host.
        places: by row, where the device holds the case.
    """

    view: TrainingView
    places: Mapping[int, int]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """`place`, and the `corner` of a patch."""
        chosen = {"place": np.asarray(self.places[int(example["index"])], np.int32)}
        if not self.view.patch:
            return chosen
        corner = patches.random_corner(
            example, shape=self.view.patch, rng=rng, foreground=self.view.foreground
        )
        # Where the image is smaller than the patch it lies padded on the device already.
        return {**chosen, "corner": np.maximum(np.asarray(corner, np.int32), 0)}


def hold_examples(
    source: Any, rows: Sequence[int], view: TrainingView, *, max_bytes: int
) -> dict[str, np.ndarray] | None:
    """All cases of a set as arrays (cases, ...), to be held on the device and cut there.

    Cases of different sizes are padded to the largest one, or to the patch.

    Args:
        source: with prepared cases.
        rows: of the cases.
        view: what training sees of them.
        max_bytes: of all arrays.

    Returns:
        None where they take more.
    """
    shapes = np.array([source[row]["image"].shape[:-1] for row in rows])
    canvas = np.maximum(shapes.max(0), view.patch or 0).tolist()
    held: dict[str, np.ndarray] = {}
    for place, row in enumerate(rows):
        example = view.finish(source[row])
        if view.patch:
            # As `random_patch` pads: the image in the middle of the patch.
            sides = example["image"].shape[:-1]
            start = [min(0, (old - new) // 2) for new, old in zip(view.patch, sides, strict=True)]
            example = spatial.window(example, start=start, shape=canvas, value=view.fill)
        if not held:
            each = {k: np.asarray(v) for k, v in example.items() if k not in ("valid", "index")}
            if len(rows) * sum(v.nbytes for v in each.values()) > max_bytes:
                return None
            held = {k: np.empty((len(rows), *v.shape), v.dtype) for k, v in each.items()}
        for key, array in held.items():
            if np.shape(example[key]) != array.shape[1:] or example[key].dtype != array.dtype:
                return None  # such as images of several types
            array[place] = example[key]
    return held


def cut_held(
    held: Mapping[str, jax.Array], choice: Batch, *, patch: Sequence[int]
) -> dict[str, jax.Array]:
    """The batch that was chosen of what the device holds, as `ChoiceOfView` says it."""

    def one(choice: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        example = {name: array[choice["place"]] for name, array in held.items()}
        if patch:
            for name in ("image", "mask"):
                if name in example:
                    array = example[name]
                    rest = array.ndim - len(patch)
                    start = [*choice["corner"], *(0,) * rest]
                    size = (*patch, *array.shape[len(patch) :])
                    example[name] = jax.lax.dynamic_slice(array, start, size)
        return {**example, **{name: choice[name] for name in ("valid", "index")}}

    return jax.vmap(one)(dict(choice))


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


def make_prepare_batch(
    config: ConfigDict, numbers: Mapping[str, Any] | None = None
) -> Callable[[Batch], Batch]:
    """Cast images to float32 on the device, and scale them by the set's own statistics.

    Args:
        config: resolved.
        numbers: by key of the config, traced values to take in place of its own.
    """
    data = config.data
    if data.normalization != "dataset":
        return lambda batch: {**batch, "image": batch["image"].astype(jnp.float32)}
    known = {f"data.intensity.{name}": data.intensity[name] for name in ("mean", "std", "clip")}
    mean, std, clip = ({**known, **(numbers or {})}[name] for name in known)
    mean, std, clip = (jnp.asarray(x, jnp.float32) for x in (mean, std, clip))

    def prepare(batch: Batch) -> Batch:
        image = batch["image"].astype(jnp.float32)
        if clip.size:
            image = jnp.clip(image, clip[0], clip[1])
        return {**batch, "image": (image - mean) / std}

    return prepare
