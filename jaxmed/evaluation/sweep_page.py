"""The page of a search: its table, history, parallel coordinates and what mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxmed.evaluation.pictures import clip, figure_to_png
from jaxmed.evaluation.report_parts.blocks import Block, Bullets, Picture, Section, Table, Text
from jaxmed.evaluation.report_parts.html_page import html_page
from jaxmed.evaluation.sweep_ranking import (
    Trial,
    judge_winner,
    rank_trials,
    shown_value,
    table_cells,
    tell_verdict,
)


def write_sweep_page(
    path: str | Path,
    *,
    title: str,
    trials: Sequence[Trial],
    space: Mapping[str, str],
    log_keys: Sequence[str] = (),
    importance: Mapping[str, float] | None = None,
    importance_step: int | None = None,
    score_name: str = "score",
    winner: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML page that loads nothing from elsewhere.

    Args:
        path: of the file.
        title: of the page.
        trials: all that were begun.
        space: what each key could be, in words.
        log_keys: keys to be drawn on a logarithmic axis.
        importance: of each key, from 0 to 1; empty where it is not known.
        importance_step: whose scores it is of; None: the final ones.
        score_name: of the score that was searched for.
        winner: how to run the winner.
        notes: what else there is to say.
    """
    ranked = rank_trials(trials)
    sections = [
        _result(ranked, score_name, winner, notes),
        Section("Trials", [_table(ranked, list(space), score_name)] if ranked else []),
        Section("History", _history(trials, score_name)),
        Section("Parallel coordinates", _parallel(trials, list(space), set(log_keys), score_name)),
        Section("What mattered", _importance(importance or {}, importance_step)),
        Section("Failures", _failures(ranked)),
        Section("Search space", [Table("Keys", ("key", "values"), list(map(list, space.items())))]),
    ]
    Path(path).write_text(html_page(title, sections), encoding="utf-8")


def _result(ranked: Sequence[Trial], score_name: str, winner: str, notes: Sequence[str]) -> Section:
    states = [trial.state for trial in ranked]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    blocks: list[Block] = []
    if ranked and ranked[0].state == "finished":
        best = ranked[0]
        score, interval, spread, _ = table_cells(best)
        within = f" (95 % interval over cases {interval})" if interval != "-" else ""
        over = f", standard deviation over {len(best.seeds)} seeds {spread}" if best.seeds else ""
        blocks.append(
            Text(f"Trial {best.number} scored best: {score_name} {score}{within}{over}.", "lead")
        )
    blocks.append(Text(f"{len(ranked)} trials: {counts}. All scores are of the validation part."))
    verdict = judge_winner(ranked)
    said = tell_verdict(verdict)
    if verdict is not None and verdict.is_doubtful:
        blocks.append(Bullets([said.pop(0)], "warning"))
    blocks += [Text(sentence) for sentence in said]
    blocks += [Text(note) for note in (*notes, *([winner] if winner else []))]
    return Section("Result", blocks)


def _table(ranked: Sequence[Trial], keys: Sequence[str], score_name: str) -> Table:
    head = ("trial", *keys, "state", score_name, "95 % interval", "SD over seeds", "step")
    rows = [
        [
            str(trial.number),
            *(shown_value(trial.params.get(key, "")) for key in keys),
            trial.state,
            *table_cells(trial),
        ]
        for trial in ranked
    ]
    return Table("Trials, the best first; of pruned ones the last score", head, rows, 4)


def _failures(ranked: Sequence[Trial]) -> list[Block]:
    failed = [f"Trial {t.number}: {t.message}" for t in ranked if t.state == "failed"]
    return [Bullets(failed)] if failed else []


def _plain(text: str) -> str:
    return clip(text, 40).replace("$", r"\$")


