"""Compare runs by what their evaluations left, without loading a network."""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxmed.build.config import CONFIG_FILE, flatten, write_json
from jaxmed.build.evaluations import spread_of
from jaxmed.build.scored_set import print_table, score_cells
from jaxmed.build.workdir import make_folder
from jaxmed.evaluation.case_rows import ROWS_FILE, load_rows, make_scorer
from jaxmed.evaluation.comparison import compare_runs, draw_forest
from jaxmed.evaluation.report_parts.words import RANKED_BY
from jaxmed.types import DatasetInfo, UserError, count_of

SHOWN_SCORES = 3
"""In the printed table; compare.csv has all."""
_INFO = ("task", "ndim", "class_names", "multilabel", "instances")


def compare_evaluations(
    places: Sequence[str],
    *,
    part: str = "val",
    output: str | Path | None = None,
    against: str = "first",
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare evaluations on the cases they share; print, and write where there is an `output`.

    Args:
        places: workdirs of runs, or folders with the summary.json and rows.npz of an evaluation,
            such as `evaluate.py --predictions` writes.
        part: of the workdirs.
        output: folder for compare.json, compare.csv and compare.png.
        against: "first" of the places, or "best" by the main score.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        the content of compare.json.

    Raises:
        UserError: where an evaluation is missing, or they cannot be compared.
    """
    if len(places) < 2 or len({Path(place).absolute() for place in places}) < len(places):
        raise UserError(f"compare: {' '.join(places) or 'nothing'} given; give two different runs")
    folders = {
        name: _find_folder(Path(place), part)
        for name, place in zip(_short_names(places), places, strict=True)
    }
    summaries = {name: _read_summary(folder) for name, folder in folders.items()}
    info = _common_info(summaries)
    runs = {name: load_rows(folder / ROWS_FILE) for name, folder in folders.items()}
    task = make_scorer(info)
    scoring = {name: summary["scoring"] for name, summary in summaries.items()}
    left_out, settings = _compare_settings(scoring)
    compared = compare_runs(
        runs,
        task,
        scorers={name: make_scorer(info, **told) for name, told in scoring.items()},
        leave_out=left_out,
        against="best" if against == "best" else None,
        resamples=resamples,
        seed=seed,
    )
    left = compared["runs"][compared["against"]]["metrics"]
    compared = {
        "main_score": task.main_score if task.main_score in left else next(iter(left)),
        "ranked_by": RANKED_BY[info.task],
        "part": ", ".join(sorted({str(summary["part"]) for summary in summaries.values()})),
        "resamples": resamples,
        "test": "two-sided, paired, by bootstrap; p_holm corrected for the number of runs",
        "resampled": "cases" if compared["groups"] == compared["cases"] else "patients",
        **compared,
        "seeds": _summarize_seeds(dict(zip(folders, places, strict=True)), compared),
        "notes": [
            *_notes(summaries, compared, {name: len(run.ids) for name, run in runs.items()}),
            *compared["notes"],
            *settings,
        ],
    }
    _print(compared)
    if output is not None:
        _write(Path(output), compared)
    return compared


def _short_names(places: Sequence[str]) -> list[str]:
    """The places without the folders that all are in."""
    paths = [Path(place).absolute() for place in places]
    common = Path(os.path.commonpath(paths))
    return [path.relative_to(common).as_posix() for path in paths]


def _find_folder(place: Path, part: str) -> Path:
    for folder in (place / "evaluation" / part, place):
        if (folder / "summary.json").is_file():
            return folder
    raise UserError(
        f"{place}: holds no evaluation/{part}/summary.json; run evaluate.py --workdir={place} "
        f"--split={part} first"
    )


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate again") from error
    if not isinstance(summary, dict) or not {"data", "scoring"} <= summary.keys():
        raise UserError(f"{path}: is of an earlier version; evaluate again")
    return summary


def _common_info(summaries: Mapping[str, Mapping[str, Any]]) -> DatasetInfo:
    """What all evaluations say of their data; UserError where they differ."""
    (first, reference), *others = ((name, s["data"]) for name, s in summaries.items())
    for name, told in others:
        for key in _INFO:
            if told[key] != reference[key]:
                raise UserError(
                    f"compare: {key} is {reference[key]} in {first} and {told[key]} in {name}; "
                    "only evaluations of the same task and classes can be compared"
                )
    known = {key: reference[key] for key in _INFO} | {
        "class_names": tuple(reference["class_names"])
    }
    return DatasetInfo(name="", channels=1, **known)


def _compare_settings(
    scoring: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[str]]:
    """Scores that the runs measured in different ways, and notes on what differs."""
    left_out, notes = [], []
    for key, told in (
        ("nsd_tolerance", "nsd is left out, since distances forgiven differ (in mm: {})"),
        ("score_threshold", "boxes won and lost are those from each run's own score on ({})"),
    ):
        found = {name: settings[key] for name, settings in scoring.items() if key in settings}
        if len(set(found.values())) > 1:
            notes.append(told.format(", ".join(f"{n} {value:.3g}" for n, value in found.items())))
            left_out += ["nsd"] * (key == "nsd_tolerance")
    return left_out, notes


def _notes(
    summaries: Mapping[str, Mapping[str, Any]],
    compared: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> list[str]:
    shared, notes = compared["cases"], []
    if any(size != shared for size in sizes.values()):
        had = ", ".join(f"{name} {size}" for name, size in sizes.items())
        notes.append(f"only the {count_of(shared, 'case')} that all have count (they have: {had})")
    if len({summary.get("data_sha256") for summary in summaries.values()}) > 1:
        notes.append(
            "the runs were evaluated on different data, or on data that were read differently, in "
            "which these cases have the same names and truth"
        )
    seen = [name for name, summary in summaries.items() if summary.get("also_in_training")]
    if seen:
        notes.append(f"{', '.join(seen)} learned from some of these cases")
    return notes


def _summarize_seeds(
    places: Mapping[str, str], compared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Mean and spread of the scores of runs that differ in nothing but their seed."""
    alike = defaultdict(list)
    for name, place in places.items():
        path = Path(place) / CONFIG_FILE
        if path.is_file():
            config = flatten(json.loads(path.read_text(encoding="utf-8"))["config"])
            free = ("seed", "data.path")
            alike[repr(sorted((k, v) for k, v in config.items() if k not in free))].append(name)
    return [
        {"runs": own, "spread": spread_of([compared["runs"][name]["metrics"] for name in own])}
        for own in alike.values()
        if len(own) > 1
    ]


def _print(compared: Mapping[str, Any]) -> None:
    main, against = compared["main_score"], compared["against"]
    cases = count_of(compared["cases"], "shared case")
    resampled = "" if compared["resampled"] == "cases" else f" of {compared['groups']} patients"
    part, drawn = compared["part"], compared["resamples"]
    table = Table(
        title=f"{part}: {cases}{resampled}, {drawn:,} resamples; differences to {against}"
    )
    for head in ("run", "score", "value (95 % interval)", "difference", "p"):
        left = head in ("run", "score")
        table.add_column(
            head, justify="left" if left else "right", overflow="fold", no_wrap=head != "run"
        )
    for name, found in compared["runs"].items():
        names = list(dict.fromkeys([main, *found["metrics"]]))
        for place, score in enumerate([n for n in names if n in found["metrics"]][:SHOWN_SCORES]):
            difference = found.get("differences", {}).get(score)
            more = ("", "") if difference is None else (_cell(difference), _p(difference))
            table.add_row("" if place else name, score, _cell(found["metrics"][score]), *more)
        if "win" in found:
            told = f"{found['win']} won, {found['tie']} tied, {found['lose']} lost"
            table.add_row("", "cases", "", told, "")
    print_table(table)
    several = len(compared["runs"]) > 2
    corrected = "corrected for the number of runs (Holm)" if several else "of one comparison"
    print(f"p: two-sided, paired, by bootstrap; {corrected}, not for the number of scores")
    print(f"won: cases whose own score is better: {compared['ranked_by']}")
    for seeds in compared["seeds"]:
        spread = seeds["spread"].get(main)
        if spread is not None:
            told = f"mean {spread['mean']:.3f}, standard deviation {spread['std']:.3f}"
            print(f"{main} of {len(seeds['runs'])} seeds ({', '.join(seeds['runs'])}): {told}")
    for note in compared["notes"]:
        print(f"note: {note}")


def _cell(entry: Mapping[str, Any]) -> str:
    value, interval = score_cells(entry)
    return f"{value} ({interval})"


def _p(entry: Mapping[str, Any]) -> str:
    p = entry["p_holm"]
    return "-" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}")


def _write(output: Path, compared: Mapping[str, Any]) -> None:
    """compare.json, compare.csv with a line a run and score, compare.png of the main score."""
    make_folder(output)
    write_json(output / "compare.json", compared)
    columns = ("value", "low", "high", "n")
    of_difference = ("value", "low", "high", "p", "p_holm")
    wins = ("win", "tie", "lose")
    with (output / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = [f"difference_{name}".removesuffix("_value") for name in of_difference]
        writer.writerow(["run", "score", *columns, *heads, *wins])
        for name, found in compared["runs"].items():
            for score, entry in found["metrics"].items():
                difference = found.get("differences", {}).get(score, {})
                cells = [entry[c] for c in columns] + [difference.get(c) for c in of_difference]
                counts = [found.get(c) if score == compared["main_score"] else None for c in wins]
                writer.writerow([name, score, *cells, *counts])
    draw_forest(output / "compare.png", compared, compared["main_score"])
    print(f"written: {output / 'compare.csv'}, compare.json and compare.png")
