"""Several models in one program: a step along an axis of models, on one device or many.

Small networks leave an accelerator idle; several side by side fill it. The axis of the models is
split over the devices as far as their numbers allow, the batch of each over what is left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmed.training.sharding import (
    AXIS,
    Held,
    Lifted,
    check_batch_size,
    replicated,
    with_held,
)
from jaxmed.training.state import TrainState, evaluation_variables
from jaxmed.types import Batch, UserError

MEMBER_AXIS = "member"
LAYOUTS = ("auto", "vmap", "loop")


def make_member_mesh(devices: Sequence[Any], *, members: int) -> Mesh:
    """A mesh of the axes "member" and "data" over these devices."""
    rows = math.gcd(len(devices), members)
    return Mesh(np.array(devices).reshape(rows, -1), (MEMBER_AXIS, AXIS))


def init_together(
    init: Callable[[jax.Array, Mapping[str, Any]], TrainState],
    keys: jax.Array,
    hyper: Mapping[str, Any],
) -> TrainState:
    """The states of several models as one.

    Args:
        init: of one model.
        keys: (models,).
        hyper: arrays (models, ...).
    """
    # Not vmapped: XLA's own generator would draw other numbers than for a model by itself.
    states = jax.lax.map(lambda one: init(*one), (keys, dict(hyper)))
    return states.replace(step=states.step[0])


def step_together(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]], *, layout: str
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step of several models from that of one.

    Args:
        step: `step(state, batch)`.
        layout: "vmap" computes all models at once; "loop" one after another in one program, which
            keeps to the memory and the kernels of one.

    Returns:
        `step(state, batch)` whose batch has the models' axis in front, as its metrics. What comes
        after these two arguments is the same for all models.
    """
    axes = _members_axes()

    def at_once(state: TrainState, batch: Batch, *held: Any) -> Any:
        one = functools.partial(_call, step, held)
        return jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0))(state, batch)

    if layout == "vmap":
        return at_once

    def loop(state: TrainState, batch: Batch, *held: Any) -> Any:
        number = state.step

        def one(i: jax.Array, states: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            own = jax.tree.map(lambda x: x[i], states.replace(step=None))
            return step(own.replace(step=number), jax.tree.map(lambda x: x[i], batch), *held)

        def body(i: jax.Array, carry: Any) -> Any:
            states, metrics = carry
            new, found = one(i, states)
            # In place, so that no second copy of all models is held.
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            states = jax.tree.map(put, states, new.replace(step=None))
            return states, jax.tree.map(put, metrics, found)

        count = jax.tree.leaves(batch)[0].shape[0]
        shapes = jax.eval_shape(one, jnp.zeros((), jnp.int32), state)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
        states, metrics = jax.lax.fori_loop(0, count, body, (state.replace(step=None), metrics))
        return states.replace(step=number + 1), metrics

    return loop


def _call(step: Callable[..., Any], held: Any, state: TrainState, batch: Batch) -> Any:
    return step(state, batch, *held)


def _members_axes(over: Any = 0, once: Any = None) -> TrainState:
    """A value for each part of a state: `over` where every model has its own, `once` elsewhere."""
    fields = dict.fromkeys(TrainState.__dataclass_fields__, over)
    return TrainState(**{**fields, "step": once})


class LiftedTogether(Lifted):
    """The step of several models, lifted onto a mesh of "member" and "data".

    Args:
        step: of one model, `step(state, batch, *, axis_name=None)`.
        mesh: as `make_member_mesh` makes it.
        streams: for each model, which of a batch's streams it learns from.
        layout: see `step_together`; "auto" is "loop" on a CPU, where one model fills all cores.
        held: see `lift`.

    Raises:
        UserError: for an unknown layout.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        mesh: Mesh,
        streams: Sequence[int],
        layout: str = "auto",
        held: Held | None = None,
    ):
        if layout not in LAYOUTS:
            raise UserError(f"sharding.members is {layout!r}; expected one of {', '.join(LAYOUTS)}")
        if layout == "auto":
            layout = "loop" if mesh.devices.flat[0].platform == "cpu" else "vmap"
        self.mode = "jit"
        self.mesh = mesh
        self.members = len(streams)
        own = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
        self._own = own
        self.can_scan = True
        self._split = NamedSharding(mesh, PartitionSpec(None, AXIS))
        self._stacked = NamedSharding(mesh, PartitionSpec(None, None, AXIS))
        self.shardings = _members_axes(own, replicated(mesh))
        data = mesh.shape[AXIS]
        step, self._held = with_held(step, held, mesh)
        step = functools.partial(step, axis_name=AXIS if data > 1 else None)
        together = step_together(step, layout=layout)
        if mesh.size > 1:
            states = _members_axes(own.spec, PartitionSpec())
            whole = tuple(PartitionSpec() for _ in self._held)
            together = jax.shard_map(
                together,
                mesh=mesh,
                in_specs=(states, PartitionSpec(MEMBER_AXIS, AXIS), *whole),
                out_specs=(states, own.spec),
                check_vma=False,  # the step sums gradients itself
            )
        of_member = np.asarray(streams)

        def step_all(state: TrainState, batch: Batch, *held: Any) -> Any:
            return together(state, {name: x[of_member] for name, x in batch.items()}, *held)

        self._compile(step_all)
        self._member = jax.jit(_member, out_shardings=replicated(mesh))
        self._keep = jax.jit(_keep, donate_argnums=1)

    def template(self, abstract: TrainState) -> TrainState:
        """ShapeDtypeStructs with the shardings of the state, to restore into."""
        shardings = TrainState(
            **{
                name: jax.tree.map(lambda _, s=s: s, getattr(abstract, name))
                for name, s in vars(self.shardings).items()
            }
        )
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )

    def place_batch(self, batch: Mapping[str, Any]) -> Batch:
        """A batch (streams, size, ...) on the devices."""
        check_batch_size(next(iter(batch.values())).shape[1], self.mesh)
        return {name: jax.device_put(np.asarray(x), self._split) for name, x in batch.items()}

    def count_images(self, batch: Mapping[str, Any]) -> int:
        """Examples that a step learns from, over all models."""
        return self.members * next(iter(batch.values())).shape[1]

    def with_best(self, state: TrainState, best: Mapping[str, Any], improved: Any) -> TrainState:
        """The state with other values in `best`, and the variables of models that improved."""
        kept = state.best["variables"]
        if improved.any():
            kept = self._keep(evaluation_variables(state), kept, jnp.asarray(improved))
        numbers = jax.device_put(dict(best), self._own)
        return state.replace(best={**numbers, "variables": kept})

    def variables_of(self, state: TrainState, member: int | None = None) -> Any:
        """The variables to evaluate one model with."""
        return self._member(evaluation_variables(state), member)


def _member(tree: Any, member: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[member], tree)


def _keep(new: Any, old: Any, improved: jax.Array) -> Any:
    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(improved.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, new, old)
