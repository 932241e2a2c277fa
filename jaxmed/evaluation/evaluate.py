"""The one evaluation: predict the cases of a part, score each, summarise with intervals."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.evaluation.bootstrap import Interval, bootstrap_weights, intervals
from jaxmed.inference.predictor import check_finite
from jaxmed.metrics import count_cases, count_groups
from jaxmed.types import Example, Row, Source, Task, Transform


def predict_cases(
    predictor: Callable[[Iterable[Example]], Iterator[tuple[Example, Any]]],
    task: Task,
    source: Source,
    rows: Sequence[int],
    *,
    prepare: Transform,
    restore: Callable[[Any, Example], Any] | None = None,
) -> Iterator[tuple[int, Example, Any]]:
    """Yield the row, the example as the source returns it, and the prediction in its grid.

    The example also has what the task noted of the prediction before (`Task.observe`).

    Args:
        predictor: preprocessed examples -> pairs of example and prediction.
        task: whose predictions they are.
        source: of the cases.
        rows: to predict.
        prepare: preprocessing.
        restore: makes of prediction and preprocessed example what is yielded; else the task does.

    Raises:
        NotFiniteError: the network gives NaN.
    """
    restore = restore or task.restore
    pending: dict[int, Example] = {}

    def prepared() -> Iterator[Example]:
        for row in rows:
            pending[int(row)] = example = source[int(row)]
            yield prepare(example)

    for example, prediction in predictor(prepared()):
        row = int(example["index"])
        check_finite(prediction, source.ids[row])
        known = {**pending.pop(row), **task.observe(prediction, example)}
        yield row, known, restore(prediction, example)


def score_cases(cases: Iterable[tuple[int, Example, Any]], task: Task) -> dict[int, Row]:
    """Scores of each case, by row; a row that comes twice counts once."""
    return {row: task.score(prediction, example) for row, example, prediction in cases}


def summarize_cases(
    task: Task,
    scores: Mapping[int, Row],
    *,
    patients: Sequence[str] | None = None,
    folds: Sequence[Collection[int]] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Scores of the set with 95 % bootstrap intervals, over patients where they are known.

    Intervals tell what other cases would change, not what other training would.

    Args:
        task: how cases are summarised.
        scores: of `score_cases`.
        patients: one a row of the source, or None.
        folds: rows that different models predicted. Scores are then means over the folds that
            have them (LeDell et al. 2015, Electron. J. Stat. 9): how sure one model is of a case
            cannot be ranked against how sure another is of the next one.
        resamples: of the bootstrap; 0 gives values without intervals.
        seed: of the resampling.
    """
    groups = None if patients is None else [patients[row] for row in scores]
    weights = bootstrap_weights(len(scores), groups=groups, resamples=resamples, seed=seed)
    samples = sample_scores(task, scores, weights=weights, folds=folds)
    own = list(scores) if groups is None else groups
    rows = list(scores.values())
    return intervals(
        samples,
        cases=len(scores),
        counts=count_cases(rows),
        groups=len(set(own)),
        group_counts=count_groups(rows, own),
    )


def sample_scores(
    task: Task,
    scores: Mapping[int, Row],
    *,
    weights: np.ndarray,
    folds: Sequence[Collection[int]] = (),
) -> dict[str, np.ndarray]:
    """Scores of the set under each row of `weights` (resamples, cases); see `summarize_cases`."""
    rows = list(scores.values())
    if len(folds) < 2:
        return task.summarize(rows, weights=weights)
    return _mean_over(folds, task, list(scores), rows, weights)


def _mean_over(
    folds: Sequence[Collection[int]],
    task: Task,
    numbers: Sequence[int],
    rows: Sequence[Row],
    weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """Each score's mean over the folds in which it is defined, under the same resamples."""
    each = []
    for fold in folds:
        own = [place for place, number in enumerate(numbers) if number in fold]
        if own:
            each.append(task.summarize([rows[i] for i in own], weights=weights[:, own]))
    samples = {}
    for name in dict.fromkeys(name for found in each for name in found):
        stack = np.stack([found[name] for found in each if name in found])
        known = np.isfinite(stack)
        count = known.sum(0)
        total = np.where(known, stack, 0).sum(0)
        samples[name] = np.where(count, total / np.maximum(count, 1), np.nan)
    return samples


def plain_scores(task: Task, scores: Mapping[int, Row]) -> dict[str, float | None]:
    """The summarised scores without intervals, None where undefined; for training's log."""
    weights = np.ones((1, len(scores)), np.float32)
    samples = task.summarize(list(scores.values()), weights=weights)
    return {name: float(v[0]) if np.isfinite(v[0]) else None for name, v in samples.items()}


def write_cases(path: Path, ids: Sequence[str], rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Write one CSV line a case: its id and its scores, empty where undefined."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *names])
        for index, row in rows.items():
            writer.writerow([ids[index], *(_cell(row.get(name)) for name in names)])


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)
