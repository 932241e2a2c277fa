"""What predicts a batch: one program of networks, mirrored views and draws of dropout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmed.build import preparation
from jaxmed.build.checks import mirrored_axes
from jaxmed.inference.uncertainty import entropy
from jaxmed.models.blocks import dropout_by
from jaxmed.types import DatasetInfo, Task


def make_forward(
    config: ConfigDict,
    info: DatasetInfo,
    model: Any,
    task: Task,
    *,
    ensemble: bool,
    uncertain: bool,
) -> Callable[..., Any]:
    """A jitted `(variables, numbers, batch) -> predictions`, the mean of all samples.

    Args:
        config: resolved.
        info: of the data set.
        model: the network.
        task: what its outputs mean.
        ensemble: variables and numbers have models along their first axis, whose predictions are
            combined in the same program.
        uncertain: predictions also have the mean of the samples' entropies, as
            `jaxmed.inference.uncertainty.split_uncertainty` takes them; not of boxes.
    """
    views = _views(config, info)
    dense, draws = info.task == "segmentation", config.evaluation.dropout_samples

    def see(variables: Any, batch: dict[str, jax.Array], axes: tuple[int, ...]) -> Any:
        """Of the batch mirrored along some axes, mirrored back."""
        image = jnp.flip(batch["image"], axes) if axes else batch["image"]
        outputs = model.apply(variables, image, train=False)
        found = task.predict(outputs, {**batch, "image": image})
        found = jnp.flip(found, axes) if axes and dense else found
        if not uncertain:
            return found
        own = entropy(found, multilabel=info.multilabel)[..., None]
        return jnp.concatenate([found, own], axis=-1)

    def predict(variables: Any, numbers: Mapping[str, Any], batch: dict[str, jax.Array]) -> Any:
        batch = preparation.make_prepare_batch(config, numbers)(batch)

        def sample() -> Any:
            found = [see(variables, batch, axes) for axes in views]
            return found[0] if len(found) == 1 else sum(found) / len(found)

        def dropped(key: jax.Array) -> Any:
            with dropout_by(key, numbers.get("model.dropout", config.model.dropout)):
                return sample()

        if not draws:
            return sample()
        return jax.lax.map(dropped, jax.random.split(jax.random.key(config.seed), draws)).mean(0)

    def predict_several(variables: Any, numbers: Any, batch: dict[str, jax.Array]) -> Any:
        # One after another, so that the memory for their insides is that of one.
        each = jax.lax.map(lambda own: predict(own[0], own[1], batch), (variables, numbers))
        return task.combine(each)

    return jax.jit(predict_several if ensemble else predict)


def _views(config: ConfigDict, info: DatasetInfo) -> list[tuple[int, ...]]:
    """The axes of a batch of images that each view is mirrored along."""
    if not config.evaluation.flips:
        return [()]
    every = [axis + 1 for axis in mirrored_axes(config, info)]
    counts = range(len(every) + 1)
    return [axes for count in counts for axes in itertools.combinations(every, count)]
