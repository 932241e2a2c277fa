"""Search for the best settings: trials that are normal runs, in one study that workers share."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmed.build import datasets
from jaxmed.build.checks import check_numbers
from jaxmed.build.config import base_config, differences, flatten, update, write_json
from jaxmed.build.experiment import Experiment
from jaxmed.build.locks import Lock
from jaxmed.build.prepared import check_place
from jaxmed.build.resolve import resolve
from jaxmed.build.runs import cut_split
from jaxmed.build.study import MOST_COMBINATIONS, PRUNERS, SAMPLERS, STUDY_FILE, StorageFault, Study
from jaxmed.build.sweep_output import write_sweep
from jaxmed.build.sweep_space import Dimension, is_of_numbers, mixed_switch, read_space
from jaxmed.build.sweep_together import train_together
from jaxmed.build.sweep_trials import failure, train_one
from jaxmed.build.workdir import is_free, make_folder
from jaxmed.data.sources.findings import DataError
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.training.faults import disk_fault
from jaxmed.types import Source, UserError

SWEEP_FILE = "sweep.json"
TRIED_CASES = 20
"""Cases that the plan sees, to find out whether a value of the space can be one."""
MOST_FAILURES = 5
"""Failed trials, with none that went well, after which the fault is not in their settings."""


def sweep_run(
    config: ConfigDict,
    space_file: str | Path,
    output: str | Path,
    *,
    trials: int,
    sampler: str = "tpe",
    pruner: str = "asha",
    seeds: int = 1,
    together: int = 1,
) -> bool:
    """Work on a sweep until it has so many trials, then write its table, page and winner.

    The same call goes on where a sweep stopped, also with the trials of workers that were killed;
    several processes may work on one `output`.

    Args:
        config: as given on the command line.
        space_file: see `jaxmed.build.sweep_space.read_space`.
        output: folder for everything.
        trials: of the whole sweep.
        sampler: tpe, random or grid.
        pruner: asha, median or none; of trials trained together the worse half stops, or none.
            asha first compares trials at the first evaluation (`training.evaluate_every`) of the
            trial that is evaluated first, at the same step for all: where the plan chooses the
            length, one with a longer training is compared at a smaller share of it.
        seeds: models of each trial, which differ in their random numbers; the mean counts.
        together: trials trained as one program.

    Returns:
        Whether all of its trials are over; False where a signal stopped it.

    Raises:
        UserError: for mistakes in the space or the config, or where nothing but failures comes.
    """
    output = Path(output)
    space = _check(config, space_file, sampler, pruner, together)
    source = datasets.make_source(config)  # which says what is wrong with the data
    if not (output / SWEEP_FILE).is_file():  # one that goes on has the space that was tried then
        _try_words(config, space, source, where=f"--space={space_file}")
    data = digest(source)
    make_folder(output)
    config = config.copy_and_resolve_references()
    config.training.seeds = seeds
    _write_or_compare(output, config, space, sampler, data)
    if together == 1 and is_of_numbers(space) and trials > 2:
        print("note: these settings could be trained as one program: --together=8, for example")
    halving = pruner != "none"
    study = Study(output, space, sampler=sampler, pruner=pruner, seed=config.seed)
    with study, _telling_storage_faults(output):
        while numbers := study.claim(trials=trials, at_once=together):
            try:
                _refuse_other_data(config, data)
                if not _work(study, numbers, config, space, output, data, is_halving=halving):
                    print("stopped; the same command goes on from there")
                    return False
            finally:
                study.release(study.group(numbers[0])[0])
                jax.clear_caches()  # programs of other shapes, which no later trial runs
            _refuse_failures(study)
        with _alone(output):
            write_sweep(output, study, config, space)
        left = study.untried()
        if left == []:
            print("note: all combinations of the space were tried")
        elif left and sampler == "grid":
            more = trials + len(left)
            print(f"note: {len(left)} combinations of the grid were not tried; --trials={more}")
    return True


def _check(
    config: ConfigDict,
    space_file: str | Path,
    sampler: str,
    pruner: str,
    together: int,
) -> tuple[Dimension, ...]:
    """The space, once nothing is wrong that could be known before the first trial."""
    for name, given, known in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS)):
        if given not in known:
            raise UserError(f"--{name}={given}: expected one of {', '.join(known)}")
    if jax.process_count() > 1:
        raise UserError(
            "a sweep's trials train in one process each; start several sweep.py on one --output"
        )
    check_numbers(config)
    check_place(config)
    if config.training.folds or config.training.vary or config.training.seeds > 1:
        raise UserError("a sweep takes no training.folds, seeds or vary; see --seeds, --together")
    space = read_space(space_file, config)
    if sampler == "grid":
        _check_grid(space)
    if together > 1 and not is_of_numbers(space):
        raise UserError(
            f"--together={together}: models of one program may not differ in all keys of "
            f"{space_file}; leave it out, or keep to numbers that `training.vary` takes"
        )
    if together > 1 and (key := mixed_switch(space)):
        raise UserError(
            f"--together={together}: {key} cannot be on in some models of one program and off in "
            f"others; take 0 out of its values in {space_file}, or leave --together out"
        )
    return space


def _try_words(config: ConfigDict, space: Sequence[Dimension], source: Source, where: str) -> None:
    """Build an experiment of each value that is no number, as its parts know which words there are.

    A value that makes none by itself may beside one of another key, as lists of one length do.

    Raises:
        UserError: naming the value that makes none.
    """
    choices = [(dimension.key, value) for dimension in space for value in dimension.choices]
    for key, value in choices:
        if isinstance(value, (int, float)):
            continue
        errors = []
        for beside in ({}, *({other: v} for other, v in choices if other != key)):
            try:
                _build({**beside, key: value}, config, source, where)
                break
            except UserError as error:
                errors.append(error)
        else:
            raise UserError(f"{where}: {key}={value!r}: {errors[0]}") from errors[0]


def _build(settings: Mapping[str, Any], config: ConfigDict, source: Source, where: str) -> None:
    """Everything but the training of an experiment, of a few cases."""
    tried = config.copy_and_resolve_references()
    # Nothing is compiled to plan these.
    update(tried, {"data.batch_size": 1, "training.steps": 1, **settings}, where=where)
    rows = range(min(len(source.ids), TRIED_CASES))
    resolved, _, fingerprint = resolve(tried, source, rows)
    made = Experiment(resolved, source.info, fingerprint["class_counts"])
    made.prepare(source[0])
    jax.eval_shape(made.init_state, jax.random.key(0))


def _check_grid(space: Sequence[Dimension]) -> None:
    """Refuse a space whose combinations cannot be listed."""
    for dimension in space:
        if dimension.count == math.inf:
            raise UserError(
                f"--sampler=grid: {dimension.key} is a range without a step; give its values as a "
                "list"
            )
    count = math.prod(int(dimension.count) for dimension in space)
    if count > MOST_COMBINATIONS:
        raise UserError(
            f"--sampler=grid: the space has {count:,} combinations, more than "
            f"{MOST_COMBINATIONS:,}; use --sampler=random, or fewer values"
        )


def _write_or_compare(
    output: Path, config: ConfigDict, space: Sequence[Dimension], sampler: str, data: str
) -> None:
    """Write what the sweep is of, or refuse to go on with another."""
    described = {dimension.key: dimension.told() for dimension in space}
    now = {"config": config.to_dict(), "space": described, "sampler": sampler, "data": data}
    path = output / SWEEP_FILE
    try:
        with _alone(output):
            if not path.is_file():
                write_json(path, now)
                return
            before = json.loads(path.read_text(encoding="utf-8"))
        # Keys that were not there yet when the sweep began have their defaults.
        old = flatten(base_config(config.task, config.data.layout)) | _flat(before)
        new = _flat(now)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or sweep anew") from error
    for key in new:
        if is_free(key):
            old[key] = new[key]
    changed = differences(old, new)
    if changed:
        raise UserError(
            f"{output}: holds another sweep ({'; '.join(changed)}); use another --output, or go on "
            "with what it had"
        )


@contextlib.contextmanager
def _telling_storage_faults(output: Path) -> Iterator[None]:
    try:
        yield
    except StorageFault as error:
        if disk_fault(error):  # told by the command line
            raise
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"{output / STUDY_FILE}: cannot be read or written ({said}). No trial is to blame: the "
            "same command goes on"
        ) from error


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """While one worker reads or writes the files of all, others wait."""
    lock = Lock(output / ".lock")
    lock.take(wait=True)
    try:
        yield
    finally:
        lock.free()


def _flat(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same, a key each."""
    space = {f"--space {key}": told for key, told in sweep["space"].items()}
    return {
        **flatten(sweep["config"]),
        **space,
        "--sampler": sweep["sampler"],
        "data": sweep["data"],
    }


