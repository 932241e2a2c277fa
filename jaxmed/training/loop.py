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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.logging import Logger
from jaxmed.training.processes import any_of
from jaxmed.training.sharding import Lifted
from jaxmed.training.speed import utilization
from jaxmed.training.state import TrainState, best_after
from jaxmed.types import UserError

STEPS_IN_FLIGHT = 2
"""Steps that may wait for the device; each holds a batch in memory."""
AGREE_EVERY = 10
"""Steps after which several processes tell each other of signals."""
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
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
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
) -> TrainState:
    """Train up to `steps`, and end with an evaluation and a checkpoint.

    Args:
        state: placed, fresh or restored; its memory is given away.
        lifted: the step, on its devices.
        batches: from the batch number state.step on.
        steps: at which training ends, counted from the very first.
        evaluate: global state -> scores; also called at the end.
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

    Returns:
        The placed state at the end.

    Raises:
        TrainingDiverged: naming the step and its numbers.
    """
    run = _Run(lifted, logger or Logger(steps=steps), log_every, steps_per_epoch, step_flops)
    step = int(jax.device_get(lifted.global_state(state).step))
    best = jax.device_get(lifted.global_state(state).best)
    is_saved = checkpoints is not None and step in checkpoints.steps()
    saved = (step, int(best["evaluated"])) if is_saved else None
    while True:
        stopping = stop is not None and _is_stopping(stop, step)
        exhausted = 0 < early_stopping <= int(best["bad_evaluations"])
        ending = step >= steps or exhausted or stopping
        improved = False
        is_due = step >= steps or _divides(evaluate_every, step)
        if evaluate is not None and is_due and not stopping and int(best["evaluated"]) < step:
            run.settle()
            scores = evaluate(lifted.global_state(state))
            best, improved = best_after(best, score=_main(scores, main_score), step=step)
            state = lifted.with_best(state, best)
            run.log(step, split, scores)
            if 0 < early_stopping <= int(best["bad_evaluations"]):
                run.logger.say(
                    f"no better {main_score} in {early_stopping} evaluations; ending at step {step}"
                )
                ending = True
        now = (step, int(best["evaluated"]))
        is_due = ending or improved or _divides(checkpoint_every, step)
        if checkpoints is not None and is_due and saved != now:
            run.settle()
            checkpoints.save(lifted.global_state(state), wait=ending)
            saved = now
        run.resume_clock()
        if ending:
            run.settle()
            return state
        batch = run.next_batch(batches, stop)
        if batch is None:
            continue  # stopped while waiting for the data
        state, metrics = lifted.step(state, lifted.place_batch(batch))
        step += 1
        run.stepped(step, metrics, is_last=step >= steps)


def _is_stopping(stop: StopSignal, step: int) -> bool:
    """Whether to stop before this step; several processes agree on it, now and then."""
    if jax.process_count() == 1:
        return stop.requested
    if step % AGREE_EVERY:
        return False
    stop.requested = any_of(stop.requested)
    return stop.requested


def _divides(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


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
    ):
        self.logger = logger
        self._lifted = lifted
        self._log_every = log_every
        self._steps_per_epoch = epoch
        self._step_flops = step_flops or (lambda: None)
        # (step, metrics still on the device), oldest first
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._last: dict[str, float] = {}
        self._is_compiled = False
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
        self._batch_size = next(iter(batch.values())).shape[0] * jax.process_count()
        return batch

    def stepped(self, step: int, metrics: Any, *, is_last: bool) -> None:
        """Note the metrics of a step; log where it is time, without waiting otherwise."""
        self._pending.append((step, metrics))
        self._images += self._batch_size
        if not self._is_compiled:
            self.settle()
            self.logger.say(f"first step after {time.monotonic() - self._since:.1f} s (compiling)")
            self._is_compiled = True
            self._reset_clock()
        elif len(self._pending) > STEPS_IN_FLIGHT:
            # Not a wait for this step: it keeps the host from running far ahead of the device.
            jax.block_until_ready(self._pending[-1 - STEPS_IN_FLIGHT][1]["loss"])
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
            step, metrics = self._pending.popleft()
            self._last = self._lifted.fetch(metrics)
            watched = ("loss", "grad_norm", "param_norm", "learning_rate")
            if not all(math.isfinite(self._last[name]) for name in watched):
                numbers = ", ".join(f"{name} {self._last[name]:.4g}" for name in watched)
                raise TrainingDiverged(
                    f"training diverged at step {step}: {numbers}; lower optimizer.learning_rate, "
                    "lengthen the warm-up, set optimizer.clip_norm, or check the images for NaN"
                )
        if self._paused is None:
            self._paused = time.monotonic()

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
