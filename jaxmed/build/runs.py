"""What the scripts do: train, evaluate and predict in a workdir."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import datasets
from jaxmed.build.checks import INSTEAD, check_numbers, useless_keys
from jaxmed.build.config import (
    base_config,
    flatten,
    read_run,
    write_json,
)
from jaxmed.build.dry_run import print_dry_run
from jaxmed.build.experiment import Experiment
from jaxmed.build.first_batch import draw_first_batch
from jaxmed.build.members import plan_members, read_members, rows_of
from jaxmed.build.pieces import check_words
from jaxmed.build.preparation import PrepareForTraining
from jaxmed.build.prepared import check_place, prepared_cases
from jaxmed.build.resolve import (
    cut_folds,
    fold_gaps,
    resolve,
    train_count,
    with_own_statistics,
)
from jaxmed.build.training_data import hold_cases, make_batches
from jaxmed.build.validation import Validation
from jaxmed.build.workdir import (
    SPLIT_FILE,
    check_could_be_made,
    check_same_kind,
    describe_run,
    has_checkpoints,
    hold_workdir,
    make_folder,
    read_split,
    read_split_ids,
    write_or_compare,
)
from jaxmed.data.cache import Cached
from jaxmed.data.sources.findings import DataError
from jaxmed.data.splits import split_cases
from jaxmed.training.checkpoints import (
    Checkpoints,
    merge_params,
    restore_members,
    restore_variables,
)
from jaxmed.training.logging import Logger
from jaxmed.training.loop import train
from jaxmed.training.processes import (
    any_of,
    is_first,
    wait_for_all,
)
from jaxmed.training.progress import TrainingDiverged
from jaxmed.training.sharding import Lifted
from jaxmed.training.signals import StopSignal
from jaxmed.training.speed import InBackground
from jaxmed.training.state import TrainState, best_numbers, evaluated_step
from jaxmed.types import Example, Source, UserError


def train_run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    dry_run: bool = False,
    watch: Callable[[int, Any], bool] | None = None,
    stop: StopSignal | None = None,
) -> bool:
    """Train in `workdir`, or go on where a run in it stopped; then evaluate the best checkpoint.

    Args:
        config: as given on the command line.
        workdir: made where missing.
        dry_run: only print the config, shapes, parameters and the memory of a step.
        watch: told of each evaluation, see `jaxmed.training.loop.train`; may end it early.
        stop: listens while it trains; its `requested` says afterwards whether a signal stopped it,
            also where `watch` ended it at the same time.

    Returns:
        Whether it came to its end; False where a signal or `watch` stopped it.

    Raises:
        UserError: for every mistake in the config, the data or the workdir.
    """
    workdir = Path(workdir)
    check_numbers(config)
    check_place(config)
    if dry_run:
        check_could_be_made(workdir)
    elif is_first():
        make_folder(workdir)
        with hold_workdir(workdir):
            return _train_in(workdir, config, dry_run=False, watch=watch, stop=stop)
    return _train_in(workdir, config, dry_run=dry_run, watch=watch, stop=stop)


def _train_in(
    workdir: Path,
    config: ConfigDict,
    *,
    dry_run: bool,
    watch: Callable[[int, Any], bool] | None,
    stop: StopSignal | None,
) -> bool:
    """The same in a folder that is there, and that nobody else trains in."""
    members = plan_members(config)
    if members and jax.process_count() > 1:
        raise UserError(
            "training.folds, seeds and vary train in one process, on all its devices; start one "
            "process, or train the models apart"
        )
    wait_for_all("workdir: made")
    # What an attempt left that never came to a checkpoint binds nobody.
    earlier = read_run(workdir) if not dry_run and has_checkpoints(workdir) else None
    if config.model.init and earlier is None:  # a run that goes on has its weights already
        _check_init(config.model.init)
    wait_for_all("workdir: read")  # before the first of several processes writes to it
    if earlier:
        check_same_kind(workdir, earlier, config)
    check_words(config)
    try:
        source = datasets.make_source(config)
    except DataError as error:
        raise datasets.look_further(config, error) from error
    for note in source.notes:
        print(f"data: {note}")
    notes = list(source.notes)
    if earlier:
        split = read_split(workdir, source)
    else:
        split, found = cut_split(config, source)
        notes += found
    by = "image" if source.patients is None else "patient"
    sizes = ", ".join(f"{part} {len(rows)}" for part, rows in split.items())
    how = f"folds cut by {by}" if config.training.folds else f"what was not given, cut by {by}"
    if not config.training.folds and split.keys() <= source.parts.keys():
        how = "as given"
    print(f"split: {sizes} ({how})")
    for key in sorted(set(useless_keys(config)) & _changed_keys(config)):
        instead = f" (it has {INSTEAD[key]})" if key in INSTEAD else ""
        print(f"note: {key} is set, but this task, layout or model has no use for it{instead}")
    rows = rows_of(split, "train")
    config, settings, fingerprint = resolve(
        config, source, rows, earlier=flatten(earlier["config"]) if earlier else None
    )
    if not earlier:
        print_plan(settings)
    if earlier:
        members = read_members(earlier)
    else:
        members = with_own_statistics(members, config, source, split, settings)
    experiment = Experiment(config, source.info, fingerprint["class_counts"], members)
    if dry_run:
        print_dry_run(experiment, fingerprint, source[rows[0]])
        return True
    run = describe_run(config, source, split, settings, fingerprint, notes, members)
    write_or_compare(workdir, run)
    if is_first():
        ids = {part: [source.ids[i] for i in rows] for part, rows in split.items()}
        write_json(workdir / SPLIT_FILE, ids)
    try:
        finished = _train(experiment, source, split, workdir, watch, stop or StopSignal())
    except TrainingDiverged as error:
        if not (members and has_checkpoints(workdir)):
            raise
        if not (restore_members(workdir / "checkpoints")["step"] > 0).any():
            raise
        print(f"{error}; what the models were at their best is evaluated")
        finished = True
    if finished:
        from jaxmed.build.evaluations import evaluate_run  # the report's libraries are slow

        evaluate_run(workdir, part="val", source=source)
    return finished


def _check_init(init: str) -> None:
    """Refuse what holds no weights to start from."""
    if not has_checkpoints(Path(init)):
        raise UserError(f"model.init={init}: no run with a checkpoint; check the path")
    if read_run(Path(init)).get("members"):
        raise UserError(
            f"model.init={init}: holds models trained together; give the run of a single one"
        )


def cut_split(config: ConfigDict, source: Source) -> tuple[dict[str, list[int]], list[str]]:
    """The split of a fresh run, all cases looked at, and what there is to say of it."""
    whole = _make_split(config, source)
    split, notes = datasets.look_through_data(config, source, whole)
    datasets.check_classes_left(config, source, whole, split)
    if config.training.folds:
        split = cut_folds(config, source, split)
        gaps = fold_gaps(source, split)
        notes += gaps
        for note in gaps:
            print(f"split: {note}")
    if config.model.init:
        notes += _note_leak(config.model.init, source, split)
    return split, notes


def _note_leak(init: str, source: Source, split: Mapping[str, Sequence[int]]) -> list[str]:
    """Say how many cases of the other parts the run that this one starts from was trained on."""
    trained = set(rows_of(read_split_ids(Path(init)), "train"))
    notes = []
    for part, rows in split.items():
        known = sum(source.ids[row] in trained for row in rows)
        if known and part != "train":
            notes.append(
                f"{known} of {len(rows)} cases of {part} have ids that {init} was trained on, "
                "whose weights are the start: scores come out too good for these"
            )
            print(f"split: {notes[-1]}")
    return notes


def _changed_keys(config: ConfigDict) -> set[str]:
    """Keys whose values are not the defaults."""
    defaults = flatten(base_config(config.task, config.data.layout))
    return {key for key, value in flatten(config).items() if value != defaults.get(key)}


def _make_split(config: ConfigDict, source: Source) -> dict[str, list[int]]:
    split, notes = split_cases(
        source.ids,
        patients=source.patients,
        labels=source.labels,
        parts=source.parts,
        fractions=tuple(config.data.fractions),
        seed=config.seed,
    )
    for note in notes:
        print(f"split: {note}")
    for part in ("train", "val"):
        if not split.get(part):
            raise UserError(
                f"data.path={config.data.path}: has no {part} part to train with; give cases "
                "without a part, or name their parts in a split.csv"
            )
    return split


def _train(
    experiment: Experiment,
    source: Source,
    split: Mapping[str, Sequence[int]],
    workdir: Path,
    watch: Callable[[int, Any], bool] | None,
    stop: StopSignal,
) -> bool:
    """The training itself; whether it came to its end."""
    config, rows = experiment.config, rows_of(split, "train")
    halted = False

    def ends(step: int, score: Any) -> bool:
        nonlocal halted
        halted = watch is not None and watch(step, score) and step < config.training.steps
        return halted

    members = experiment.members
    cache = int(config.data.cache_gb * 2**30) // max(1, config.data.workers)
    prepare = PrepareForTraining(experiment.prepare)
    if config.data.prepared:
        shards = prepared_cases(config.data.prepared, source, experiment.prepare, split)
        prepared, read = Cached(shards, max_bytes=cache), shards.__getitem__
    else:
        prepared = Cached(source, transform=prepare, max_bytes=cache)

        def read(row: int) -> Example:
            return prepare(source[row])

    with Checkpoints(workdir / "checkpoints") as checkpoints, stop:
        held = hold_cases(experiment, read, rows)
        lifted = experiment.lift(None if held is None else held.arrays)
        cases = None if held is None else held.cases
        del held  # whose arrays are on the devices now
        state = _start(experiment, lifted, checkpoints, config.model.init)
        first = int(lifted.global_state(state).step)
        batches = make_batches(experiment, prepared, split, start_step=first, held=cases)

        evaluate = Validation(experiment, lifted, source, split)
        with (
            batches,
            Logger(
                workdir,
                steps=config.training.steps,
                start_step=first,
                evaluated_step=evaluated_step(best_numbers(lifted.global_state(state))),
                quiet=not is_first(),
            ) as logger,
        ):
            if first == 0 and is_first():
                own = rows_of(split, "train", members[0].fold) if members else rows
                draw_first_batch(experiment, source, own, workdir / "batch.png")
            elif 0 < first < config.training.steps:
                logger.say(f"going on from step {first} of {config.training.steps}")
            elif first:
                logger.say(f"already finished at step {first}; only evaluated once more")
            state = train(
                state,
                lifted=lifted,
                batches=batches,
                steps=config.training.steps,
                evaluate=evaluate,
                main_score=experiment.task.main_score,
                checkpoints=checkpoints,
                logger=logger,
                log_every=config.training.log_every,
                evaluate_every=config.training.evaluate_every,
                checkpoint_every=config.training.checkpoint_every,
                early_stopping=config.training.early_stopping,
                steps_per_epoch=train_count(config, len(rows)) / config.data.batch_size,
                step_flops=InBackground(lambda: experiment.step_flops(source[rows[0]])),
                stop=stop,
                members=[member.name for member in members],
                steps_per_call=config.training.steps_per_call or (1 if cases is None else 8),
                watch=ends,
            )
            stop.requested = any_of(stop.requested)  # perhaps since they last agreed
            if stop.requested:
                step = int(lifted.global_state(state).step)
                logger.say(
                    f"stopped and saved at step {step} of {config.training.steps}; the same "
                    "command goes on from there"
                )
        return not (stop.requested or halted)


def _start(
    experiment: Experiment, lifted: Lifted, checkpoints: Checkpoints, init: str
) -> TrainState:
    """The placed state to go on from: restored, or fresh, perhaps with another run's weights."""
    if checkpoints.latest_step() is not None:
        return lifted.place_state(checkpoints.restore(lifted.template(experiment.abstract_state)))
    state = experiment.fresh_state(lifted)
    if not init:
        return state
    fresh = jax.device_get(lifted.whole(lifted.global_state(state).replace(key=None)))
    old, step = restore_variables(Path(init) / "checkpoints")
    if experiment.members:  # all models start from the same weights
        old = jax.tree.map(lambda x: np.stack([x] * len(experiment.members)), old)
    params, report = merge_params(fresh.params, old.pop("params"))
    model_state, state_report = merge_params(fresh.model_state, old)
    if not report["loaded"]:
        raise UserError(f"model.init={init}: none of its weights fit this model; use its model.*")
    fresh_again = [*report["reshaped"], *report["missing"], *state_report["reshaped"]]
    print(
        f"model.init={init}: {len(report['loaded'])} arrays from step {step}; "
        f"fresh: {', '.join(fresh_again) or 'none'}"
    )
    variables = {"params": params, **model_state}
    ema = jax.tree.map(np.copy, variables) if fresh.ema else {}
    return lifted.place_state(
        lifted.global_state(state).replace(params=params, model_state=model_state, ema=ema)
    )


def print_plan(settings: Mapping[str, Any]) -> None:
    """Say what the plan decided."""
    for key, value in settings.items():
        print(f"plan: {key} = {value}")
