"""Trials trained as one program, of which the worse half stops now and then.

Successive halving (Jamieson & Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
Optimization, AISTATS 2016) with a reduction of 2: of n trials half go on after S / 2^r of S steps,
half of these after twice as many, until two or three come to the end. Each round is a run in a
workdir of its own, which goes on from the weights of the round before, so that a killed one goes
on as any run does.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.config import CONFIG_FILE, read_run, write_json
from jaxmed.build.members import plan_members, read_members, vary_text
from jaxmed.build.runs import train_run
from jaxmed.build.study import Study
from jaxmed.build.sweep_space import Dimension, settings_of
from jaxmed.build.sweep_trials import (
    counting_resumes,
    finish_trial,
    read_summary,
    tell_score,
    tell_settings,
)
from jaxmed.build.trained import load_run
from jaxmed.build.workdir import SPLIT_FILE, saved_steps
from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.signals import StopSignal
from jaxmed.types import UserError

HALVED_FILE = "halved.json"


def train_together(
    study: Study,
    group: Sequence[int],
    config: ConfigDict,
    space: Sequence[Dimension],
    output: Path,
    *,
    is_halving: bool,
) -> bool:
    """Train the trials of a group, and note their scores.

    Returns:
        False where a signal stopped it.
    """
    settings = {number: settings_of(space, study.params(number)) for number in group}
    alive = list(settings)
    for number in alive:
        print(f"trial {number}: {tell_settings(settings[number])}")
    rounds = int(math.log2(len(alive))) - 1 if is_halving else 0
    folder = output / "together" / str(group[0])
    for rung in itertools.count():
        workdir = folder / f"rung{rung}"
        config = config.copy_and_resolve_references()
        config.training.vary = vary_text([settings[number] for number in alive])
        if not _was_halved(workdir):
            for number in alive:
                study.note(number, workdir=str(workdir.relative_to(output)))
            watch = _Halving(study, alive, workdir, config.training.seeds, rounds - rung)
            stop = StopSignal()
            with counting_resumes(study, alive, workdir):
                finished = train_run(config, workdir, watch=watch, stop=stop)
            if finished:
                _finish(study, alive, workdir, config.training.seeds)
                return True
            if stop.requested or not _was_halved(workdir):
                return False  # a round that was halved is gone on with from its file
        halved = json.loads((workdir / HALVED_FILE).read_text(encoding="utf-8"))
        kept = halved["kept"]
        for number in study.running([n for n in alive if n not in kept]):
            study.prune(number)
            print(f"trial {number}: pruned at step {halved['step']}")
        places = [place for place, number in enumerate(alive) if number in kept]
        alive = [alive[place] for place in places]
        config.training.vary = vary_text([settings[number] for number in alive])
        _start_next(workdir, folder / f"rung{rung + 1}", config, places)
    raise AssertionError("count has no end")


class _Halving:
    """Watches a round, and ends it when the worse half is to stop.

    Args:
        study: of the trials.
        numbers: of the trials, in the order of the models.
        workdir: of the round.
        seeds: models of each trial.
        rounds: in which the trials are still to be halved.
    """

    def __init__(
        self, study: Study, numbers: Sequence[int], workdir: Path, seeds: int, rounds: int
    ):
        self._study, self._numbers, self._workdir = study, numbers, workdir
        self._seeds, self._rounds = seeds, rounds

    def __call__(self, step: int, scores: Sequence[float | None]) -> bool:
        """Report the scores; whether the round ends."""
        by_trial = np.array(scores, object).reshape(len(self._numbers), self._seeds)
        training = read_run(self._workdir)["config"]["training"]
        means = []
        for number, own in zip(self._numbers, by_trial.tolist(), strict=True):
            tell_score(self._study, number, step, own, training)
            known = [score for score in own if score is not None]
            means.append(float(np.mean(known)) if known else -math.inf)
        if self._rounds <= 0 or len(self._numbers) < 4:
            return False
        steps = training["steps"]
        if step < steps / 2**self._rounds or step >= steps:
            return False
        order = sorted(range(len(means)), key=lambda place: -means[place])  # of equals the first
        kept = [self._numbers[place] for place in order[: len(means) // 2]]
        write_json(self._workdir / HALVED_FILE, {"step": step, "kept": kept})
        return True


def _was_halved(workdir: Path) -> bool:
    """Whether the round came to its end, and saved it."""
    if not (workdir / HALVED_FILE).is_file():
        return False
    halved = json.loads((workdir / HALVED_FILE).read_text(encoding="utf-8"))
    return max(saved_steps(workdir), default=0) >= halved["step"]


def _finish(study: Study, numbers: Sequence[int], workdir: Path, seeds: int) -> None:
    """Note the scores of the trials that came to the end."""
    summary, members = read_summary(workdir), read_members(read_run(workdir))
    found: Mapping[str, Any] = {own["name"]: own for own in summary["members"]}
    for place, number in enumerate(numbers):
        own = members[place * seeds : (place + 1) * seeds]
        entries = [found[member.name] for member in own if member.name in found]
        if not study.running([number]):
            continue  # its worker was lost while it noted these
        study.note(number, model=own[0].name)
        try:
            finish_trial(study, number, entries, summary["main_score"], seeds)
        except UserError as error:
            study.fail(number, str(error))
            print(f"trial {number}: failed: {error}")


def _start_next(before: Path, after: Path, config: ConfigDict, places: Sequence[int]) -> None:
    """A workdir that goes on with some of the trials of another; there at once, or not at all."""
    if after.exists():
        return
    draft = after.with_name(after.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    seeds = config.training.seeds
    models = np.array([place * seeds + i for place in places for i in range(seeds)])
    experiment = load_run(before).experiment
    lifted = experiment.lift()
    with Checkpoints(before / "checkpoints") as checkpoints:
        state = checkpoints.restore(lifted.template(experiment.abstract_state))
    state = lifted.global_state(state)
    fewer = jax.tree.map(lambda x: x[models], state.replace(step=None)).replace(step=state.step)
    with Checkpoints(draft / "checkpoints") as checkpoints:
        checkpoints.save(fewer, wait=True)
    shutil.copy(before / SPLIT_FILE, draft / SPLIT_FILE)
    run = read_run(before)
    run["config"]["training"]["vary"] = config.training.vary
    run["members"] = [vars(member) for member in plan_members(config)]
    write_json(draft / CONFIG_FILE, run)
    os.replace(draft, after)
