"""What goes on around the steps of training: metrics under way, the clock, the log."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.training.logging import Logger
from jaxmed.training.sharding import Lifted
from jaxmed.training.signals import StopSignal
from jaxmed.training.speed import utilization
from jaxmed.types import UserError, count_of

STEPS_IN_FLIGHT = 2
"""Steps that may wait for the device; each holds a batch in memory."""
WATCHED = ("loss", "grad_norm", "param_norm", "learning_rate")
"""Metrics that must stay finite."""
METRICS_KEPT = 100
"""Steps whose metrics may wait to be fetched, where there is no logging."""


class TrainingDiverged(UserError):
    """The loss, gradient or parameters are no longer finite. Nothing of it was saved."""


def divides(every: int, step: int) -> bool:
    """Whether a step is due that comes every so many steps; never at 0."""
    return every > 0 and step > 0 and step % every == 0


def _merge_steps(
    metrics: Mapping[str, Any], members: Sequence[str], diverged: Collection[str]
) -> dict[str, float]:
    """The mean over the models that have not diverged, how many these are, and each one's loss."""
    alive = np.array([member not in diverged for member in members])
    merged = {
        name: float(values[alive].mean()) if alive.any() else math.nan
        for name, values in metrics.items()
    }
    merged["models"] = int(alive.sum())
    own = zip(members, metrics["loss"], strict=True)
    return merged | {f"loss/{member}": float(value) for member, value in own}


class Progress:
    """What goes on around the steps: metrics under way, the clock, the log."""

    def __init__(
        self,
        lifted: Lifted,
        logger: Logger,
        log_every: int,
        epoch: float | None,
        step_flops: Callable[[], float | None] | None,
        members: Sequence[str],
        diverged: Mapping[str, int],
    ):
        self.logger = logger
        self._members = members
        self._diverged = dict(diverged)
        self._lifted = lifted
        self._log_every = log_every
        self._steps_per_epoch = epoch
        self._step_flops = step_flops or (lambda: None)
        # (step, number of steps, metrics still on the device), oldest first
        self._pending: collections.deque[tuple[int, int, Any]] = collections.deque()
        self._last: dict[str, float] = {}
        self._compiled: set[int] = set()
        self._batch_size = 0
        self._paused: float | None = None
        self._reset_clock()

    def next_batch(self, batches: Iterator[Any], stop: StopSignal | None) -> Any:
        """The next batch; None where loading ended because of the signal to stop."""
        start = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError("batches ended before training did; it needs endless ones") from None
        except Exception:
            # The signal also reaches worker processes, whose end must not keep us from saving.
            if stop is not None and stop.requested and jax.process_count() == 1:
                return None
            raise
        self._waited += time.monotonic() - start
        self._batch_size = self._lifted.count_images(batch)
        return batch

    def stepped(self, step: int, metrics: Any, count: int, *, is_last: bool) -> None:
        """Note the metrics of some steps; log where it is time, without waiting otherwise."""
        self._pending.append((step, count, metrics))
        self._images += self._batch_size * count
        if count not in self._compiled:
            self.settle()
            seconds = time.monotonic() - self._since
            if not self._compiled:
                self.logger.say(f"first step after {seconds:.1f} s (compiling)")
            self._compiled.add(count)
            self._reset_clock()
        elif len(self._pending) > STEPS_IN_FLIGHT:
            # Not a wait for this step: it keeps the host from running far ahead of the device.
            jax.block_until_ready(self._pending[-1 - STEPS_IN_FLIGHT][2]["loss"])
        if is_last or divides(self._log_every, step):
            self.settle()
            self.log(step, "train", {**self._last, **self._speed()})
            self._reset_clock()
        elif len(self._pending) >= METRICS_KEPT:
            self.settle()
        self.logger.progress(step)

    def settle(self) -> None:
        """Wait for all steps and check that they are finite.

        Raises:
            TrainingDiverged: naming the first bad step.
        """
        while self._pending:
            step, count, metrics = self._pending.popleft()
            every = self._lifted.fetch(metrics)
            for i in range(count):
                found = {n: x[i] for n, x in every.items()} if count > 1 else every
                if self._members:
                    self._watch_members(step - count + 1 + i, found)
                    found = _merge_steps(found, self._members, self._diverged)
                self._last = found
                self._watch(step - count + 1 + i)
        if self._paused is None:
            self._paused = time.monotonic()

    def _watch(self, step: int) -> None:
        numbers = {name: self._last[name] for name in WATCHED}
        if not all(math.isfinite(value) for value in numbers.values()):
            told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            raise TrainingDiverged(
                f"training diverged at step {step}: {told}; lower optimizer.learning_rate, "
                "lengthen the warm-up, set optimizer.clip_norm, or check the images for NaN"
            )

    def _watch_members(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Say which models have diverged; the others go on."""
        finite = np.all([np.isfinite(metrics[name]) for name in WATCHED], axis=0)
        known = set(self._diverged)
        for member, is_finite in zip(self._members, finite, strict=True):
            if not is_finite:
                self._diverged.setdefault(member, step)
        rest = len(self._members) - len(self._diverged)
        goes_on = "goes on" if rest == 1 else "go on"
        told = f"; {count_of(rest, 'other model')} {goes_on}" if rest else ""
        for member in self._diverged:
            if member not in known:
                self.logger.say(f"{member} diverged at step {step}{told}")

    def resume_clock(self) -> None:
        """Go on counting time as training, after an evaluation or a save."""
        if self._paused is not None:
            self._since += time.monotonic() - self._paused
            self._paused = None

    def log(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """One line, with the epoch."""
        per_epoch = self._steps_per_epoch
        epoch = None if per_epoch is None else round(step / per_epoch, 4)
        self.logger.log(step, split, {"epoch": epoch, **values})

    def _speed(self) -> dict[str, float | None]:
        """Of the steps since the last line; None where they are none but the compiled one."""
        if not self._images:
            return {"images_per_second": None, "data_wait": None, "mfu": None}
        seconds = (self._paused or time.monotonic()) - self._since
        return {
            "images_per_second": self._images / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
            "mfu": self._utilization(seconds),
        }

    def _utilization(self, seconds: float) -> float | None:
        flops = self._step_flops()
        if flops is None:
            return None
        steps = self._images / self._batch_size
        mesh = self._lifted.mesh
        return utilization(steps * flops, seconds, device=mesh.local_devices[0], devices=mesh.size)

    def _reset_clock(self) -> None:
        self._since = time.monotonic()
        self._paused = None
        self._waited = 0.0
        self._images = 0
