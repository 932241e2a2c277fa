"""The one training step, of every task, in 2-D and 3-D, on one device or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmed.training.optimizers import Optimizer, Schedule
from jaxmed.training.state import TrainState, network_variables
from jaxmed.types import Augment, Batch


def make_step(
    *,
    model_apply: Callable[..., Any],
    task: Any,
    optimizer: Optimizer,
    schedule: Schedule | None = None,
    augment: Augment | None = None,
    prepare_batch: Callable[[Batch], Batch] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch, *, axis_name=None) -> (state, metrics)`.

    Written once for all devices. Under jit (`axis_name` None) it sees the global batch. Under a
    map over `axis_name` it sees one device's part: sums over the batch are then made global by
    `total`, and gradients, which are those of the local part of the global loss, are summed.

    Random numbers depend on (state.key, step, position in the global batch) alone, so a resumed
    run, or one on other devices, sees the same pixels. Dropout differs between jit and a map.

    Args:
        model_apply: `model.apply` of the Linen network.
        task: a `types.Task`, of which only `loss` is used.
        optimizer: as `make_optimizer` returns it.
        schedule: step -> factor on hyper["learning_rate"]; None is constant.
        augment: of one example, mapped over the batch.
        prepare_batch: batch -> batch before the augmentation, such as casting and scaling of
            integer images; must treat examples one by one.

    The metrics are loss, grad_norm (before clipping), param_norm (after the update),
    learning_rate, and the task's own; all () float32.
    """

    def step(
        state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        augment_key, loss_key = jax.random.split(key)
        if axis_name is not None:
            loss_key = jax.random.fold_in(loss_key, jax.lax.axis_index(axis_name))
        if prepare_batch is not None:
            batch = prepare_batch(batch)
        if augment is not None:
            keys = example_keys(augment_key, batch, axis_name=axis_name)
            batch = jax.vmap(augment)(keys, batch)

        def loss_of(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            apply = make_apply(model_apply, params, state.model_state)
            return task.loss(apply, batch, key=loss_key, total=make_total(axis_name))

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        model_state = aux.get("model_state", state.model_state)
        metrics = {**aux.get("metrics", {}), "loss": loss}
        if axis_name is not None:
            grads = jax.lax.psum(grads, axis_name)
            model_state, metrics = mean_over((model_state, metrics), axis_name)
        state = state.replace(model_state=model_state)
        state, numbers = update(state, grads, optimizer=optimizer, schedule=schedule)
        metrics = {name: jnp.asarray(x, jnp.float32) for name, x in {**metrics, **numbers}.items()}
        return state, metrics

    return step


def example_keys(key: jax.Array, batch: Batch, *, axis_name: str | None) -> jax.Array:
    """One key an example, a function of `key` and its position in the global batch."""
    local = jax.tree.leaves(batch)[0].shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(first + jnp.arange(local))


def make_total(axis_name: str | None) -> Callable[[jax.Array], jax.Array]:
    """`total(x)`: a sum over the local batch made one over the global batch.

    Under a map its value is the global sum and its gradient that of the local one: the
    gradients are summed over the devices afterwards, and must not be counted twice.
    """
    if axis_name is None:
        return lambda x: x
    return lambda x: x + jax.lax.stop_gradient(jax.lax.psum(x, axis_name) - x)


def make_apply(
    model_apply: Callable[..., Any], params: Any, model_state: Mapping[str, Any]
) -> Callable[..., tuple[Any, Any]]:
    """`apply(images, *, key)`: the network in training mode, its outputs and new state."""

    def apply(images: Any, *, key: jax.Array) -> tuple[Any, Any]:
        return model_apply(
            {"params": params, **model_state},
            images,
            train=True,
            mutable=list(model_state),
            rngs={"dropout": key},
        )

    return apply


def update(
    state: TrainState, grads: Any, *, optimizer: Optimizer, schedule: Schedule | None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one optimizer step with these gradients, and the numbers to watch."""
    factor = 1.0 if schedule is None else schedule(state.step)
    rate = state.hyper["learning_rate"] * factor
    transform = optimizer({**state.hyper, "learning_rate": rate})
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    numbers = {
        "learning_rate": rate,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
    }
    new = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
    )
    return new.replace(ema=moving_average(new, accumulate=optimizer.accumulate)), numbers


def moving_average(state: TrainState, *, accumulate: int) -> Any:
    """The moving average of the variables of a state after its step; {} where it is off.

    The decay is min(hyper["ema_decay"], (1 + t) / (10 + t)) after t updates, as TensorFlow has
    it: a long average would otherwise remember the random initial values for thousands of steps.
    """
    if not jax.tree.leaves(state.ema):
        return state.ema
    updates = ((state.step - 1) // accumulate).astype(jnp.float32)
    decay = jnp.minimum(state.hyper["ema_decay"], (1 + updates) / (10 + updates))
    # Between the updates of accumulated gradients the parameters stand still, and so does it.
    is_update = state.step % accumulate == 0
    return optax.incremental_update(
        network_variables(state), state.ema, jnp.where(is_update, 1 - decay, 0.0)
    )


def mean_over(tree: Any, axis_name: str) -> Any:
    """The mean over the devices of each floating-point leaf; counters are left as they are."""

    def mean(x: Any) -> Any:
        return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(mean, tree)
