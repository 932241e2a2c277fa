"""The one training loop: evaluate -> save -> next batch -> step.

In this order a checkpoint holds all that happened up to its step and nothing of what comes next,
so that a resumed run neither skips nor repeats anything.
"""

from __future__ import annotations

import collections
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.logging import Logger
from jaxmed.training.processes import any_of
from jaxmed.training.sharding import Lifted
from jaxmed.training.speed import utilization
from jaxmed.training.state import (
    TrainState,
    best_after,
    best_numbers,
    evaluated_step,
    is_exhausted,
)
from jaxmed.types import UserError

STEPS_IN_FLIGHT = 2
"""Steps that may wait for the device; each holds a batch in memory."""
AGREE_EVERY = 10
"""Steps after which several processes tell each other of signals."""
WATCHED = ("loss", "grad_norm", "param_norm", "learning_rate")
"""Metrics that must stay finite."""
METRICS_KEPT = 100
"""Steps whose metrics may wait to be fetched, where there is no logging."""


class TrainingDiverged(UserError):
    """The loss, gradient or parameters are no longer finite. Nothing of it was saved."""


class StopSignal:
    """While entered, Ctrl-C or SIGTERM asks training to save and stop; the second one acts at once.

    Attributes:
        requested: whether to stop; may also be set by hand.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self._former = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self.requested = True
        self._restore()  # so that the second one does what it always does
        name = signal.Signals(number).name
        # Not print, which must not be entered twice, as a handler may.
        os.write(2, f"\n{name}: saving and stopping; once more to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}


def train(
    state: TrainState,
    *,
    lifted: Lifted,
    batches: Iterator[Mapping[str, Any]],
    steps: int,
    evaluate: Callable[[TrainState], Any] | None = None,
    main_score: str = "",
    checkpoints: Checkpoints | None = None,
    logger: Logger | None = None,
    log_every: int = 50,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    early_stopping: int = 0,
    steps_per_epoch: float | None = None,
    step_flops: Callable[[], float | None] | None = None,
    stop: StopSignal | None = None,
    split: str = "val",
    members: Sequence[str] = (),
    steps_per_call: int = 1,
) -> TrainState:
    """Train up to `steps`, and end with an evaluation and a checkpoint.

    Args:
        state: placed, fresh or restored; its memory is given away.
        lifted: the step, on its devices.
        batches: from the batch number state.step on.
        steps: at which training ends, counted from the very first.
        evaluate: global state -> scores, of models trained together one mapping a model; also
            called at the end.
        main_score: name of the score that chooses the best checkpoint; higher is better.
        checkpoints: where to save; an evaluation better than all before is always saved.
        logger: where to log; None prints lines.
        log_every: steps; each line tells of its step alone, so that a resumed run logs the same.
        evaluate_every: steps; 0 is only at the end.
        checkpoint_every: steps; 0 is only at the end.
        early_stopping: evaluations without a better score after which to end; 0 is never.
        steps_per_epoch: for the log.
        step_flops: gives the floating-point operations of a step once they are known, for the log's
            `mfu`, the share of what the devices could do at best.
        stop: training saves, without evaluating, and ends once this is requested.
        split: name of the evaluated part, for the log.
        members: names of the models, where several are trained together.
        steps_per_call: as many are one call, where nothing is due between them.

    Returns:
        The placed state at the end.

    Raises:
        TrainingDiverged: naming the step and its numbers.
    """
    run = _Run(
        lifted, logger or Logger(steps=steps), log_every, steps_per_epoch, step_flops, members
    )
    step = int(jax.device_get(lifted.global_state(state).step))
    best = best_numbers(lifted.global_state(state))
    is_saved = checkpoints is not None and step in checkpoints.steps()
    saved = (step, evaluated_step(best)) if is_saved else None
    while True:
        stopping = stop is not None and _is_stopping(stop, step)
        exhausted = bool(is_exhausted(best, early_stopping=early_stopping).all())
        ending = step >= steps or exhausted or stopping
        improved = False
        is_due = step >= steps or _divides(evaluate_every, step)
        if evaluate is not None and is_due and not stopping and evaluated_step(best) < step:
            run.settle()
            scores = evaluate(lifted.global_state(state))
            main = [_main(s, main_score) for s in scores] if members else _main(scores, main_score)
            best, better = best_after(best, score=main, step=step, early_stopping=early_stopping)
            state, improved = lifted.with_best(state, best, better), bool(better.any())
            run.log(step, split, _merge(scores, members, main_score) if members else scores)
            if is_exhausted(best, early_stopping=early_stopping).all():
                run.logger.say(
                    f"no better {main_score} in {early_stopping} evaluations; ending at step {step}"
                )
                ending = True
        now = (step, evaluated_step(best))
        is_due = ending or improved or _divides(checkpoint_every, step)
        if checkpoints is not None and is_due and saved != now:
            run.settle()
            checkpoints.save(lifted.global_state(state), wait=ending)
            saved = now
        run.resume_clock()
        if ending:
            run.settle()
            return state
        count = steps_per_call if lifted.can_scan else 1
        agree = AGREE_EVERY if jax.process_count() > 1 else 0
        due = (log_every, evaluate_every, checkpoint_every, agree)
        if run.is_first or _until_due(step, steps, due) < count:
            count = 1  # the first by itself, whose wait for the compiler is told
        taken = [batch for _ in range(count) if (batch := run.next_batch(batches, stop))]
        if len(taken) < count:
            continue  # stopped while waiting for the data
        if count > 1:
            state, metrics = lifted.steps(state, taken)
        else:
            state, metrics = lifted.step(state, lifted.place_batch(taken[0]))
        step += count
        run.stepped(step, metrics, count, is_last=step >= steps)


def _is_stopping(stop: StopSignal, step: int) -> bool:
    """Whether to stop before this step; several processes agree on it, now and then."""
    if jax.process_count() == 1:
        return stop.requested
    if step % AGREE_EVERY:
        return False
    stop.requested = any_of(stop.requested)
    return stop.requested


def _until_due(step: int, steps: int, periods: Sequence[int]) -> int:
    """Steps until the end or the next multiple of a period."""
    return min([steps - step, *(every - step % every for every in periods if every > 0)])


def _divides(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _merge(
    scores: Sequence[Mapping[str, Any]], members: Sequence[str], shown: str
) -> dict[str, Any]:
    """The mean over the models that have a score, and each model's own of the one `shown`."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for own in scores for name in own):
        values = [own[name] for own in scores if own.get(name) is not None]
        merged[name] = float(np.mean(values)) if values else None
    own = zip(members, scores, strict=True)
    return merged | {f"{shown}/{member}": found.get(shown) for member, found in own}


