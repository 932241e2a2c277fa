"""Which trial of a search is the best, and how much of that is chance."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.integrate
import scipy.stats

from jaxmed.types import count_of

MOST_TRIALS = 1_000_000
"""Beyond which no number of trials is told."""

_ORDER = ("finished", "pruned", "running", "failed")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        number: from 0, in the order in which trials were begun.
        state: "finished", "pruned" (ended early), "failed" or "running".
        params: values by key.
        score: of the validation part, higher is better: of a finished trial that of its best
            checkpoint, of a pruned one the last; of several seeds the mean. None where unknown.
        low, high: 95 % interval over cases, of several seeds the mean of theirs.
        cases: that the score is of.
        seeds: the score of each, where there are several.
        step: of the best checkpoint, or of the last score.
        message: why it failed.
        workdir: of its run.
        curve: scores under way, by step.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    score: float | None = None
    low: float | None = None
    high: float | None = None
    cases: int | None = None
    seeds: Sequence[float] = ()
    step: int | None = None
    message: str = ""
    workdir: str = ""
    curve: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (of a sample)."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None


def rank_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The finished ones first, the best of them on top; then pruned ones, those that got furthest.

    Equal scores are in the order in which they were tried.
    """

    def place(trial: Trial) -> tuple[int, int, float, int]:
        score = -np.inf if trial.score is None else trial.score
        reached = trial.step or 0 if trial.state == "pruned" else 0
        return _ORDER.index(trial.state), -reached, -score, trial.number

    return sorted(trials, key=place)


@functools.cache
def expected_maximum(count: int) -> float:
    """The expected largest of `count` independent standard normals.

    The integral of x times the density of the largest, `count` phi(x) Phi(x)^(count - 1) (David &
    Nagaraja, Order Statistics, 3rd edition, 2003, section 3.1).

    >>> [round(expected_maximum(k), 3) for k in (1, 2, 3, 100)]
    [0.0, 0.564, 0.846, 2.508]
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1")

    def density(x: float) -> float:
        normal = scipy.stats.norm
        return x * count * float(np.exp(normal.logpdf(x) + (count - 1) * normal.logcdf(x)))

    return float(scipy.integrate.quad(density, -9, 9, points=[0.0], limit=200)[0])


def bearable_trials(lead: float, error: float) -> int:
    """How many equally good settings may be tried until chance alone is expected to give a lead.

    Args:
        lead: of the best, in units of the score.
        error: standard error of one score, in the same.

    Returns:
        The largest k with E[largest of k normals] * error <= lead, at most `MOST_TRIALS`; 1 where
        there is no lead.
    """
    if error <= 0:
        return MOST_TRIALS if lead > 0 else 1
    low, high = 1, MOST_TRIALS
    while low < high:
        middle = (low + high + 1) // 2
        if expected_maximum(middle) * error <= lead:
            low = middle
        else:
            high = middle - 1
    return low


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far the best of a search can be believed.

    Choosing the best of many by the same cases finds, in part, what suits these cases by chance
    (Cawley & Talbot, On Over-fitting in Model Selection and Subsequent Selection Bias in
    Performance Evaluation, JMLR 11, 2010). The best of k settings that are equally good is expected
    to score E[largest of k normals] standard errors above what they are worth. Trials are judged by
    the same cases, so that their errors are alike and the true excess is smaller: it is a bound.

    Attributes:
        trials: scored ones, also the pruned.
        cases: of the validation part.
        error: standard error of the winner's score, from its interval.
        excess: expected of the best of so many equally good settings.
        lead: of the winner over the second finished trial; None where there is none.
        lead_of_median: over the median of the finished trials.
        bears: trials until chance alone is expected to give `lead_of_median`.
        level: numbers of the finished trials within `excess` of the winner.
    """

    trials: int
    cases: int | None
    error: float
    excess: float
    lead: float | None
    lead_of_median: float
    bears: int
    level: Sequence[int]

    @property
    def is_doubtful(self) -> bool:
        """Whether the winner may lead by chance."""
        return self.lead is None or self.lead <= self.excess


