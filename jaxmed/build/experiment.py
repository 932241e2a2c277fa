"""One experiment: a resolved config, its data and everything that is built from the two."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import pieces, preparation
from jaxmed.build.config import flatten
from jaxmed.build.forward import make_forward
from jaxmed.build.members import Member, member_config
from jaxmed.data.loader import stack_examples
from jaxmed.inference.predictor import Predictor
from jaxmed.models.convolution import use_onednn
from jaxmed.training.sharding import (
    AXIS,
    Held,
    Lifted,
    check_batch_size,
    lift,
    make_mesh,
    place_batch,
    replicated,
    state_shardings,
)
from jaxmed.training.state import TrainState, init_state
from jaxmed.training.step import make_step
from jaxmed.training.together import LiftedTogether, init_together, make_member_mesh
from jaxmed.types import DatasetInfo, Example, UserError


class Experiment:
    """The objects of one experiment, each made once, when first asked for.

    Args:
        config: resolved.
        info: of the data set; `channels` are those of the network's input.
        class_counts: of the training part, for balanced class weights.
        members: the models, where several are trained together.
    """

    def __init__(
        self,
        config: ConfigDict,
        info: DatasetInfo,
        class_counts: Sequence[int] = (),
        members: Sequence[Member] = (),
    ):
        self.config = config
        self.members = tuple(members)
        # Keys whose values are traced, because models differ in them; the optimizer's all are.
        changed = {key for member in members for key in member.changes}
        self.traced = tuple(sorted(key for key in changed if not key.startswith("optimizer.")))
        self.info = dataclasses.replace(info, channels=config.data.channels)
        self.task = pieces.make_task(config, info, class_counts=class_counts)
        self.quick_task = pieces.make_task(config, info, class_counts=class_counts, quick=True)
        self.prepare = preparation.make_prepare(config)
        self.view = preparation.make_training_view(config)
        self.optimizer, self.schedule, hyper = pieces.make_optimization(config)
        self.hyper: dict[str, Any] = {**hyper, **self.numbers_of(config)}
        self.member_configs = [member_config(config, member) for member in members]
        self._forwards: dict[tuple[bool, bool], Callable[..., Any]] = {}
        for own in [config, *self.member_configs]:  # traced numbers cannot be checked any more
            pieces.make_augment(own, self.info)

    def numbers_of(self, config: ConfigDict) -> dict[str, np.ndarray]:
        """What is traced, with its values in a member's config."""
        flat = flatten(config)
        return {key: np.asarray(flat[key], np.float32) for key in self.traced}

    def numbers_for(self, members: Sequence[int]) -> dict[str, np.ndarray]:
        """What is traced, of some of the models; of several with the models along the first axis.

        Args:
            members: their places; none where a single one was trained.
        """
        configs = [self.member_configs[place] for place in members] or [self.config]
        numbers = [self.numbers_of(own) for own in configs]
        return jax.tree.map(lambda *x: np.stack(x), *numbers) if len(numbers) > 1 else numbers[0]

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
        devices = devices[: wanted or None]
        if self.members:
            return make_member_mesh(devices, members=len(self.members))
        return make_mesh(devices)

    @property
    def local_mesh(self) -> Any:
        """The devices of this process, which predict its own share of the cases."""
        return make_mesh(self.mesh.local_devices)

    @cached_property
    def model(self) -> Any:
        """The network, as it is evaluated."""
        return pieces.make_model(self.config, self.info, outputs=self.outputs)

    def init_state(self, key: jax.Array, hyper: Mapping[str, Any] | None = None) -> TrainState:
        """A fresh state of one model; jittable."""
        shape = (1, *preparation.input_shape(self.config), self.config.data.channels)
        given = self.hyper if hyper is None else hyper
        return init_state(
            lambda k: self.model.init(k, jnp.zeros(shape, jnp.float32)),
            self.optimizer,
            key=key,
            hyper=given,
            ema="ema_decay" in given,
            keep_best=bool(self.members),
        )

    def init_members(self, keys: jax.Array, hyper: Mapping[str, Any]) -> TrainState:
        """A fresh state of all models; jittable."""
        return init_together(self.init_state, keys, hyper)

    def _start(self) -> tuple[Callable[..., TrainState], tuple[Any, ...]]:
        """What makes a fresh state, of one model or of all, and its arguments."""
        if not self.members:
            return self.init_state, (jax.random.key(self.config.seed),)
        keys = jnp.stack([jax.random.key(config.seed) for config in self.member_configs])
        hyper = [
            pieces.make_optimization(config)[2] | self.numbers_of(config)
            for config in self.member_configs
        ]
        return self.init_members, (keys, jax.tree.map(lambda *x: np.stack(x), *hyper))

    def fresh_state(self, lifted: Lifted) -> TrainState:
        """A placed state of all models, before the first step."""
        make, arguments = self._start()
        return lifted.init(make, *arguments)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and types of the state of all models."""
        make, arguments = self._start()
        return jax.eval_shape(make, *arguments)

    @cached_property
    def abstract_member(self) -> TrainState:
        """Shapes and types of the state of one model."""
        return jax.eval_shape(self.init_state, jax.random.key(self.config.seed))

    def make_step(self, *, mapped: bool = False) -> Callable[..., Any]:
        """The training step of one model, not yet lifted; `mapped` is for a map over devices."""

        def step(state: TrainState, batch: Any, *, axis_name: str | None = None) -> Any:
            numbers = {key: state.hyper[key] for key in self.traced}
            model = pieces.make_model(
                self.config, self.info, outputs=self.outputs, mapped=mapped, numbers=numbers
            )
            made = make_step(
                model_apply=model.apply,
                task=self.task,
                optimizer=self.optimizer,
                schedule=self.schedule,
                augment=pieces.make_augment(self.config, self.info, numbers),
                prepare_batch=preparation.make_prepare_batch(self.config, numbers),
            )
            return made(state, batch, axis_name=axis_name)

        return step

    def lift(self, held: Mapping[str, np.ndarray] | None = None) -> Lifted:
        """The training step on its devices, which may hold the training cases."""
        stored = None
        if held is not None:
            cut = functools.partial(preparation.cut_held, patch=self.view.patch)
            stored = Held(held, cut)
        check_batch_size(self.config.data.batch_size, self.mesh)
        shardings = None
        mode, fsdp = self.config.sharding.mode, self.config.sharding.fsdp
        if self.members:
            if mode != "jit" or fsdp:
                raise UserError(
                    "models trained together (training.folds, seeds, vary) need sharding.mode=jit "
                    "and no sharding.fsdp"
                )
            return LiftedTogether(
                self.make_step(mapped=self.mesh.shape[AXIS] > 1),
                mesh=self.mesh,
                streams=self.streams[1],
                layout=self.config.sharding.members,
                held=stored,
            )
        if fsdp:
            shardings = state_shardings(self.abstract_state, self.mesh, fsdp=True)
        step = self.make_step(mapped=mode == "pmap")
        return lift(step, mesh=self.mesh, mode=mode, state_shardings=shardings, held=stored)

    @cached_property
    def streams(self) -> tuple[list[int], list[int]]:
        """Members that learn from different data, and for each member the place of its own there.

        Members of one fold and seed see the same batches, which are then loaded once.
        """
        known: dict[tuple[int | None, int], int] = {}
        first = []
        for place, member in enumerate(self.members):
            if (member.fold, member.seed) not in known:
                known[member.fold, member.seed] = len(known)
                first.append(place)
        return first, [known[member.fold, member.seed] for member in self.members]

    def example_batch(self, example: Example) -> dict[str, Any]:
        """Shapes and types of a training batch, from one case of the source."""
        seen = self.view(self.prepare(example), np.random.default_rng(0))
        batch = stack_examples([seen])
        size = self.config.data.batch_size
        return {
            key: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype)
            for key, value in batch.items()
        }

    def step_bytes(self, example: Example) -> int:
        """Memory that the training step takes on each device, measured by compiling it."""
        batch = self.example_batch(example)
        if self.members:
            streams = len(self.streams[0])
            batch = {
                name: jax.ShapeDtypeStruct((streams, *x.shape), x.dtype)
                for name, x in batch.items()
            }
        mode = self.config.sharding.mode
        lifted = self.lift() if mode == "jit" else lift(self.make_step(), mesh=self.mesh)
        return lifted.step_bytes(self.abstract_state, batch)

    def step_flops(self, example: Example) -> float:
        """Floating-point operations of one training step, as the compiler counts them."""
        # Calls out of XLA do work that it cannot count.
        with use_onednn(False):
            lowered = jax.jit(self.make_step()).lower(
                self.abstract_member, self.example_batch(example)
            )
        one = float((lowered.cost_analysis() or {}).get("flops", 0.0))
        return one * max(1, len(self.members))

    def predictor(
        self,
        variables: Mapping[str, Any],
        *,
        members: Sequence[int] = (),
        uncertain: bool = False,
    ) -> Predictor:
        """Predicts whole cases with these weights.

        Args:
            variables: of the network; of an ensemble with the models along the first axis.
            members: places of the models whose weights they are, where several were trained
                together. Several are an ensemble.
            uncertain: predictions are what `split_uncertainty` takes; not of boxes.
        """
        config = self.config
        configs = [self.member_configs[place] for place in members] or [config]
        ensemble = len(members) > 1
        held = self.numbers_for(members)
        if (ensemble, uncertain) not in self._forwards:
            self._forwards[ensemble, uncertain] = make_forward(
                self.config,
                self.info,
                self.model,
                self.task,
                ensemble=ensemble,
                uncertain=uncertain,
            )
        run = self._forwards[ensemble, uncertain]
        size = config.evaluation.batch_size or config.data.batch_size
        mesh = self.local_mesh
        size = -(-size // mesh.size) * mesh.size
        placed, held = jax.device_put((dict(variables), held), replicated(mesh))

        def forward(batch: dict[str, np.ndarray]) -> Any:
            return run(placed, held, place_batch(batch, mesh))

        return Predictor(
            forward,
            window=preparation.input_shape(config),
            batch_size=size,
            blend=self.info.task == "segmentation",
            overlap=config.evaluation.overlap,
            fill=float(np.mean([preparation.fill_value(own) for own in configs])),
        )
