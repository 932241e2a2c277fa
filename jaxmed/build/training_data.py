"""What training learns from: streams of batches, or cases that the devices hold."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmed.build import preparation
from jaxmed.build.config import choose
from jaxmed.build.experiment import Experiment
from jaxmed.build.members import rows_of
from jaxmed.data.loader import Batches, Stream, joint_batches, training_batches
from jaxmed.types import Example, UserError


def hold_cases(
    experiment: Experiment, read: Callable[[int], Example], rows: Sequence[int]
) -> preparation.HeldExamples | None:
    """The training cases for the devices to hold; None where they are not to.

    Args:
        experiment: whose devices they are.
        read: row -> prepared case.
        rows: of the training part.

    Raises:
        UserError: where they must be held and cannot.
    """
    how = experiment.config.data.on_device
    choose(dict.fromkeys(("auto", "always", "never")), how, key="data.on_device")
    statistics = experiment.mesh.local_devices[0].memory_stats() or {}
    most = statistics.get("bytes_limit", 0) // 4
    if how == "never" or (how == "auto" and jax.default_backend() == "cpu"):
        return None
    if how == "always":
        most = sys.maxsize
    # Statistics of folds differ, and with them what lies beyond a small image.
    views = {preparation.make_training_view(config) for config in experiment.member_configs}
    held = None
    if len(views) <= 1:
        held = preparation.hold_examples(read, rows, experiment.view, max_bytes=most)
    if held is None and how == "always":
        raise UserError(
            "data.on_device is 'always', but the cases differ in type or size, or the folds "
            "in their statistics; use auto"
        )
    return held


def make_batches(
    experiment: Experiment,
    source: Any,
    split: Mapping[str, Sequence[int]],
    *,
    start_step: int,
    held: Mapping[int, Example] | None = None,
) -> Batches:
    """The batches of training, from a step on; of models trained together, of each stream.

    Args:
        experiment: whose batches they are.
        source: with prepared cases.
        split: rows of each part.
        start_step: the first one.
        held: `HeldExamples.cases` where the devices hold the rest of them: batches then say what to
            cut.
    """
    places = {row: place for place, row in enumerate(held or ())}
    source = held or source

    def view_of(config: ConfigDict) -> Any:
        view = preparation.make_training_view(config)
        return preparation.ChoiceOfView(view, places) if places else view

    data = experiment.config.data
    given = {
        "batch_size": data.batch_size,
        "start_step": start_step,
        "workers": data.workers,
    }
    if not experiment.members:
        return training_batches(
            source,
            split["train"],
            seed=experiment.config.seed,
            prepare=view_of(experiment.config),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **given,
        )
    streams = [
        Stream(
            rows_of(split, "train", experiment.members[place].fold),
            experiment.members[place].seed,
            view_of(experiment.member_configs[place]),
        )
        for place in experiment.streams[0]
    ]
    return joint_batches(source, streams, **given)
