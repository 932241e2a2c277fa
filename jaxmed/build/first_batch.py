"""The picture of the first batch, to be looked at before anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.build import pieces, preparation
from jaxmed.build.experiment import Experiment
from jaxmed.build.preparation import PrepareForTraining
from jaxmed.data.loader import training_batches
from jaxmed.evaluation.pictures import draw_batch
from jaxmed.training.step import example_keys
from jaxmed.types import Source


def draw_first_batch(
    experiment: Experiment, source: Source, rows: Sequence[int], path: Path
) -> None:
    """Picture the first batch as the network sees it, augmented, with its labels."""
    config = experiment.member_configs[0] if experiment.members else experiment.config
    prepare_batch = preparation.make_prepare_batch(config)
    augment = pieces.make_augment(config, experiment.info)
    view = preparation.make_training_view(config)
    size = min(config.data.batch_size, 16)
    with training_batches(
        source,
        rows,
        batch_size=size,
        seed=config.seed,
        prepare=_Both(PrepareForTraining(experiment.prepare), view),
    ) as batches:
        batch = next(batches)

    @jax.jit
    def augmented(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        batch = prepare_batch(batch)
        if augment is None:
            return batch
        # The key that a fresh state keeps for its steps.
        step_key = jax.random.split(jax.random.key(config.seed))[1]
        key = jax.random.split(jax.random.fold_in(step_key, 0))[0]
        return jax.vmap(augment)(example_keys(key, batch, axis_name=None), batch)

    draw_batch(jax.device_get(augmented(batch)), experiment.info.class_names, path)


@dataclasses.dataclass(frozen=True)
class _Both:
    """Preprocessing and the training view in one."""

    prepare: Any
    view: Any

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> Any:
        return self.view(self.prepare(example), rng)
