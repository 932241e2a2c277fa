"""Everything that training changes, as one pytree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class TrainState(flax.struct.PyTreeNode):
    """Arrays only, so that shape evaluation, sharding and checkpoints are one line each.

    Attributes:
        step: () int32, batches seen so far.
        params: parameters of the network.
        model_state: its other collections, such as batch_stats; {} where there are none.
        opt_state: of the optimizer.
        ema: exponential moving average of the network's variables, {"params", its other
            collections}; {} where it is off. Averaged weights need the statistics of the same
            average: those of the last weights are of other activations.
        hyper: float32 each, such as learning_rate and weight_decay; traced, so that models
            trained together may differ in them and changing one compiles nothing.
        best: "score" () float32, the best main score so far (-inf before the first); "step" ()
            int32, when it was reached; "bad_evaluations" () int32, evaluations since;
            "evaluated" () int32, the last evaluated step (-1 before the first). Of models trained
            together also "variables", those that reached the score, since they reach it at
            different steps (or where there is no score yet, the last finite ones, and their
            step), and "diverged" () int32, the evaluated step at which there was nothing to
            evaluate any more, or 0.
        key: () typed PRNG key; it stays the same, steps fold their number in.

    In the state of models trained together all but `step` have a leading axis, one entry a model.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    hyper: Any
    best: Any
    key: Any


def init_state(
    model_init: Callable[[jax.Array], Mapping[str, Any]],
    optimizer: Callable[[Mapping[str, Any]], Any],
    *,
    key: jax.Array,
    hyper: Mapping[str, Any],
    ema: bool = False,
    keep_best: bool = False,
) -> TrainState:
    """The state before the first step; jittable, so that large parameters are born sharded.

    Args:
        model_init: key -> variables, {"params": ..., other collections}.
        optimizer: as `make_optimizer` returns it.
        key: typed PRNG key; one half draws the parameters, the other is kept for the steps.
        hyper: numbers that the optimizer and the moving average read.
        ema: whether to keep an exponential moving average of the variables.
        keep_best: whether the state holds the best variables so far.
    """
    init_key, step_key = jax.random.split(key)
    model_state = dict(model_init(quick_key(init_key)))
    params = model_state.pop("params")
    traced = {name: jnp.asarray(value, jnp.float32) for name, value in hyper.items()}
    # Copies: one buffer must not be donated twice.
    variables = {"params": params, **model_state}
    best: dict[str, Any] = {}
    if keep_best:
        copies = jax.tree.map(jnp.copy, variables)
        best = {"variables": copies, "diverged": jnp.zeros((), jnp.int32)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer(traced).init(params),
        ema=jax.tree.map(jnp.copy, variables) if ema else {},
        hyper=traced,
        best={
            "score": jnp.full((), -jnp.inf, jnp.float32),
            "step": jnp.zeros((), jnp.int32),
            "bad_evaluations": jnp.zeros((), jnp.int32),
            "evaluated": jnp.full((), -1, jnp.int32),
            **best,
        },
        key=step_key,
    )


def quick_key(key: jax.Array) -> jax.Array:
    """The same key for XLA's own generator, whose code compiles several times faster on a CPU.

    A network draws dozens of arrays, each compiled by itself: of a ResNet-18 it is 3 s, not 14.
    Unlike JAX's default it promises no equal numbers on other hardware, which the start of a
    training does not need; the steps keep the default.
    """
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.concatenate([data, data]), impl="rbg")


def network_variables(state: TrainState) -> dict[str, Any]:
    """The variables of the network after the last step, as `model.apply` takes them."""
    return {"params": state.params, **state.model_state}


def evaluation_variables(state: TrainState) -> dict[str, Any]:
    """The variables to evaluate and predict with: the moving average where there is one."""
    return state.ema if jax.tree.leaves(state.ema) else network_variables(state)


def best_numbers(state: TrainState) -> dict[str, np.ndarray]:
    """`best` of a global state without the variables, on the host."""
    return jax.device_get({k: v for k, v in state.best.items() if k != "variables"})


def evaluated_step(best: Mapping[str, Any]) -> int:
    """The last evaluated step, -1 before the first; all models are evaluated together."""
    return int(np.max(best["evaluated"]))


def is_exhausted(best: Mapping[str, Any], *, early_stopping: int) -> np.ndarray:
    """Whether so many evaluations have brought nothing better; never where it is 0."""
    return np.asarray((early_stopping > 0) & (best["bad_evaluations"] >= early_stopping))


def best_after(
    best: Mapping[str, Any], *, score: Any, step: int, early_stopping: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`best` after one more evaluation, and whether it was the best so far.

    Args:
        best: of a state, on the host.
        score: main score, higher is better, or one a model; None or NaN (undefined) is no
            improvement, but better than nothing for one of several models; -inf is of a model that
            has diverged.
        step: at which it was measured.
        early_stopping: a model that is exhausted stays so, as if it had been trained by itself.
    """
    # Compared in float32, as it is kept, so that a resumed run decides the same.
    now = np.asarray(score, object).astype(np.float32)  # None becomes NaN
    over = is_exhausted(best, early_stopping=early_stopping)
    improved = np.asarray((now > best["score"]) & ~over)
    bad = np.where(improved, 0, best["bad_evaluations"] + 1)
    score_now = np.where(improved, now, best["score"]).astype(np.float32)
    more: dict[str, np.ndarray] = {}
    if "diverged" in best:
        is_new = np.isneginf(now) & (best["diverged"] == 0)
        more["diverged"] = np.where(is_new, step, best["diverged"]).astype(np.int32)
        improved = improved | (np.isnan(now) & np.isneginf(best["score"]) & ~over)
    return {
        **more,
        "score": score_now,
        "step": np.where(improved, step, best["step"]).astype(np.int32),
        "bad_evaluations": bad.astype(np.int32),
        "evaluated": np.full_like(best["evaluated"], step),
    }, improved
