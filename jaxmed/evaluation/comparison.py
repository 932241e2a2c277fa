"""Runs beside each other: paired differences on the cases that they share, with a test."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxmed.evaluation.bootstrap import bootstrap_weights, holm, intervals, two_sided_p
from jaxmed.evaluation.case_rows import ScoredCases
from jaxmed.evaluation.evaluate import sample_scores
from jaxmed.metrics import count_cases, count_groups, fewer_of
from jaxmed.types import Row, Task, UserError, count_of

TIE = 1e-6
"""Cases whose scores differ by less are a tie."""
RANKINGS = ("auroc", "average_precision", "aurc", "froc")
"""Scores that rank cases among each other, beside `ap`, `ap50` and the like."""
FOLDS_DIFFER = (
    "the runs' cases were not predicted by models of the same folds; scores that rank cases among "
    "each other (such as auroc or ap50) are left out, since those of several models are no ranking"
)
FEWEST = 3
"""Shared cases, below which nothing can be compared."""


def compare_runs(
    runs: Mapping[str, ScoredCases],
    task: Task,
    *,
    scorers: Mapping[str, Task] | None = None,
    leave_out: Collection[str] = (),
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

    Patients are those of the runs that know them. All runs are summarised in one way: as means over
    folds where all have the same ones, else over all cases at once. Then scores that rank the cases
    among each other are left out: what another model said of another case is no rank.

    Args:
        runs: scored cases by name, two or more.
        task: how cases are summarised.
        scorers: what ranks the cases of each run, where its settings differ; `task` by default.
        leave_out: scores that the runs cannot be compared by, such as "nsd".
        against: the run that others are compared with; the first by default, or "best" for that
            with the best main score.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `cases` and `groups` shared, `against`, and `runs`: of each `metrics` and, but for that one,
        `differences` (value, low, high, p, p_holm by score) and `win`, `tie`, `lose` in cases;
        `notes` on what is left out.

    Raises:
        UserError: where runs share too few cases, or do not agree on their truth or patients, or no
            score is left.
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
    groups = _join_groups(runs, taken)
    weights = bootstrap_weights(len(shared), groups=groups, resamples=resamples, seed=seed)
    same_folds = len({_partition(run) for run in taken.values()}) == 1
    samples = {
        name: _kept(
            sample_scores(
                task, run.by_place, weights=weights, folds=run.fold_places if same_folds else ()
            ),
            leave_out,
            rankings=same_folds,
        )
        for name, run in taken.items()
    }
    notes = [] if same_folds else [FOLDS_DIFFER]
    if not all(samples.values()):
        raise UserError(f"compare: no score is left to compare by: {FOLDS_DIFFER}")
    drawn, reference = len(set(groups)), _find_reference(against, samples, task)
    counted = {name: count_groups(run.rows, groups) for name, run in taken.items()}
    compared: dict[str, Any] = {}
    for name, run in taken.items():
        compared[name] = {
            "metrics": intervals(
                samples[name],
                cases=len(shared),
                counts=count_cases(run.rows),
                groups=drawn,
                group_counts=counted[name],
            )
        }
        if name != reference:
            compared[name]["differences"] = _differences(
                samples[name],
                samples[reference],
                cases=len(shared),
                groups=drawn,
                group_counts=fewer_of(counted[name], counted[reference]),
            )
            described = [
                _scores_of((scorers or {}).get(n, task), taken[n].rows) for n in (name, reference)
            ]
            compared[name] |= _count_wins(*described)
    _correct(compared)
    return {
        "cases": len(shared),
        "groups": drawn,
        "against": reference,
        "runs": compared,
        "notes": notes,
    }


def _join_groups(
    runs: Mapping[str, ScoredCases], taken: Mapping[str, ScoredCases]
) -> tuple[int, ...]:
    """The patients of the shared cases as the runs know them; UserError where two know otherwise.

    A run in which all cases are groups of their own knows of none.
    """
    known = {n: taken[n] for n, run in runs.items() if len(set(run.groups)) < len(run.groups)}
    first, *others = known or taken
    groups = taken[first].groups
    for name in others if known else ():
        pairs = list(zip(groups, taken[name].groups, strict=True))
        for side in (0, 1):  # a patient of either must be one of the other
            seen: dict[int, int] = {}
            for place, pair in enumerate(pairs):
                before = seen.setdefault(pair[side], place)
                if pairs[before] != pair:
                    ids = taken[name].ids
                    raise UserError(
                        f"compare: {first} and {name} do not agree on whether {ids[before]} and "
                        f"{ids[place]} are of one patient; mend the patients of their data and "
                        "evaluate again"
                    )
    return groups


def _partition(run: ScoredCases) -> frozenset[frozenset[int]]:
    """Which cases were predicted by the same models; nothing where those predicted all."""
    folds = run.fold_places
    return frozenset(frozenset(places) for places in folds) if len(folds) > 1 else frozenset()


def _kept(
    samples: Mapping[str, np.ndarray], leave_out: Collection[str], *, rankings: bool
) -> dict[str, np.ndarray]:
    """The scores that runs can be compared by."""

    def is_kept(name: str) -> bool:
        base = name.split("/")[0]
        ranks = base in RANKINGS or re.fullmatch(r"ap\d*", base) is not None
        return base not in leave_out and (rankings or not ranks)

    return {name: values for name, values in samples.items() if is_kept(name)}


def _in_all(name: str, runs: Mapping[str, ScoredCases]) -> bool:
    return all(name in run.known for run in runs.values())


def _find_reference(
    against: str | None, samples: Mapping[str, Mapping[str, np.ndarray]], task: Task
) -> str:
    if against == "best":
        if any(task.main_score not in found for found in samples.values()):
            raise UserError(
                f"compare: against=best needs {task.main_score}, which cannot be compared: "
                f"{FOLDS_DIFFER}"
            )
        values = {name: float(found[task.main_score][0]) for name, found in samples.items()}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        return max(known, key=lambda name: known[name]) if known else next(iter(samples))
    return against or next(iter(samples))


def _differences(
    own: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    *,
    cases: int,
    groups: int,
    group_counts: Mapping[str, int],
) -> dict[str, Any]:
    """Interval and p-value of the difference of each score that both runs have."""
    drawn = {name: values - other[name] for name, values in own.items() if name in other}
    table: dict[str, Any] = intervals(drawn, cases=cases, groups=groups, group_counts=group_counts)
    for name, entry in table.items():
        entry["p"] = two_sided_p(drawn[name], groups=group_counts.get(name, groups))
    return table


def _correct(compared: Mapping[str, Any]) -> None:
    """Add Holm's p-values, over the runs that are compared with the same one."""
    tables = [found["differences"] for found in compared.values() if "differences" in found]
    for name in dict.fromkeys(name for table in tables for name in table):
        having = [table[name] for table in tables if name in table]
        for entry, corrected in zip(having, holm([e["p"] for e in having]), strict=True):
            entry["p_holm"] = corrected


def _scores_of(task: Task, rows: Sequence[Row]) -> np.ndarray:
    """What ranks the cases."""
    return np.array([float(task.describe(row).get("score", np.nan)) for row in rows])


def _count_wins(own: np.ndarray, other: np.ndarray) -> dict[str, int]:
    """In how many cases a run is better, as good, or worse, by the score that ranks cases."""
    difference = own - other
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
