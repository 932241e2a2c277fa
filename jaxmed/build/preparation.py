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
        """Preprocess `example`, and add what `patches.find_foreground` finds."""
        example = self.prepare(example)
        if "mask" not in example:
            return example
        rng = np.random.default_rng(int(example["index"]))
        return {**example, **patches.find_foreground(example["mask"], rng=rng)}


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


@dataclasses.dataclass(frozen=True)
class HeldExamples:
    """Cases for the device to hold, and what the host keeps of them to choose where to cut.

    Attributes:
        arrays: (cases, ...) each; cases of different sizes are padded to the largest one.
        cases: by row: `index`, `sides` and the foreground.
    """

    arrays: dict[str, np.ndarray]
    cases: dict[int, Example]


def hold_examples(
    read: Callable[[int], Example], rows: Sequence[int], view: TrainingView, *, max_bytes: int
) -> HeldExamples | None:
    """All cases of a set, to be held on the device and cut there.

    Args:
        read: row -> prepared case.
        rows: of the cases.
        view: what training sees of them.
        max_bytes: of all arrays; of a set that takes more, only the first cases are read.

    Returns:
        None where they take more, or differ in their types.
    """
    found: list[Example] = []
    cases: dict[int, Example] = {}
    canvas = np.asarray(view.patch or 0)
    for row in rows:
        example = read(row)
        sides = np.asarray(example["image"].shape[:-1], np.int32)
        kept = {key: example[key] for key in ("index", *patches.FOUND) if key in example}
        cases[row] = {**kept, "sides": sides}
        example = view.finish(example)
        example = {k: np.asarray(v) for k, v in example.items() if k not in ("valid", "index")}
        canvas = np.maximum(canvas, sides)
        found.append(example)
        padded = int(np.prod(canvas)) / int(np.prod(sides)) if view.patch else 1
        if len(rows) * padded * sum(array.nbytes for array in example.values()) > max_bytes:
            return None
        if any(array.dtype != found[0][key].dtype for key, array in example.items()):
            return None  # such as images of several types
    held: dict[str, np.ndarray] = {}
    for place in range(len(rows)):
        example, found[place] = found[place], {}  # given free as the arrays fill
        if view.patch:
            # As `random_patch` pads: the image in the middle of the patch.
            old = example["image"].shape[:-1]
            start = [min(0, (o - new) // 2) for new, o in zip(view.patch, old, strict=True)]
            example = spatial.window(example, start=start, shape=canvas.tolist(), value=view.fill)
        for key, value in example.items():
            if not place:
                held[key] = np.empty((len(rows), *value.shape), value.dtype)
            if value.shape != held[key].shape[1:]:
                return None  # such as images of several numbers of channels
            held[key][place] = value
    return HeldExamples(held, cases)


def cut_held(
    held: Mapping[str, jax.Array], choice: Batch, *, patch: Sequence[int]
) -> dict[str, jax.Array]:
    """The batch that was chosen of what the device holds, as `ChoiceOfView` says it."""

    def one(choice: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        example = {name: choice[name] for name in ("valid", "index")}
        for name, array in held.items():
            if patch and name in ("image", "mask"):
                # One slice, lest the whole case is copied before it is cut.
                rest = array.shape[1 + len(patch) :]
                start = [choice["place"], *choice["corner"], *(0 for _ in rest)]
                example[name] = jax.lax.dynamic_slice(array, start, (1, *patch, *rest))[0]
            else:
                example[name] = array[choice["place"]]
        return example

    return jax.vmap(one)(dict(choice))


def make_training_view(config: ConfigDict) -> TrainingView:
    """The training view that the config describes."""
    data = config.data
    patch = tuple(data.patch) if config.task == "segmentation" else ()
    fill = fill_value(config) if patch else 0.0  # whole images are padded before they get here
    return TrainingView(patch, data.foreground, data.max_boxes, fill)


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
