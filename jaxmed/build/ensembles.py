"""Which of the models that were trained together predict which cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmed.build.members import rows_of
from jaxmed.build.trained import TrainedRun
from jaxmed.evaluation.evaluate import predict_cases
from jaxmed.training.processes import share_of
from jaxmed.types import Example, Source

Group = tuple[Sequence[int], Sequence[int]]
"""Rows, and the places of the models that predict them (none where a single one was trained).

Of folds there is a group each; a fold without a model is in none.
"""


def make_groups(
    run: TrainedRun,
    rows: Sequence[int],
    split: Mapping[str, Sequence[int]] | None,
    *,
    place: int | None = None,
) -> list[Group]:
    """Which models predict which rows.

    Args:
        run: the run.
        rows: to predict.
        split: where the rows are its validation part, so that no model predicts what it was
            trained on.
        place: of one model of several; None takes those that the run chose.
    """
    chosen = run.chosen if place is None else (place,)
    members = run.experiment.members
    if split is None or members[chosen[0]].fold is None:
        return [(rows, chosen)]
    groups: list[Group] = []
    for fold in sorted({members[i].fold or 0 for i in chosen}):
        wanted = set(rows)
        own = [row for row in rows_of(split, "val", fold) if row in wanted]
        groups.append((own, [i for i in chosen if members[i].fold == fold]))
    return groups


def predict_groups(
    run: TrainedRun, source: Source, groups: Sequence[Group]
) -> Iterator[tuple[int, Example, Any]]:
    """This process's share of the rows of each group, predicted by its models."""
    task, prepare = run.experiment.task, run.experiment.prepare
    for rows, members in groups:
        predict = run.predict_with(members)
        yield from predict_cases(predict, task, source, share_of(rows), prepare=prepare)
