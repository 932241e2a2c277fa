"""Runs that take seconds."""

import jax
import numpy as np

from jaxmed.build import datasets
from jaxmed.build.config import base_config, update, write_json
from jaxmed.build.experiment import Experiment
from jaxmed.build.members import plan_members, rows_of
from jaxmed.build.preparation import PrepareForTraining
from jaxmed.build.resolve import cut_folds, resolve, with_own_statistics
from jaxmed.build.training_data import hold_cases, make_batches
from jaxmed.build.workdir import describe_run
from jaxmed.data.cache import Cached
from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.state import TrainState

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


def untrained_run(workdir, task, **settings):
    """A workdir as training leaves it, of random weights, without a step taken or compiled.

    Returns the experiment, its data and their split.
    """
    experiment, source, split = prepared_experiment(task, **{"optimizer.ema": 0.0, **settings})
    rng = np.random.default_rng(0)

    def drawn(like):
        # Positive, as variances are, and large enough for probabilities that differ.
        return (0.2 * np.abs(rng.normal(size=like.shape)) + 0.01).astype(np.float32)

    abstract, count = experiment.abstract_state, len(experiment.members)
    variables = {
        "params": jax.tree.map(
            lambda like: drawn(like) * np.float32(rng.choice([-1, 1], like.shape)),
            abstract.params,
        ),
        **jax.tree.map(drawn, abstract.model_state),
    }
    numbers = {"score": np.float32(0.5), "step": np.int32(1), "evaluated": np.int32(1)}
    best = {name: np.full(count, x) if count else x for name, x in numbers.items()}
    if count:
        best |= {"variables": variables, "diverged": np.zeros(count, np.int32)}
    state = TrainState(
        step=np.int32(1),
        params=variables["params"],
        model_state={k: v for k, v in variables.items() if k != "params"},
        opt_state={},
        ema={},
        hyper={},
        best=best,
        key=jax.random.key(0),
    )
    workdir.mkdir(parents=True)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(state, wait=True)
    config, found = experiment.config, look_at(source, rows_of(split, "train"))
    run = describe_run(config, source, split, {}, found, [], experiment.members)
    write_json(workdir / "config.json", run)
    ids = {part: [source.ids[row] for row in rows] for part, rows in split.items()}
    write_json(workdir / "split.json", ids)
    return experiment, source, split


def look_at(source, rows):
    """What a run notes of its data."""
    images = [source[row]["image"] for row in rows]
    return {
        "class_counts": [1] * len(source.info.class_names),
        "dtypes": sorted({image.dtype.name for image in images}),
        "shapes": [image.shape[:-1] for image in images],
        "spacing": source[rows[0]]["spacing"].tolist(),
    }