def _history(trials: Sequence[Trial], score_name: str) -> list[Block]:
    scored = [t for t in trials if t.score is not None]
    if not scored:
        return []
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis, best, points = figure.subplots(), -math.inf, []
    for trial in scored:
        is_done, score = trial.state == "finished", float(trial.score or 0.0)
        face = "C0" if is_done else "none"
        axis.plot(trial.number, score, "o", color="C0", markerfacecolor=face, markersize=6)
        if is_done and trial.low is not None and trial.high is not None:
            axis.plot([trial.number] * 2, [trial.low, trial.high], color="C0", alpha=0.4)
        if is_done:
            best = max(best, score)
        points.append((trial.number, best if math.isfinite(best) else math.nan))
    axis.step(*zip(*points, strict=True), where="post", color="C1", label="best so far")
    axis.set(xlabel="trial", ylabel=_plain(score_name))
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    told = "Scores in the order of the trials, with 95 % intervals; open: pruned, the last score"
    return [Picture(f"{score_name} of each trial", told, figure_to_png(figure))]


def _parallel(
    trials: Sequence[Trial], keys: Sequence[str], log_keys: set[str], score_name: str
) -> list[Block]:
    scored = sorted((t for t in trials if t.score is not None), key=lambda t: t.score or 0.0)
    if len(scored) < 2:
        return []
    columns = {key: _axis_of([t.params.get(key) for t in scored], key in log_keys) for key in keys}
    columns[score_name] = _axis_of([t.score for t in scored], False)
    figure = Figure(figsize=(max(5.0, 2.0 * len(columns)), 4.2), layout="constrained")
    axis = figure.subplots()
    order = np.argsort(np.argsort([t.score or 0.0 for t in scored], kind="stable")) / (
        len(scored) - 1
    )
    colors = matplotlib.colormaps["viridis"](order)
    for i, trial in enumerate(scored):
        heights = [places[i] for places, _ in columns.values()]
        style = "-" if trial.state == "finished" else ":"
        axis.plot(range(len(columns)), heights, style, color=colors[i], alpha=0.8)
    for place, (_, ticks) in enumerate(columns.values()):
        axis.axvline(place, color="k", linewidth=0.8)
        for height, name in ticks:
            axis.annotate(_plain(name), (place, height), fontsize=8, xytext=(3, 0),
                          textcoords="offset points", va="center")  # fmt: skip
    names = [_plain(key.rsplit(".", 1)[-1]) for key in columns]
    axis.set_xticks(range(len(columns)), names)
    axis.set_yticks([])
    axis.set_xlim(-0.1, len(columns) - 0.5)
    told = "A line a trial, the brighter the better; dotted: pruned, at its last score"
    return [Picture("Values and score of each trial", told, figure_to_png(figure))]


def _axis_of(values: Sequence[Any], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1 of the values on one axis, and its labels."""
    is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not is_number:
        names = sorted({str(v) for v in values})
        place = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
        return [place[str(v)] for v in values], [(p, name) for name, p in place.items()]
    numbers = np.asarray(values, np.float64)
    scaled = np.log(numbers) if log and numbers.min() > 0 else numbers
    low, high = float(scaled.min()), float(scaled.max())
    ends = [(0.0, f"{numbers.min():.4g}")]
    if high <= low:
        return [0.0] * len(numbers), ends
    return ((scaled - low) / (high - low)).tolist(), [*ends, (1.0, f"{numbers.max():.4g}")]


def _importance(importance: Mapping[str, float], step: int | None) -> list[Block]:
    if not importance:
        told = "Not known: it takes four trials with different scores."
        return [Text(told, "small")]
    names, shares = list(importance)[::-1], list(importance.values())[::-1]
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh([_plain(name) for name in names], shares)
    axis.set(xlabel="share of the spread of the scores", xlim=(0, 1))
    of = "the scores" if step is None else f"the scores at step {step}, the last that all came to,"
    told = (
        f"Share of the spread of {of} that each key explains by itself (functional ANOVA, Hutter "
        "et al. 2014); of few trials a rough guide"
    )
    rows = [[key, f"{share:.3f}"] for key, share in importance.items()]
    return [
        Picture("Importance of each key", told, figure_to_png(figure)),
        Table("Importance", ("key", "share"), rows, 1),
    ]
