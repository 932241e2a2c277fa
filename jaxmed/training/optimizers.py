"""Optimizers whose numbers are traced, and learning-rate schedules; a thin layer over optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxmed.types import UserError

Schedule = Callable[[Any], Any]
"""step -> factor in [0, 1] that multiplies hyper["learning_rate"]."""

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "polynomial", "one_cycle")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Called with the numbers of this step, returns the optax transformation to apply.

    The numbers come in at every step instead of being baked in, so they may be traced; the
    structure of the optimizer's state depends on which keys there are, never on their values.

    Attributes:
        make: hyper -> optax transformation.
        accumulate: batches whose gradients are averaged for one update.
    """

    make: Callable[[Mapping[str, Any]], optax.GradientTransformation]
    accumulate: int = 1

    def __call__(self, hyper: Mapping[str, Any]) -> optax.GradientTransformation:
        """The transformation with these numbers."""
        inner = self.make(hyper)
        if self.accumulate == 1:
            return inner
        return optax.MultiSteps(inner, self.accumulate).gradient_transformation()


def make_optimizer(name: str, *, accumulate: int = 1, nesterov: bool = True) -> Optimizer:
    """SGD with momentum, Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019).

    It reads from `hyper`: learning_rate, and where present weight_decay, clip_norm (largest
    global norm of the gradient), momentum (0.9; nnU-Net has 0.99), b1 (0.9) and b2 (0.999).
    Weight decay is decoupled for adamw and L2 for the others, and never touches biases and
    scales of normalisation, which are the parameters of at most one axis.

    Gradients of `accumulate` batches are averaged by optax.MultiSteps, one update every
    `accumulate` steps. Each batch's loss stays the exact loss of that batch, which a sum over
    micro-batches inside a step would not be for batch Dice or a count of positives.

    Args:
        name: "sgd", "adam" or "adamw".
        accumulate: batches an update, at least 1.
        nesterov: whether the momentum of SGD looks ahead.

    Raises:
        UserError: for an unknown name or accumulate < 1.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer.name is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    if accumulate < 1:
        raise UserError(f"optimizer.accumulate is {accumulate}; expected at least 1")

    def make(hyper: Mapping[str, Any]) -> optax.GradientTransformation:
        decay = []
        if "weight_decay" in hyper:
            decay = [optax.add_decayed_weights(hyper["weight_decay"], mask=is_decayed)]
        if name == "sgd":
            direction = optax.trace(hyper.get("momentum", 0.9), nesterov=nesterov)
        else:
            direction = optax.scale_by_adam(hyper.get("b1", 0.9), hyper.get("b2", 0.999))
        chain = [direction, *decay] if name == "adamw" else [*decay, direction]
        if "clip_norm" in hyper:
            chain = [optax.clip_by_global_norm(hyper["clip_norm"]), *chain]
        return optax.chain(*chain, optax.scale_by_learning_rate(hyper["learning_rate"]))

    return Optimizer(make, accumulate)


def is_decayed(params: Any) -> Any:
    """True for each parameter that weight decay pulls on: those of two axes and more."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_schedule(
    name: str, *, steps: int, warmup_steps: int = 0, power: float = 0.9, final: float = 0.0
) -> Schedule:
    """The factor on the learning rate at each step, after a linear warm-up.

    constant    1
    cosine      falls to `final` along half a cosine (Loshchilov and Hutter 2017)
    polynomial  (1 - progress)^power, down to `final` (nnU-Net, Isensee et al. 2021, power 0.9)
    one_cycle   rises linearly from 1/25 over `warmup_steps` (0: 30 % of the steps), then falls
                along half a cosine to 1e-5 (after Smith and Topin 2018)

    Args:
        name: one of the above.
        steps: length of the training; progress is measured on what follows the warm-up.
        warmup_steps: steps of the warm-up, (step + 1) / warmup_steps in the first three.
        power: of the polynomial.
        final: factor at the end, of cosine and polynomial.

    Raises:
        UserError: for an unknown name, or a warm-up that fills the training.
    """
    if name not in SCHEDULES:
        raise UserError(f"optimizer.schedule is {name!r}; expected one of {', '.join(SCHEDULES)}")
    if name == "one_cycle" and warmup_steps == 0:
        warmup_steps = steps * 3 // 10
    rest = steps - warmup_steps
    if warmup_steps < 0 or (rest < 1 and name != "constant"):
        raise UserError(
            f"optimizer.warmup_steps is {warmup_steps}; expected 0 to {steps - 1}, fewer than "
            f"the {steps} training steps"
        )
    after = {
        "constant": lambda: optax.constant_schedule(1.0),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, rest, alpha=final),
        "polynomial": lambda: optax.polynomial_schedule(1.0, final, power, rest),
        "one_cycle": lambda: optax.cosine_decay_schedule(1.0, rest, alpha=1e-5),
    }[name]()
    if warmup_steps == 0:
        return after
    start = 1 / 25 if name == "one_cycle" else 1 / warmup_steps
    # Ends one step early, so that the first step after the warm-up is the one at the peak.
    ramp = optax.linear_schedule(start, 1.0, max(warmup_steps - 1, 1))
    return optax.join_schedules([ramp, after], [warmup_steps])