def _work(
    study: Study,
    numbers: Sequence[int],
    config: ConfigDict,
    space: Sequence[Dimension],
    output: Path,
    data: str,
    *,
    is_halving: bool,
) -> bool:
    """Train what was claimed; False where a signal stopped it. What fails is noted and left.

    Raises:
        UserError: where the data are broken by now; the trial then goes on once they are mended.
    """
    group = study.group(numbers[0])
    try:
        if len(group) > 1:
            return train_together(study, group, config, space, output, is_halving=is_halving)
        return train_one(study, numbers[0], config, space, output)
    except Exception as error:
        if isinstance(error, (OSError, StorageFault, DataError)) or disk_fault(error):
            raise  # no fault of the trial, which goes on once that is mended
        if isinstance(error, UserError):
            _refuse_other_data(config, data, look_through=True)
        message = failure(error)
        for number in study.running(group):
            study.fail(number, message or f"{type(error).__name__}: {error}")
            print(f"trial {number}: failed: {message or error}")
        if message is None:
            raise
        return True


def _refuse_other_data(config: ConfigDict, data: str, *, look_through: bool = False) -> None:
    """Stop where the data are no longer what they were, which is no fault of a trial's settings.

    Args:
        config: of the sweep.
        data: their digest at the beginning.
        look_through: whether to read all cases, as the beginning of each trial does.

    Raises:
        UserError: then; what was claimed stays to be gone on with.
    """
    try:
        source = datasets.make_source(config)
        if digest(source) != data:
            raise UserError(f"data.path={config.data.path}: the data have changed")
        if look_through:
            cut_split(config, source)
    except UserError as error:
        raise UserError(
            f"{error}\nNo trial is to blame for the data: once they are as they were, the same "
            "command goes on"
        ) from error


def _refuse_failures(study: Study) -> None:
    """Stop where nothing but failures comes."""
    trials = study.trials()
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(failed) >= MOST_FAILURES and not any(t.score is not None for t in trials):
        raise UserError(
            f"all of the first {len(failed)} trials failed, the last with: {failed[-1].message}"
        )
