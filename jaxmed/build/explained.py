"""What of a case is explained: the image as the network sees it, and a target in it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from jaxmed.build import preparation
from jaxmed.build.trained import TrainedRun, take_members
from jaxmed.explanation import targets
from jaxmed.explanation.explainer import Explainer
from jaxmed.explanation.layers import default_layer, find_layer, list_layers
from jaxmed.preprocessing.spatial import restore_boxes, restore_mask, restore_values, window
from jaxmed.types import Example, UserError

DEFAULT_METHODS = {
    "classification": ("gradcam", "integrated_gradients", "occlusion"),
    # The gradients' mean says nothing of a score at one place.
    "detection": ("hirescam", "integrated_gradients", "occlusion"),
    "segmentation": ("gradcam", "integrated_gradients", "occlusion"),
}
"""Of `jaxmed.explanation.explainer.METHODS`, by task; the first is the cheapest."""


@dataclasses.dataclass(frozen=True)
class Explained:
    """One case, ready to be explained.

    Attributes:
        example: preprocessed; of a segmentation the window around what is explained.
        image: (*spatial, channels) float32, as the network sees it.
        what: of the target, see `jaxmed.explanation.targets`.
        told: what is explained, in words.
        label: name of the class.
        score: probability of the target.
        region: (*spatial) bool in the file's own grid: the box or the mask that is explained; None
            where it is the class of the whole image.
        grid: of the detector's level that the box comes from, else None.
    """

    example: Example
    image: np.ndarray
    what: dict[str, Any]
    told: str
    label: str
    score: float
    region: np.ndarray | None = None
    grid: tuple[int, ...] | None = None


class RunToExplain:
    """A trained run, as explanations need it: one model, its inputs, outputs and targets.

    Args:
        run: trained; of an ensemble the first model is explained.
        layer: name of the layer of Grad-CAM and of features; "" takes the default.
    """

    def __init__(self, run: TrainedRun, *, layer: str = ""):
        experiment = run.experiment
        self.run = run
        self.task = experiment.task
        self._use_member(run.chosen[0] if run.chosen else None)
        self.model = experiment.model
        self.classes = tuple(getattr(self.task, "output_classes", run.info.class_names))
        shape = (1, *preparation.input_shape(self.config), self.config.data.channels)
        self.shape = jax.ShapeDtypeStruct(shape, np.float32)
        self.layers = list_layers(self.model, self.variables, self.shape)
        self.layer = find_layer(self.layers, layer) if layer else None
        self._outputs = jax.jit(functools.partial(self.model.apply, train=False))
        self._predict = jax.jit(self.task.predict)
        self._explainers: dict[str, Explainer] = {}

    @property
    def alone(self) -> TrainedRun:
        """The run with the model that is explained as the only one that predicts."""
        return dataclasses.replace(self.run, chosen=self.run.chosen[:1])

    def of_member(self, place: int | None) -> RunToExplain:
        """The same of another of the models that were trained together, with what is compiled."""
        other = copy.copy(self)
        other.random = self.random  # once for all of them
        other._use_member(place)
        return other

    def _use_member(self, place: int | None) -> None:
        experiment = self.run.experiment
        own = self.run.variables if place is None else take_members(self.run.variables, [place])
        self.config = experiment.config if place is None else experiment.member_configs[place]
        self.variables = jax.device_put(dict(own))
        self.normalize = jax.jit(
            preparation.make_prepare_batch(self.config, experiment.numbers_of(self.config))
        )

    @functools.cached_property
    def random(self) -> Any:
        """Variables of the same network before any training."""
        key = jax.random.key(self.config.seed + 1)
        return self.model.init(key, jnp.zeros(self.shape.shape, jnp.float32))

    def explainer(self, case: Explained) -> Explainer:
        """The compiled methods for a case."""
        layer = self.layer or default_layer(self.layers, grid=case.grid)
        if layer.name not in self._explainers:
            target = {
                "classification": targets.sign_target
                if self.run.info.multilabel
                else targets.class_target,
                "detection": targets.cell_target,
                "segmentation": targets.region_target,
            }[self.run.info.task]
            self._explainers[layer.name] = Explainer(self.model, target, layer=layer)
        return self._explainers[layer.name]

    def input_of(self, example: Example) -> np.ndarray:
        """The image of a preprocessed example as the network sees it."""
        return np.asarray(self.normalize({"image": example["image"][None]})["image"][0])

    def label_of(self, name: str) -> int | None:
        """The number of a class; None for "".

        Raises:
            UserError: there is no such class, or it is a segmentation's background.
        """
        if not name:
            return None
        if name not in self.classes:
            names = ", ".join(self.classes)
            raise UserError(f"--target={name}: the run has no such class; it has {names}")
        return self.classes.index(name)

    def explain(self, example: Example, label: int | None) -> Explained:
        """Choose the target of a preprocessed example.

        Args:
            example: preprocessed, whole.
            label: of the class; None takes the one that the network sees.

        Raises:
            UserError: nothing was found that could be explained.
        """
        if self.run.info.task == "segmentation":
            return self._region(example, label)
        image = self.input_of(example)
        outputs = jax.device_get(self._outputs(self.variables, image[None]))
        if self.run.info.task == "detection":
            return self._box(example, image, outputs, label)
        chosen = int(outputs[0].argmax()) if label is None else label
        what = {"label": np.int32(chosen)}
        return self._finish(example, image, what, self.classes[chosen])

    def _box(
        self, example: Example, image: np.ndarray, outputs: Mapping[str, Any], label: int | None
    ) -> Explained:
        """The box of the highest score, of the class if it is given."""
        found = jax.device_get(self._predict(outputs, {"image": image[None]}))
        labels, boxes = found["labels"][0], found["boxes"][0]
        rows = np.flatnonzero((labels >= 0) & ((labels == label) if label is not None else True))
        if not len(rows):
            name = "" if label is None else f" of {self.classes[label]}"
            raise UserError(f"no box{name} was found in it; choose another --target or image")
        box, chosen = boxes[rows[0]], int(labels[rows[0]])
        shape = image.shape[:-1]
        cell = targets.cell_of_box(
            outputs["logits"][0], outputs["boxes"][0], box, chosen, shape=shape
        )
        sides = np.asarray(outputs["sides"])[cell]
        grid = tuple(int(round(n / s)) for n, s in zip(shape, sides, strict=True))
        restored = restore_boxes(
            box[None],
            scale=example["scale"],
            offset=example["offset"],
            shape=example["shape"].tolist(),
        )[0]
        region = np.zeros(example["shape"], bool)
        low, high = np.split(restored, 2)
        region[
            tuple(
                slice(int(a), max(int(a) + 1, int(np.ceil(b))))
                for a, b in zip(low, high, strict=True)
            )
        ] = True
        what = {"label": np.int32(chosen), "cell": np.int32(cell)}
        place = ", ".join(f"{a:.0f}-{b:.0f}" for a, b in zip(low, high, strict=True))
        told = f"box of {self.classes[chosen]} at {place}"
        case = self._finish(example, image, what, told, region=region)
        return dataclasses.replace(case, label=self.classes[chosen], grid=grid)

    def _region(self, example: Example, label: int | None) -> Explained:
        """The predicted voxels of a class, in the window about the largest part of them."""
        [(_, probabilities)] = self.run.predict([example])
        predicted = probabilities.argmax(-1)
        counts = np.bincount(predicted.ravel(), minlength=len(self.classes))
        chosen = int(counts[1:].argmax()) + 1 if label is None else label
        mask = predicted == chosen
        told = f"{self.classes[chosen]} where it was segmented"
        if not mask.any():
            own = probabilities[..., chosen]
            mask = own >= own.max() / 2
            told = f"{self.classes[chosen]} where it is likeliest (none was segmented)"
        parts, number = scipy.ndimage.label(mask)
        if number > 1:
            mask_of_largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        else:
            mask_of_largest = mask
        sides, patch = mask.shape, preparation.input_shape(self.config)
        middle = [float(x) for x in scipy.ndimage.center_of_mass(mask_of_largest)]
        start = [
            min(0, (side - wide) // 2)
            if side < wide
            else int(np.clip(round(c - wide / 2), 0, side - wide))
            for c, side, wide in zip(middle, sides, patch, strict=True)
        ]
        whole = {**example, "mask": mask.astype(np.int32)}
        fill = preparation.fill_value(self.config)
        cut = window(whole, start=start, shape=patch, value=fill)
        region = np.maximum(cut.pop("mask"), 0)
        if any(side > wide for side, wide in zip(sides, patch, strict=True)):
            told += f", window of {' x '.join(map(str, patch))} about its largest part"
        what = {"label": np.int32(chosen), "region": region.astype(np.float32)}
        shown = restore_mask(
            region.astype(np.int32),
            scale=cut["scale"],
            offset=cut["offset"],
            shape=cut["shape"].tolist(),
        )
        case = self._finish(cut, self.input_of(cut), what, told, region=shown > 0)
        return dataclasses.replace(case, label=self.classes[chosen])

    def _finish(
        self,
        example: Example,
        image: np.ndarray,
        what: dict[str, Any],
        told: str,
        *,
        region: np.ndarray | None = None,
    ) -> Explained:
        case = Explained(example, image, what, told, told, 0.0, region)
        score = self.explainer(case).probability(self.variables, image, what)
        return dataclasses.replace(case, score=score)


def restore_map(found: np.ndarray, example: Example) -> np.ndarray:
    """A map on the grid that the network sees, in the grid of the file."""
    return restore_values(
        found[..., None],
        scale=example["scale"],
        offset=example["offset"],
        shape=example["shape"].tolist(),
    )[..., 0]
