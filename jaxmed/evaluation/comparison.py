"""Runs beside each other: paired differences on the cases that they share, with a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxmed.evaluation.bootstrap import bootstrap_weights, holm, intervals, two_sided_p
from jaxmed.evaluation.case_rows import ScoredCases
from jaxmed.evaluation.evaluate import sample_scores
from jaxmed.metrics import count_cases
from jaxmed.types import Row, Task, UserError, count_of

TIE = 1e-6
"""Cases whose scores differ by less are a tie."""
FEWEST = 3
"""Shared cases, below which nothing can be compared."""


def compare_runs(
    runs: Mapping[str, ScoredCases],
    task: Task,
    *,
    against: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of several runs on the cases that all share, and differences to one of them.

    All runs are scored under the same resamples of cases (of patients where they are known), so
    that what makes a case hard for all cancels in the difference. The test is that of the
    difference's interval (`bootstrap.two_sided_p`); `p_holm` is corrected for the number of runs,
    score by score. It tells whether other cases would change the order of these trained models,
    not whether other training would: that takes several seeds.

    Args:
        runs: scored cases by name, two or more.
        task: how cases are summarised.
        against: the run that others are compared with; the first by default, or "best" for that
            with the best main score.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `cases` and `groups` shared, `against`, and `runs`: of each `metrics` and, but for that one,
        `differences` (value, low, high, p, p_holm by score) and `win`, `tie`, `lose` in cases.

    Raises:
        UserError: where runs share too few cases, or do not agree on their truth.
    """
    shared = [name for name in next(iter(runs.values())).ids if _in_all(name, runs)]
    if len(shared) < FEWEST:
        counts = ", ".join(f"{name} {len(run.ids)}" for name, run in runs.items())
        raise UserError(
            f"compare: the runs share {count_of(len(shared), 'case')} (they have {counts}); "
            "evaluate them on the same data"
        )
    taken = {name: run.take(shared) for name, run in runs.items()}
    _check_same_truth(taken, shared)
    groups = next(iter(taken.values())).groups
    weights = bootstrap_weights(len(shared), groups=groups, resamples=resamples, seed=seed)
    samples = {
        name: sample_scores(task, run.by_place, weights=weights, folds=run.fold_places)
        for name, run in taken.items()
    }
    drawn = len(set(groups))
    reference = _find_reference(against, samples, task)
    compared: dict[str, Any] = {}
    for name, run in taken.items():
        compared[name] = {
            "metrics": intervals(
                samples[name], cases=len(shared), counts=count_cases(run.rows), groups=drawn
            )
        }
        if name != reference:
            compared[name]["differences"] = _differences(
                samples[name], samples[reference], cases=len(shared), groups=drawn
            )
            compared[name] |= _count_wins(task, run.rows, taken[reference].rows)
    _correct(compared)
    return {"cases": len(shared), "groups": drawn, "against": reference, "runs": compared}


def _in_all(name: str, runs: Mapping[str, ScoredCases]) -> bool:
    return all(name in run.known for run in runs.values())


def _find_reference(
    against: str | None, samples: Mapping[str, Mapping[str, np.ndarray]], task: Task
) -> str:
    if against == "best":
        values = {name: float(found[task.main_score][0]) for name, found in samples.items()}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        return max(known, key=lambda name: known[name]) if known else next(iter(samples))
    return against or next(iter(samples))


def _differences(
    own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], *, cases: int, groups: int
) -> dict[str, Any]:
    """Interval and p-value of the difference of each score that both runs have."""
    drawn = {name: values - other[name] for name, values in own.items() if name in other}
    table: dict[str, Any] = intervals(drawn, cases=cases, groups=groups)
    for name, entry in table.items():
        entry["p"] = two_sided_p(drawn[name], groups=groups)
    return table


def _correct(compared: Mapping[str, Any]) -> None:
    """Add Holm's p-values, over the runs that are compared with the same one."""
    tables = [found["differences"] for found in compared.values() if "differences" in found]
    for name in dict.fromkeys(name for table in tables for name in table):
        having = [table[name] for table in tables if name in table]
        for entry, corrected in zip(having, holm([e["p"] for e in having]), strict=True):
            entry["p_holm"] = corrected


def _count_wins(task: Task, own: Sequence[Row], other: Sequence[Row]) -> dict[str, int]:
    """In how many cases a run is better, as good, or worse, by the score that ranks cases."""
    score = [
        [float(task.describe(row).get("score", np.nan)) for row in rows] for rows in (own, other)
    ]
    difference = np.array(score[0]) - np.array(score[1])
    return {
        "win": int((difference > TIE).sum()),
        "tie": int((np.abs(difference) <= TIE).sum()),
        "lose": int((difference < -TIE).sum()),
    }


def _check_same_truth(runs: Mapping[str, ScoredCases], ids: Sequence[str]) -> None:
    """Refuse runs whose shared cases are not the same cases."""
    (first, reference), *others = runs.items()
    for name, run in others:
        for place, (a, b) in enumerate(zip(reference.rows, run.rows, strict=True)):
            for key in a:
                is_truth = key in ("label", "truths") or key.startswith("true_size")
                # Labels of detections are predicted, beside the true numbers of objects.
                if not is_truth or (key == "label" and "truths" in a):
                    continue
                if not np.allclose(a[key], b.get(key, np.nan), rtol=1e-3):
                    raise UserError(
                        f"compare: {first} and {name} have another truth for case {ids[place]} "
                        f"({key} {a[key]} and {b.get(key)}); evaluate them on the same data"
                    )


def draw_forest(path: Path, compared: Mapping[str, Any], score: str) -> None:
    """Draw one score of all runs with its interval, and beside it the differences, as PNG."""
    names = list(compared["runs"])
    figure = Figure(figsize=(9, 1.4 + 0.35 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(names):
        found = compared["runs"][name]
        _draw_interval(left, place, found["metrics"].get(score))
        _draw_interval(right, place, found.get("differences", {}).get(score))
    left.set_yticks(range(len(names)), [name[-30:].replace("$", r"\$") for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(title=score, xlabel="value, 95 % interval")
    right.axvline(0, color="gray", linestyle=":", linewidth=1)
    against = compared["against"][-30:].replace("$", r"\$")
    right.set(title=f"less that of {against}", xlabel="difference, 95 % interval")
    figure.savefig(path, dpi=100)


def _draw_interval(axis: Any, place: int, entry: Mapping[str, Any] | None) -> None:
    if entry is None or entry["value"] is None:
        return
    axis.plot(entry["value"], place, "s", color="C0")
    if entry["low"] is not None:
        axis.plot([entry["low"], entry["high"]], [place, place], color="C0")
