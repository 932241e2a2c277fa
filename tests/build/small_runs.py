"""Runs that take seconds."""

import jax
import numpy as np

from jaxmed.build import datasets
from jaxmed.build.config import base_config, update
from jaxmed.build.experiment import Experiment
from jaxmed.build.members import plan_members, rows_of
from jaxmed.build.preparation import PrepareForTraining
from jaxmed.build.resolve import cut_folds, resolve, with_own_statistics
from jaxmed.build.training_data import hold_cases, make_batches
from jaxmed.data.cache import Cached

SMALL = {
    "data.count": 40,
    "data.extent": (32,),
    "data.batch_size": 4,
    "training.steps": 4,
    "training.log_every": 1,
    "training.evaluate_every": 2,
    "training.checkpoint_every": 2,
    "evaluation.resamples": 20,
    "evaluation.explain": False,
    "evaluation.familiarity": 0,
    "sharding.devices": 1,
}
NETWORK = {
    "classification": {"model.width": 4, "model.stem_strides": 2},
    "detection": {
        "model.width": 4,
        "model.stem_strides": 2,
        "model.levels": (1, 2),
        "model.head_features": 8,
    },
    "segmentation": {"model.features": (4, 8, 8)},
}


def small_config(task, layout="phantoms", **settings):
    config = base_config(task, layout)
    update(config, {**SMALL, **NETWORK[task], **settings}, where="test")
    return config


def prepared_experiment(task, **settings):
    """A resolved experiment of several models, its data, and their split."""
    config = small_config(task, **{"data.count": 24, "optimizer.ema": 0.9, **settings})
    source = datasets.make_source(config)
    rows = list(range(len(source)))
    split = {"train": rows[:16], "val": rows[16:], "test": []}
    members = plan_members(config)
    if config.training.folds:
        split = cut_folds(config, source, split)
    config, planned, fingerprint = resolve(config, source, rows_of(split, "train"))
    members = with_own_statistics(members, config, source, split, planned)
    return Experiment(config, source.info, fingerprint["class_counts"], members), source, split


def take_steps(experiment, source, split, steps=3):
    """The state after some steps, and the losses."""
    prepared = Cached(source, transform=PrepareForTraining(experiment.prepare), max_bytes=2**30)
    rows = rows_of(split, "train")
    held = hold_cases(experiment, prepared.__getitem__, rows)
    lifted = experiment.lift(None if held is None else held.arrays)
    state, losses = experiment.fresh_state(lifted), []
    cases = None if held is None else held.cases
    with make_batches(experiment, prepared, split, start_step=0, held=cases) as batches:
        for _ in range(steps):
            state, metrics = lifted.step(state, lifted.place_batch(next(batches)))
            losses.append(lifted.fetch(metrics)["loss"])
    return jax.device_get(state.replace(key=None)), np.array(losses)