def judge_winner(trials: Sequence[Trial]) -> Verdict | None:
    """How far the best is ahead of chance; None where no trial finished, or it has no interval."""
    ranked = [t for t in rank_trials(trials) if t.state == "finished" and t.score is not None]
    if not ranked or ranked[0].low is None or ranked[0].high is None:
        return None
    best, scores = ranked[0], np.array([trial.score for trial in ranked], np.float64)
    error = (ranked[0].high - ranked[0].low) / (2 * float(scipy.stats.norm.ppf(0.975)))
    count = sum(trial.score is not None for trial in trials)
    excess = expected_maximum(count) * error
    over_median = float(scores[0] - np.median(scores))
    return Verdict(
        trials=count,
        cases=best.cases,
        error=error,
        excess=excess,
        lead=float(scores[0] - scores[1]) if len(scores) > 1 else None,
        lead_of_median=over_median,
        bears=bearable_trials(over_median, error),
        level=[
            t.number for t, s in zip(ranked[1:], scores[1:], strict=True) if scores[0] - s <= excess
        ],
    )


def tell_verdict(verdict: Verdict | None) -> list[str]:
    """The verdict in sentences; the first is a warning where the winner is doubtful."""
    if verdict is None:
        return ["No trial finished with a score and an interval, so nothing can be said of chance."]
    told = []
    cases = f"{verdict.cases} cases" if verdict.cases else "The cases"
    if verdict.lead is None:
        told.append("Only one trial finished, so nothing tells whether its settings are better.")
    elif verdict.is_doubtful:
        told.append(
            f"The winner has a lead of {verdict.lead:.4f}; chance alone is expected to lift the "
            f"best of {verdict.trials} equally good settings by up to {verdict.excess:.4f}. It may "
            f"be no better than {count_of(len(verdict.level), 'other trial')} within that."
        )
    many = f"over {MOST_TRIALS:,}" if verdict.bears >= MOST_TRIALS else f"{verdict.bears:,}"
    trials = "trial" if verdict.bears == 1 else "trials"
    told.append(
        f"{cases} of the validation part bear {many} {trials}: up to so many, chance alone is "
        "expected to give less than the winner's lead over the median of the finished trials "
        f"({verdict.lead_of_median:.4f}), with a standard error of a score of {verdict.error:.4f} "
        f"(from its 95 % interval); {verdict.trials} were scored."
    )
    if verdict.lead is not None and verdict.is_doubtful and verdict.bears > verdict.trials:
        told.append("So settings do matter, but the best few of them cannot be told apart.")
    told.append(
        "Expected excess of the best of k equally good settings: E[largest of k standard normals] "
        "x standard error (order statistics, David & Nagaraja 2003; selection bias, Cawley & "
        "Talbot 2010). It is a bound, since all trials are judged by the same cases. The winner's "
        "score was chosen for being high: only the test part, looked at once, tells its worth."
    )
    return told


def table_cells(trial: Trial) -> list[str]:
    """Score, interval over cases, spread over seeds and step of a trial, as text."""
    score = "-" if trial.score is None else f"{trial.score:.4f}"
    interval = "-" if trial.low is None else f"{trial.low:.4f} to {trial.high:.4f}"
    spread = "-" if trial.spread is None else f"{trial.spread:.4f}"
    return [score, interval, spread, "-" if trial.step is None else str(trial.step)]


def shown_value(value: Any) -> str:
    """A parameter, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_ranking(path: str | Path, ranked: Sequence[Trial], keys: Sequence[str]) -> None:
    """One line a trial, best first; numbers in full."""
    head = ["rank", "trial", "state", "score", "low", "high", "cases", "seeds", "seeds_std", "step"]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, *keys, "message", "workdir"])
        for rank, t in enumerate(ranked, start=1):
            numbers = [t.score, t.low, t.high, t.cases, len(t.seeds) or 1, t.spread, t.step]
            known = [repr(n) if n is not None else "" for n in numbers]
            own = [t.params.get(key, "") for key in keys]
            place = rank if t.state == "finished" else ""
            writer.writerow([place, t.number, t.state, *known, *own, t.message, t.workdir])
