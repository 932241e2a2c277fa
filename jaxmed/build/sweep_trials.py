"""One trial of a sweep: a run, told of under way, and what came of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.config import read_run, update
from jaxmed.build.runs import train_run
from jaxmed.build.study import Study
from jaxmed.build.sweep_space import Dimension, settings_of
from jaxmed.build.workdir import saved_steps
from jaxmed.training.faults import memory_fault
from jaxmed.training.progress import TrainingDiverged
from jaxmed.training.signals import StopSignal
from jaxmed.types import UserError

MOST_RESUMES = 3
"""Times that a trial is taken up at the same step before it is given up."""


def train_one(
    study: Study, number: int, config: ConfigDict, space: Sequence[Dimension], output: Path
) -> bool:
    """Train a trial as a run of its own, and note its score.

    Returns:
        False where a signal stopped it.
    """
    settings = settings_of(space, study.params(number))
    stop = StopSignal()
    workdir = output / "trials" / str(number)
    print(f"trial {number}: {tell_settings(settings)}")
    if "pruned" not in study.facts(number):  # otherwise its worker was lost just then
        study.note(number, workdir=str(workdir.relative_to(output)))
        config = config.copy_and_resolve_references()
        update(config, settings, where=f"trial {number}")

        def watch(step: int, scores: Any) -> bool:
            training = read_run(workdir)["config"]["training"]
            ends = tell_score(study, number, step, np.ravel(scores).tolist(), training)
            if not ends or step >= training["steps"]:  # then it has come to its end by itself
                return False
            study.note(number, pruned=step)
            return True

        with counting_resumes(study, [number], workdir):
            finished = train_run(config, workdir, watch=watch, stop=stop)
        if finished:
            found = read_summary(workdir)
            entries = found["members"] if config.training.seeds > 1 else [found]
            finish_trial(study, number, entries, found["main_score"], config.training.seeds)
            return True
    if "pruned" not in study.facts(number):
        return False
    study.prune(number)
    print(f"trial {number}: pruned at step {study.facts(number)['pruned']}")
    return not stop.requested


def tell_settings(settings: Mapping[str, Any]) -> str:
    """What a trial tries, in a line."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def tell_score(
    study: Study,
    number: int,
    step: int,
    scores: Sequence[float | None],
    training: Mapping[str, Any],
) -> bool:
    """Report the mean over the seeds that have a score; whether the trial should end there.

    Args:
        study: the trial's.
        number: of the trial.
        step: that was evaluated.
        scores: one a seed.
        training: that section of the run's config.
    """
    study.set_first_rung(training["evaluate_every"])
    known = [score for score in scores if score is not None]
    if known and not np.isfinite(known).all():
        study.note(number, diverged=step)
        return False
    return bool(known) and study.report(number, step, float(np.mean(known)))


def finish_trial(
    study: Study, number: int, entries: Sequence[Mapping[str, Any]], main: str, seeds: int
) -> None:
    """Note the score of a trial that came to its end.

    Args:
        study: the trial's.
        number: of the trial.
        entries: "metrics" and "step" of each seed's evaluation.
        main: the score's name.
        seeds: how many there should be.

    Raises:
        UserError: where a seed diverged, or has no score.
    """
    if "diverged" in study.facts(number):
        raise UserError(f"diverged before step {study.facts(number)['diverged']}")
    found = [entry["metrics"][main] for entry in entries]
    if len(found) < seeds or any(entry["value"] is None for entry in found):
        raise UserError(f"{main} of the validation part is undefined, or a model diverged")
    bounds = {end: [entry[end] for entry in found] for end in ("low", "high")}
    known = all(bound is not None for own in bounds.values() for bound in own)
    score = float(np.mean([entry["value"] for entry in found]))
    study.note(
        number,
        **{end: float(np.mean(own)) if known else None for end, own in bounds.items()},
        cases=int(found[0]["n"]),
        seeds=[float(entry["value"]) for entry in found] if seeds > 1 else [],
        step=max(int(entry["step"]) for entry in entries),
        score_name=main,
    )
    study.finish(number, score)
    print(f"trial {number}: {main} {score:.4f}")


def read_summary(workdir: Path) -> dict[str, Any]:
    """The evaluation of the validation part with which a run ended."""
    path = workdir / "evaluation" / "val" / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def counting_resumes(study: Study, numbers: Sequence[int], workdir: Path) -> Iterator[None]:
    """Give up what ends its process time and again at the same step.

    What is counted are attempts whose process did not live to say how they ended.

    Raises:
        UserError: then.
    """
    ended = study.facts(numbers[0]).get("begun", [])
    step = max(saved_steps(workdir), default=0)
    if ended.count(step) >= MOST_RESUMES:
        raise UserError(
            f"the process was ended {MOST_RESUMES} times after step {step}, as when a machine "
            "runs out of memory"
        )
    for number in numbers:
        study.note(number, begun=[*ended, step])
    try:
        yield
    finally:
        for number in numbers:
            study.note(number, begun=ended)


def failure(error: Exception) -> str | None:
    """What went wrong with a trial, in a line; None of what is no fault of its settings."""
    said = " ".join(str(error).split())
    if isinstance(error, TrainingDiverged):
        return f"diverged: {said}"
    if isinstance(error, UserError):
        return said
    return memory_fault(error)
