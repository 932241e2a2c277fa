"""One device or many: the mesh, and the two ways to lift a step onto it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmed.training.processes import local_copy
from jaxmed.training.state import TrainState, evaluation_variables
from jaxmed.types import Batch, UserError

AXIS = "data"
MODES = ("jit", "pmap")


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, "data", over these devices (None: all there are)."""
    # Not jax.make_mesh, whose axes are explicit: this code leaves the sharding to the compiler.
    return Mesh(np.array(jax.devices() if devices is None else list(devices)), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract: Any, mesh: Mesh, *, fsdp: bool = False, min_size: int = 2**14) -> Any:
    """The sharding of each leaf of a state.

    Args:
        abstract: arrays or ShapeDtypeStructs.
        mesh: of the devices.
        fsdp: split parameters, moving average and optimizer state over the devices (ZeRO-3,
            Rajbhandari et al. 2020): the largest axis that the number of devices divides.
        min_size: smaller arrays are replicated, since gathering them costs more than it saves.
    """

    def of_leaf(x: Any) -> NamedSharding:
        if fsdp and x.size >= min_size:
            for axis in sorted(range(x.ndim), key=lambda i: -x.shape[i]):
                if x.shape[axis] % mesh.size == 0:
                    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
        return replicated(mesh)

    return jax.tree.map(of_leaf, abstract)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise a UserError where the devices cannot share the global batch equally."""
    devices = mesh.shape[AXIS]
    if batch_size % devices:
        below = batch_size - batch_size % devices
        fitting = f"{below} or {below + devices}" if below else str(devices)
        raise UserError(
            f"data.batch_size is {batch_size}, which {devices} devices cannot share equally; "
            f"use {fitting}, or fewer devices"
        )


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
    """This process's part of a batch as global arrays, split over the devices by example.

    Raises:
        UserError: where the devices cannot share the batch equally.
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    check_batch_size(next(iter(batch.values())).shape[0] * processes, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(x))
        for name, x in batch.items()
    }