def _merge_steps(metrics: Mapping[str, Any], members: Sequence[str]) -> dict[str, float]:
    """The mean over the models that have not diverged, and each model's own loss."""
    merged = {}
    for name, values in metrics.items():
        finite = values[np.isfinite(values)]
        merged[name] = float(finite.mean()) if finite.size else math.nan
    own = zip(members, metrics["loss"], strict=True)
    return merged | {f"loss/{member}": float(value) for member, value in own}


def _main(scores: Mapping[str, Any], name: str) -> float | None:
    if name not in scores:
        raise ValueError(f"main_score {name!r} is not among the scores {', '.join(scores)}")
    return None if scores[name] is None else float(scores[name])


class _Run:
    """What goes on around the steps: metrics under way, the clock, the log."""

    def __init__(
        self,
        lifted: Lifted,
        logger: Logger,
        log_every: int,
        epoch: float | None,
        step_flops: Callable[[], float | None] | None,
        members: Sequence[str],
    ):
        self.logger = logger
        self._members = members
        self._diverged: dict[str, int] = {}
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

    @property
    def is_first(self) -> bool:
        """Whether no step has run yet."""
        return not self._compiled

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
        if is_last or _divides(self._log_every, step):
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
                    found = _merge_steps(found, self._members)
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
        for member, is_finite in zip(self._members, finite, strict=True):
            if not is_finite and member not in self._diverged:
                self._diverged[member] = step
                self.logger.say(f"{member} diverged at step {step}; the other models go on")

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
