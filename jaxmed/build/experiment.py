"""One experiment: a resolved config, its data and everything that is built from the two."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import pieces, preparation
from jaxmed.build.checks import check_fits
from jaxmed.build.config import flatten, update
from jaxmed.data.loader import stack_examples
from jaxmed.inference.predictor import Predictor
from jaxmed.models.convolution import use_onednn
from jaxmed.preprocessing.fingerprint import take_fingerprint
from jaxmed.preprocessing.plan import is_open, plan_settings, plan_steps
from jaxmed.training.sharding import (
    check_batch_size,
    lift,
    make_mesh,
    place_batch,
    replicated,
    state_shardings,
)
from jaxmed.training.state import TrainState, init_state
from jaxmed.training.step import make_step
from jaxmed.types import DatasetInfo, Example, Source, UserError


class Experiment:
    """The objects of one experiment, each made once, when first asked for.

    Args:
        config: resolved.
        info: of the data set; `channels` are those of the network's input.
        class_counts: of the training part, for balanced class weights.
    """

    def __init__(self, config: ConfigDict, info: DatasetInfo, class_counts: Sequence[int] = ()):
        self.config = config
        self.info = dataclasses.replace(info, channels=config.data.channels)
        self.task = pieces.make_task(config, info, class_counts=class_counts)
        self.quick_task = pieces.make_task(config, info, class_counts=class_counts, quick=True)
        self.prepare = preparation.make_prepare(config)
        self.view = preparation.make_training_view(config)
        self.prepare_batch = preparation.make_prepare_batch(config)
        self.augment = pieces.make_augment(config, self.info)
        self.optimizer, self.schedule, self.hyper = pieces.make_optimization(config)

    @property
    def outputs(self) -> int:
        """Channels of the network's output."""
        return len(getattr(self.task, "output_classes", self.info.class_names))

    @cached_property
    def mesh(self) -> Any:
        """The devices that train and predict."""
        wanted = self.config.sharding.devices
        devices = jax.devices()
        if wanted > len(devices):
            raise UserError(f"sharding.devices is {wanted}; this machine has {len(devices)}")
        if wanted and jax.process_count() > 1:
            raise UserError(
                "sharding.devices is of one process; several use all devices: leave it 0"
            )
        return make_mesh(devices[: wanted or None])

    @property
    def local_mesh(self) -> Any:
        """The devices of this process, which predict its own share of the cases."""
        return make_mesh(self.mesh.local_devices)

    @cached_property
    def model(self) -> Any:
        """The network, as it is evaluated."""
        return pieces.make_model(self.config, self.info, outputs=self.outputs)

    def init_state(self, key: jax.Array) -> TrainState:
        """A fresh state; jittable."""
        shape = (1, *preparation.input_shape(self.config), self.config.data.channels)
        return init_state(
            lambda k: self.model.init(k, jnp.zeros(shape, jnp.float32)),
            self.optimizer,
            key=key,
            hyper=self.hyper,
            ema=self.config.optimizer.ema > 0,
        )

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self.init_state, jax.random.key(self.config.seed))

    def make_step(self, *, mapped: bool = False) -> Callable[..., Any]:
        """The training step, not yet lifted; `mapped` is for `pmap`."""
        model = pieces.make_model(self.config, self.info, outputs=self.outputs, mapped=mapped)
        return make_step(
            model_apply=model.apply,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            augment=self.augment,
            prepare_batch=self.prepare_batch,
        )

    @cached_property
    def lifted(self) -> Any:
        """The training step on its devices."""
        check_batch_size(self.config.data.batch_size, self.mesh)
        shardings = None
        if self.config.sharding.fsdp:
            shardings = state_shardings(self.abstract_state, self.mesh, fsdp=True)
        mode = self.config.sharding.mode
        step = self.make_step(mapped=mode == "pmap")
        return lift(step, mesh=self.mesh, mode=mode, state_shardings=shardings)

    def example_batch(self, example: Example) -> dict[str, Any]:
        """Shapes and types of a training batch, from one case of the source."""
        seen = self.view(self.prepare(example), np.random.default_rng(0))
        batch = stack_examples([seen])
        size = self.config.data.batch_size
        return {
            key: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype)
            for key, value in batch.items()
        }

    def step_flops(self, example: Example) -> float:
        """Floating-point operations of one training step, as the compiler counts them."""
        # Calls out of XLA do work that it cannot count.
        with use_onednn(False):
            lowered = jax.jit(self.make_step()).lower(
                self.abstract_state, self.example_batch(example)
            )
        return float((lowered.cost_analysis() or {}).get("flops", 0.0))

    @cached_property
    def forward(self) -> Callable[[Any, dict[str, Any]], Any]:
        """Jitted `(variables, batch) -> predictions`, averaged over mirrored images if asked."""
        blend = self.info.task == "segmentation"
        flips: list[tuple[int, ...]] = [()]
        if self.config.evaluation.flips:
            axes = range(1, self.info.ndim + 1)
            flips = [
                tuple(a for a in axes if bits >> a & 1)
                for bits in range(0, 2 ** (self.info.ndim + 1), 2)
            ]

        @jax.jit
        def forward(variables: Any, batch: dict[str, jax.Array]) -> Any:
            batch = self.prepare_batch(batch)
            total: Any = None
            for axes in flips:
                image = jnp.flip(batch["image"], axes) if axes else batch["image"]
                outputs = self.model.apply(variables, image, train=False)
                prediction = self.task.predict(outputs, {**batch, "image": image})
                if axes and blend:
                    prediction = jnp.flip(prediction, axes)
                total = prediction if total is None else total + prediction
            return total if len(flips) == 1 else total / len(flips)

        return forward

    def predictor(self, variables: Mapping[str, Any]) -> Predictor:
        """Predicts whole cases with these weights."""
        config = self.config
        size = config.evaluation.batch_size or config.data.batch_size
        mesh = self.local_mesh
        size = -(-size // mesh.size) * mesh.size
        placed = jax.device_put(dict(variables), replicated(mesh))

        def forward(batch: dict[str, np.ndarray]) -> Any:
            return self.forward(placed, place_batch(batch, mesh))

        return Predictor(
            forward,
            window=preparation.input_shape(config),
            batch_size=size,
            blend=self.info.task == "segmentation",
            overlap=config.evaluation.overlap,
            fill=preparation.fill_value(config),
        )


# The keys that something must set before an experiment can be built.
REQUIRED = {
    "all": ("data.channels", "data.normalization", "data.batch_size", "training.steps"),
    "classification": ("data.size", "data.fit", "model.width", "model.stem_strides"),
    "detection": (
        "data.size",
        "data.fit",
        "data.max_boxes",
        "model.width",
        "model.stem_strides",
        "model.levels",
        "model.head_features",
    ),
    "segmentation": ("data.patch", "model.features", "evaluation.nsd_tolerance"),
}


def resolve(
    config: ConfigDict,
    source: Source,
    rows: Sequence[int],
    *,
    earlier: Mapping[str, Any] | None = None,
) -> tuple[ConfigDict, dict[str, Any], dict[str, Any]]:
    """Fill in what the config leaves to the plan, from the training part.

    Args:
        config: as given; not changed.
        source: the data set.
        rows: of the training part.
        earlier: flat resolved config of the run that is to go on; what was left open then keeps
            its value, so that other software or hardware cannot plan another one.

    Returns:
        the resolved config, the settings that the plan made, and the fingerprint.

    Raises:
        UserError: where something is still open, or the plan's file is wrong.
    """
    config = config.copy_and_resolve_references()
    given = flatten(config)
    fingerprint = take_fingerprint(source, rows, channels=config.data.channels)
    settings: dict[str, Any] = {}
    if earlier is not None:
        settings = {k: v for k, v in earlier.items() if k in given and is_open(given[k])}
        settings = {k: v for k, v in settings.items() if not is_open(v)}
        if config.optimizer.schedule == "constant":
            settings["optimizer.warmup"] = earlier["optimizer.warmup"]
    elif config.plan == "auto":
        settings = plan_settings(fingerprint, source.info, given)
    elif config.plan != "none":
        settings = {k: v for k, v in _read_plan(config.plan).items() if is_open(given.get(k))}
    update(config, settings, where=f"plan={config.plan}")
    if "data.batch_size" in settings and earlier is None:
        _fit_to_devices(config, settings)
    _check_complete(config, leave_out=("training.steps",))
    check_fits(config, source.info)
    if config.training.epochs and not config.training.steps:
        steps = max(1, round(config.training.epochs * len(rows) / max(config.data.batch_size, 1)))
        update(config, {"training.steps": steps}, where="training.epochs")
    elif config.plan == "auto" and not config.training.steps:
        counts = fingerprint["class_counts"]
        draft = config.copy_and_resolve_references()
        draft.training.steps = 1
        experiment = Experiment(draft, source.info, counts)
        settings["training.steps"] = plan_steps(
            lambda: experiment.step_flops(source[rows[0]]),
            ndim=source.info.ndim,
            cases=len(rows),
            batch_size=config.data.batch_size,
        )
        update(config, {"training.steps": settings["training.steps"]}, where="plan=auto")
    if 0 < config.optimizer.warmup < 1:  # in steps, so that a longer run warms up alike
        config.optimizer.warmup = float(math.ceil(config.optimizer.warmup * config.training.steps))
    steps = config.training.steps
    defaults = {
        "log_every": min(20, max(1, steps // 25)),
        "evaluate_every": max(50, steps // 10),
        "checkpoint_every": max(50, steps // 10),
    }
    for key, every in defaults.items():
        config.training[key] = config.training[key] or every
    _check_complete(config)
    return config, settings, fingerprint


def _read_plan(path: str) -> dict[str, Any]:
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(plan, dict):
            raise ValueError("it is no object of keys and values")
        return flatten(plan)
    except (OSError, ValueError) as error:
        raise UserError(
            f"plan={path}: cannot be read ({error}); expected auto, none, or a JSON file"
        ) from error


def _fit_to_devices(config: ConfigDict, settings: dict[str, Any]) -> None:
    """Round a planned batch up to what the devices can share equally."""
    devices = config.sharding.devices or len(jax.devices())
    size = -(-config.data.batch_size // devices) * devices
    settings["data.batch_size"] = config.data.batch_size = size


def _check_complete(config: ConfigDict, *, leave_out: Sequence[str] = ()) -> None:
    flat = flatten(config)
    required = [k for k in REQUIRED["all"] + REQUIRED[config.task] if k not in leave_out]
    if config.data.normalization == "dataset":
        required += ["data.intensity.mean", "data.intensity.std"]
    missing = [k for k in required if is_open(flat[k])]
    if missing:
        raise UserError(
            f"plan={config.plan} leaves {', '.join(missing)} open; set them with "
            f"--config.{missing[0]}=..., or use plan=auto"
        )
