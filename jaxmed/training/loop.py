"""The one training loop: evaluate -> save -> next batch -> step.

In this order a checkpoint holds all that happened up to its step and nothing of what comes next,
so that a resumed run neither skips nor repeats anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.logging import Logger
from jaxmed.training.processes import any_of
from jaxmed.training.progress import Progress, divides
from jaxmed.training.sharding import Lifted
from jaxmed.training.signals import StopSignal
from jaxmed.training.state import (
    TrainState,
    best_after,
    best_numbers,
    evaluated_step,
    is_exhausted,
)

AGREE_EVERY = 10
"""Steps after which several processes tell each other of signals."""


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
    watch: Callable[[int, Any], bool] | None = None,
) -> TrainState:
    """Train up to `steps`, and end with an evaluation and a checkpoint.

    Args:
        state: placed, fresh or restored; its memory is given away.
        lifted: the step, on its devices.
        batches: from the batch number state.step on.
        steps: at which training ends, counted from the very first.
        evaluate: global state -> scores, of models trained together one mapping a model, None for
            one that has diverged; also called at the end.
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
        watch: is told each step that was evaluated and its main score, of models trained together
            one a model: None where it is undefined, -inf of one that has diverged; training ends
            there, saved, where it returns True.

    Returns:
        The placed state at the end.

    Raises:
        TrainingDiverged: naming the step and its numbers.
    """
    step = int(jax.device_get(lifted.global_state(state).step))
    best = best_numbers(lifted.global_state(state))
    told = dict(zip(members, np.ravel(best.get("diverged", ())).tolist(), strict=False))
    run = Progress(
        lifted,
        logger or Logger(steps=steps),
        log_every,
        steps_per_epoch,
        step_flops,
        members,
        {member: at for member, at in told.items() if at},
    )
    if step < steps:
        run.logger.say("compiling the step")
    is_saved = checkpoints is not None and step in checkpoints.steps()
    saved = (step, evaluated_step(best)) if is_saved else None
    while True:
        stopping = stop is not None and _is_stopping(stop, step)
        exhausted = bool(is_exhausted(best, early_stopping=early_stopping).all())
        ending = step >= steps or exhausted or stopping
        improved = False
        is_due = step >= steps or divides(evaluate_every, step)
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
            if watch is not None and watch(step, main):
                ending = True
        now = (step, evaluated_step(best))
        is_due = ending or improved or divides(checkpoint_every, step)
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
        # Told by the step alone, so that a run that goes on takes the same calls.
        if _until_due(step, steps, due) < count:
            count = 1
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


def _merge(
    scores: Sequence[Mapping[str, Any] | None], members: Sequence[str], shown: str
) -> dict[str, Any]:
    """The mean over the models that have a score, and each model's own of the one `shown`."""
    found = [{} if own is None else own for own in scores]
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for own in found for name in own):
        values = [own[name] for own in found if own.get(name) is not None]
        merged[name] = float(np.mean(values)) if values else None
    own = zip(members, found, strict=True)
    merged |= {f"{shown}/{member}": mine.get(shown) for member, mine in own}
    return merged | {"models": sum(mine.get(shown) is not None for mine in found)}


def _main(scores: Mapping[str, Any] | None, name: str) -> float | None:
    """The main score; -inf of a model that has diverged, None where it is undefined."""
    if scores is None:
        return -math.inf
    if name not in scores:
        raise ValueError(f"main_score {name!r} is not among the scores {', '.join(scores)}")
    return None if scores[name] is None else float(scores[name])