class Lifted:
    """A step lifted onto a mesh; what differs between jit and pmap is hidden in here.

    A *placed* state is what `step` takes and gives. The *global* state, one copy of each array,
    is what checkpoints and evaluation see. Under jit they are the same arrays.

    Attributes:
        mode: "jit" or "pmap".
        mesh: of the devices.
        shardings: of the global state, one for all leaves or one a leaf.
        can_scan: whether `steps` does several in one call.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        mode: str,
        mesh: Mesh,
        shardings: Any,
        held: Held | None = None,
    ):
        self.mode = mode
        self.mesh = mesh
        self.shardings = shardings
        self.can_scan = mode == "jit"
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        self._stacked = NamedSharding(mesh, PartitionSpec(None, AXIS))
        step, self._held = with_held(step, held, mesh)
        # One copy a device along a new leading axis, and back. On our own mesh, since pmap
        # compiles again for inputs of any other sharding; as programs, which work in several
        # processes too.
        copies = functools.partial(_copies, count=mesh.size)
        self._stack = jax.jit(copies, out_shardings=self._split)
        self._unstack = jax.jit(_first, out_shardings=replicated(mesh))
        self._compiled: Any
        if mode == "jit":
            self._compile(step)
        else:
            self._compiled = jax.pmap(
                functools.partial(step, axis_name=AXIS),
                axis_name=AXIS,
                devices=list(mesh.devices.flat),
                donate_argnums=0,
                in_axes=(0, 0, *(None for _ in self._held)),
            )

    def _compile(self, step: Callable[..., Any]) -> None:
        """The step under jit, and several of them in a row."""

        def steps(state: TrainState, batches: Batch, *held: Any) -> tuple[TrainState, Any]:
            return jax.lax.scan(lambda s, batch: step(s, batch, *held), state, batches)

        out = (self.shardings, replicated(self.mesh))
        self._compiled = jax.jit(step, donate_argnums=0, out_shardings=out)
        self._compiled_steps = jax.jit(steps, donate_argnums=0, out_shardings=out)

    def step_bytes(self, abstract: TrainState, batch: Mapping[str, Any]) -> int:
        """Memory that a step takes on each device, as the compiler of this device says.

        Compiled programs are kept, so that training need not compile this one again.

        Args:
            abstract: of the global state.
            batch: shapes and types of the global batch.
        """
        assert self.mode == "jit", "programs of pmap are compiled for its own copies"
        placed = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._split)
            for name, x in batch.items()
        }
        program = self._compiled.lower(self.template(abstract), placed, *self._held).compile()
        told = program.memory_analysis()
        assert told is not None, "every backend of jax says what a program needs"
        return (
            told.argument_size_in_bytes
            + told.output_size_in_bytes
            - told.alias_size_in_bytes
            + told.temp_size_in_bytes
        )

    def init(self, make_state: Callable[..., TrainState], *args: Any) -> TrainState:
        """`make_state(*args)`, placed; under jit, sharded parameters are born sharded."""
        state = jax.jit(make_state, out_shardings=self.shardings)(*args)
        return state if self.mode == "jit" else self.place_state(state)

    def template(self, abstract: TrainState) -> TrainState:
        """ShapeDtypeStructs with the shardings of the global state, to restore into."""
        shardings = self.shardings
        if isinstance(shardings, NamedSharding):
            shardings = jax.tree.map(lambda _: self.shardings, abstract)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )

    def place_state(self, state: TrainState) -> TrainState:
        """A global state, or arrays of the host, ready for `step`.

        `step` gives the memory of its state away; keep using the returned state only.
        """
        state = jax.device_put(state, self.shardings)
        return state if self.mode == "jit" else self._stack(state)

    def global_state(self, state: TrainState) -> TrainState:
        """One copy of each array of a placed state."""
        if self.mode == "jit":
            return state
        return self._unstack(state)

    def whole(self, tree: Any) -> Any:
        """Arrays of a global state, gathered where they are split over devices."""
        leaves = jax.tree.leaves(tree)
        if all(getattr(x, "is_fully_replicated", True) for x in leaves):
            return tree
        return jax.jit(lambda x: x, out_shardings=replicated(self.mesh))(tree)

    def variables_of(self, state: TrainState, member: int | None = None) -> Any:
        """The variables to evaluate with, whole; of one of several models."""
        assert member is None, "this lifts the step of one model"
        return local_copy(self.whole(evaluation_variables(state)))

    def with_best(self, state: TrainState, best: Mapping[str, Any], improved: Any) -> TrainState:
        """A placed state with other values in `best`; the best variables are in checkpoints."""
        del improved
        placed = jax.device_put(dict(best), replicated(self.mesh))
        return state.replace(best=placed if self.mode == "jit" else self._stack(placed))

    def place_batch(self, batch: Mapping[str, Any]) -> Batch:
        """This process's part of a batch, on the devices.

        Raises:
            UserError: where the devices cannot share the batch equally.
        """
        if self.mode == "jit":
            return place_batch(batch, self.mesh)
        size = next(iter(batch.values())).shape[0]
        check_batch_size(size * jax.process_count(), self.mesh)
        devices = len(self.mesh.local_devices)
        # (local batch, ...) -> (local devices, batch of a device, ...)
        return {
            name: jax.make_array_from_process_local_data(
                self._split, np.asarray(x).reshape(devices, size // devices, *x.shape[1:])
            )
            for name, x in batch.items()
        }

    def count_images(self, batch: Mapping[str, Any]) -> int:
        """Examples of the global batch, of which this is this process's part."""
        return next(iter(batch.values())).shape[0] * jax.process_count()

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step; returns before it is done. Both arguments must be placed."""
        return self._compiled(state, batch, *self._held)

    def steps(
        self, state: TrainState, batches: Sequence[Mapping[str, Any]]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """A step for each of these batches of the host, in one call; metrics have them in front.

        Worth it where a step takes no longer than it takes the host to start one.
        """
        stacked = {
            name: jax.make_array_from_process_local_data(
                self._stacked, np.stack([batch[name] for batch in batches])
            )
            for name in batches[0]
        }
        return self._compiled_steps(state, stacked, *self._held)

    def fetch(self, metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Metrics as numbers, or of several steps as arrays; waits for them."""
        found = {name: jax.device_get(x.addressable_data(0)) for name, x in metrics.items()}
        if self.mode == "pmap":
            found = {name: x.reshape(-1)[0] for name, x in found.items()}
        return {name: float(x) if x.ndim == 0 else x for name, x in found.items()}


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _copies(tree: Any, *, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


@dataclasses.dataclass(frozen=True)
class Held:
    """Examples that the devices hold, each of them all, and how a batch is cut from them.

    Attributes:
        arrays: (cases, ...) each.
        cut: (arrays, batch of choices) -> batch.
    """

    arrays: Mapping[str, Any]
    cut: Callable[[Mapping[str, jax.Array], Batch], Batch]


def with_held(
    step: Callable[..., Any], held: Held | None, mesh: Mesh
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step that cuts its batch from held examples, and these, placed, as its last argument."""
    if held is None:
        return step, ()

    cut = held.cut  # not the arrays of the host, which would be kept as long as the step

    def cutting(state: TrainState, choice: Batch, arrays: Any, **options: Any) -> Any:
        return step(state, cut(arrays, choice), **options)

    placed = jax.device_put({k: np.asarray(v) for k, v in held.arrays.items()}, replicated(mesh))
    return cutting, (placed,)


def lift(
    step: Callable[..., Any],
    *,
    mesh: Mesh,
    mode: str = "jit",
    state_shardings: Any = None,
    held: Held | None = None,
) -> Lifted:
    """Lift a step onto a mesh.

    Args:
        step: `step(state, batch, *, axis_name=None)`.
        mesh: of the devices.
        mode: "jit" (one program over global arrays) or "pmap" (one copy a device, with explicit
            sums); they agree to float precision.
        state_shardings: as the function of that name returns them; None replicates.
        held: examples from which batches, which then hold choices, are cut on the device.

    Raises:
        UserError: for an unknown mode, or parameters to be split under pmap.
    """
    if mode not in MODES:
        raise UserError(f"sharding.mode is {mode!r}; expected one of {', '.join(MODES)}")
    if state_shardings is None:
        state_shardings = replicated(mesh)
    whole = all(s.is_fully_replicated for s in jax.tree.leaves(state_shardings))
    if mode == "pmap" and not whole:
        raise UserError("sharding.fsdp needs sharding.mode=jit; pmap keeps whole copies")
    return Lifted(step, mode=mode, mesh=mesh, shardings=state_shardings, held=held)
