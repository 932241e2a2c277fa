"""Scores of parts of the cases, such as one sex or scanner, and how they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.evaluation.bootstrap import bootstrap_weights, intervals
from jaxmed.evaluation.evaluate import sample_scores
from jaxmed.metrics import count_cases, count_groups, fewer_of
from jaxmed.types import Row, Task, UserError

FEWEST = 10
"""Cases of a subgroup, below which it is said to be too small."""
MOST_GROUPS = 20
UNKNOWN = "(unknown)"


def summarize_subgroups(
    task: Task,
    scores: Mapping[int, Row],
    values: Mapping[int, str],
    *,
    column: str,
    patients: Sequence[str] | None = None,
    folds: Sequence[Collection[int]] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The scores of each subgroup, and their difference to those of the largest one.

    Subgroups are of the same resamples of the whole set, in which their sizes vary too, so that
    their differences have intervals even where patients are in several of them.

    Args:
        task: how cases are summarised.
        scores: of `score_cases`.
        values: the subgroup of each row; "" is unknown.
        column: what to call the values in an error.
        patients: one a row of the source, or None.
        folds: see `summarize_cases`.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `reference`, the largest subgroup, and `groups`: of each the number of cases `n`, `few`
        where that is below 10, `one_class` where all cases are of the same class, `metrics`, and
        but for the reference the `differences` to it.

    Raises:
        UserError: where there are more subgroups than anyone could read.
    """
    named = {row: values[row] or UNKNOWN for row in scores}
    sizes = Counter(named.values())
    if len(sizes) > MOST_GROUPS:
        raise UserError(
            f"--subgroups={column}: has {len(sizes)} different values among {len(named)} cases; "
            f"give a column of at most {MOST_GROUPS}, such as bands of ages"
        )
    clusters = {row: row if patients is None else patients[row] for row in scores}
    weights = bootstrap_weights(
        len(scores), groups=list(clusters.values()), resamples=resamples, seed=seed
    )
    samples, drawn, counted = {}, {}, {}
    for name in sizes:
        own = {row: score for row, score in scores.items() if named[row] == name}
        places = [place for place, row in enumerate(scores) if row in own]
        samples[name] = _headlines(
            sample_scores(task, own, weights=weights[:, places], folds=folds)
        )
        drawn[name] = len({clusters[row] for row in own})
        counted[name] = count_groups(list(own.values()), [clusters[row] for row in own])
    reference = max(sizes, key=lambda name: sizes[name])
    groups: dict[str, Any] = {}
    for name in sorted(sizes):
        own_rows = [score for row, score in scores.items() if named[row] == name]
        groups[name] = {
            "n": sizes[name],
            "few": sizes[name] < FEWEST,
            "one_class": _is_one_class(own_rows),
            "metrics": intervals(
                samples[name],
                cases=sizes[name],
                counts=count_cases(own_rows),
                groups=drawn[name],
                group_counts=counted[name],
            ),
        }
        if name != reference:
            differences = {
                score: samples[name][score] - samples[reference][score]
                for score in samples[name]
                if score in samples[reference]
            }
            groups[name]["differences"] = intervals(
                differences,
                cases=sizes[name],
                groups=min(drawn[name], drawn[reference]),
                group_counts=fewer_of(counted[name], counted[reference]),
            )
    return {"reference": reference, "groups": groups}


def _is_one_class(rows: Sequence[Row]) -> bool:
    """Whether cases have one label each, all the same."""
    labels = [np.asarray(row["label"]) for row in rows if "label" in row]
    return len(labels) > 1 and all(x.ndim == 0 and x == labels[0] for x in labels)


def _headlines(samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores of the whole, without those of single classes."""
    return {name: values for name, values in samples.items() if "/" not in name}
