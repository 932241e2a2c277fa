"""Evaluate a trained run on a part of its data, or on other data, and write the report."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import pieces
from jaxmed.build.checks import useless_keys
from jaxmed.build.config import config_of_run, differences, flatten, write_json
from jaxmed.build.trained import TrainedRun, check_image, load_run
from jaxmed.build.workdir import read_split, read_split_ids
from jaxmed.data.sources.findings import some
from jaxmed.evaluation import curves, pictures
from jaxmed.evaluation.evaluate import (
    predict_cases,
    score_cases,
    summarize_cases,
    write_cases,
)
from jaxmed.evaluation.report import write_report
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.training.logging import METRICS_FILE, read_log
from jaxmed.training.processes import gather_rows, is_first, share_of, wait_for_all
from jaxmed.types import Example, Row, Source, UserError, count_of

PICTURES_A_GROUP = 3
FEW_CASES = 20


def evaluate_run(
    workdir: str | Path,
    *,
    part: str = "val",
    config: ConfigDict | None = None,
    source: Source | None = None,
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run, write `evaluation/PART` and `report.html`.

    Args:
        workdir: of the run.
        part: "train", "val" or "test" of the run's split, or "all" of the cases of any data.
        config: the run's, with overrides such as another `data.path`.
        source: the data, where they are open already.

    Returns:
        the content of summary.json.

    Raises:
        UserError: where the part does not exist, or the data do not fit the run.
    """
    workdir = Path(workdir)
    run = load_run(workdir, config)
    if source is None:
        config = run.experiment.config.copy_and_resolve_references()
        # Other data may lack a class, or not name them.
        if config.data.layout not in ("phantoms", "msd", "medmnist"):
            config.data.class_names = run.info.class_names
        if "data.channels" in run.run["planned"]:
            config.data.channels = 0  # as the files are: nothing is converted that was not told to
        source = pieces.make_source(config)
        for note in source.notes:
            print(f"data: {note}")
    _check_fits(run, source)
    data_sha256 = digest(source)
    is_own = data_sha256 == run.run["data"]["sha256"]
    rows, overlap = find_part(workdir, source, part, is_own=is_own)
    settings, notes = run.experiment.config, list(source.notes)
    if part == "all" or not is_own:
        # The parts of the run's own data were looked through when it was trained.
        split, found = pieces.look_through_data(
            settings, source, {part: rows}, check=functools.partial(check_image, run)
        )
        rows, notes = split[part], notes + found
    task = run.experiment.task
    prepare = run.experiment.prepare
    cases = predict_cases(run.predict, task, source, share_of(rows), prepare=prepare)
    scores = gather_rows(score_cases(cases, task))
    summary = {
        "metrics": summarize_cases(
            task,
            scores,
            patients=source.patients,
            resamples=settings.evaluation.resamples,
            seed=settings.seed,
        ),
        "step": run.step,
        "parameters_sha256": run.sha256,
        "part": part,
        "cases": len(scores),
        "resampled": "cases" if source.patients is None else "patients",
        "data_path": settings.data.path,
        "data_sha256": data_sha256,
        "overrides": differences(flatten(run.run["config"]), flatten(settings)),
        "also_in_training": overlap,
        "notes": notes,
    }
    if is_first():
        shown = part if is_own else f"{part} of {settings.data.path or source.info.name}"
        _write_evaluation(workdir, run, source, scores, summary, shown=shown)
    wait_for_all("evaluation: written")
    return summary


def _write_evaluation(
    workdir: Path,
    run: TrainedRun,
    source: Source,
    scores: Mapping[int, Row],
    summary: Mapping[str, Any],
    *,
    shown: str,
) -> None:
    """Write and print everything that an evaluation gives."""
    part, task = summary["part"], run.experiment.task
    folder = workdir / "evaluation" / part
    folder.mkdir(parents=True, exist_ok=True)
    _note_replacement(folder / "summary.json", summary)
    write_json(folder / "summary.json", summary)
    described = {row: task.describe(score) for row, score in scores.items()}
    write_cases(folder / "cases.csv", source.ids, described)
    best = f"checkpoint with the best {task.main_score} (step {run.step})"
    print_table(summary, title=f"{part}: {count_of(len(scores), 'case')}, {best}")
    figures = curves.draw_curves(run.info, scores, folder)
    examples = _draw_examples(run, source, described, folder)
    _write_report(workdir, run, figures, examples, shown=shown)
    print(f"report: {workdir / 'report.html'}")


def _note_replacement(path: Path, summary: Mapping[str, Any]) -> None:
    """Say so where the evaluation of another data set is about to be replaced."""
    if not path.is_file():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["data_sha256"] != summary["data_sha256"]:
        print(f"note: this replaces the evaluation of {old['data_path']} in {path.parent}")


def find_part(workdir: Path, source: Source, part: str, *, is_own: bool) -> tuple[list[int], int]:
    """Rows of a part, and how many of them are also in the run's training part.

    Of the run's own data (`is_own`) it is the saved split; of other data the part that they name,
    or all.
    """
    saved = read_split_ids(workdir)
    if part == "all":
        rows = list(range(len(source)))
    elif is_own:
        split = read_split(workdir, source) or {}
        rows = split.get(part, [])
    else:
        rows = list(source.parts.get(part, []))
    if not rows and not is_own and part in saved:
        ids = {name for names in saved.values() for name in names}
        gone = sorted(ids - set(source.ids))
        # Where most are there it is the run's own set, of which some are lost.
        if gone and len(gone) < len(ids) / 2:
            raise UserError(
                f"--split={part}: {len(gone)} cases of the run are not in the data any more "
                f"({some(gone)}); put them back, or evaluate what is there with --split=all"
            )
    if not rows:
        given = ", ".join(saved if is_own else source.parts) or "none"
        raise UserError(
            f"--split={part}: the data have no such part (there is: {given}); use --split=val, or "
            "--split=all --config.data.path=OTHER"
        )
    # The run's own parts do not overlap; of its whole, or of other data, cases may.
    trained = set() if is_own and part != "all" else set(saved["train"])
    overlap = sum(source.ids[row] in trained for row in rows)
    if overlap:
        print(f"note: {overlap} of the {len(rows)} cases have ids that were trained on")
    return rows, overlap


def _check_fits(run: TrainedRun, source: Source) -> None:
    for name in ("task", "ndim", "class_names", "multilabel", "instances"):
        trained, found = getattr(run.info, name), getattr(source.info, name)
        if trained != found:
            raise UserError(
                f"data.path={run.experiment.config.data.path}: {name} is {found}; the run was "
                f"trained on {trained}"
            )


def print_table(summary: Mapping[str, Any], *, title: str) -> None:
    """Print the scores with their intervals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("score", "value", "95 % interval", "cases"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, entry in summary["metrics"].items():
        if entry["value"] is None:
            table.add_row(name, "-", "undefined", str(entry["n"]))
            continue
        interval = "-" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"
        table.add_row(name, f"{entry['value']:.3f}", interval, str(entry["n"]))
    Console().print(table)
    if summary["cases"] < FEW_CASES:
        print(f"note: of {count_of(summary['cases'], 'case')} even intervals say little")


def choose_cases(described: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Rows of the worst, typical (around the median) and best cases; none twice."""
    ranked = sorted(
        (row for row, told in described.items() if np.isfinite(told["score"])),
        key=lambda row: described[row]["score"],
    )
    size = min(PICTURES_A_GROUP, -(-len(ranked) // 3))
    worst, best = ranked[:size], ranked[size:][::-1][:size]
    between = ranked[len(worst) : len(ranked) - len(best)]
    middle = max(0, (len(between) - size) // 2)
    return {"worst": worst, "typical": between[middle : middle + size], "best": best}


def _draw_examples(
    run: TrainedRun, source: Source, described: Mapping[int, Mapping[str, Any]], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Pictures of chosen cases, each predicted once more and drawn beside its truth."""
    groups = choose_cases(described)
    rows = [row for group in groups.values() for row in group]
    task, prepare = run.experiment.task, run.experiment.prepare
    drawn: dict[int, dict[str, Any]] = {}
    for row, example, prediction in predict_cases(run.predict, task, source, rows, prepare=prepare):
        name = next(g for g, members in groups.items() if row in members)
        path = folder / "pictures" / f"{name}_{groups[name].index(row)}.png"
        path.parent.mkdir(exist_ok=True)
        told = described[row]
        pictures.draw_overlay(
            path,
            example["image"],
            **pictures_of(run, example, prediction),
            class_names=run.info.class_names,
        )
        drawn[row] = {
            "id": source.ids[row],
            "score": told["score"],
            "picture": path,
            "caption": ", ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                for k, v in list(told.items())[:6]
            ),
        }
    return {name: [drawn[row] for row in group] for name, group in groups.items()}


def pictures_of(run: TrainedRun, example: Example, prediction: Any) -> dict[str, Any]:
    """Prediction and truth of a case as the arguments of a picture."""
    from jaxmed.build.predictions import drawn_prediction

    shown = drawn_prediction(
        prediction, run.info, least_score=run.experiment.config.evaluation.score_threshold
    )
    if run.info.task == "segmentation":
        shown["true_mask"] = example["mask"]
    elif run.info.task == "detection":
        shown |= {"true_boxes": example["boxes"], "true_labels": example["box_label"]}
    else:
        names = run.info.class_names
        label = example["label"]
        truth = (
            "+".join(n for n, on in zip(names, label, strict=True) if on)
            if label.ndim
            else names[int(label)]
        )
        shown["title"] = f"{shown['title']} (is {truth or 'none'})"
    return shown


def _write_report(
    workdir: Path,
    run: TrainedRun,
    figures: Sequence[Any],
    examples: Mapping[str, Any],
    *,
    shown: str,
) -> None:
    useless = useless_keys(config_of_run(run.run))
    history = []
    log = workdir / METRICS_FILE
    if log.is_file():
        history = read_log(log)
    summaries = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        # Its own parts first: other data may have been trained on.
        for path in sorted(
            workdir.glob("evaluation/*/summary.json"),
            key=lambda path: ("train val test".find(path.parent.name), path),
            reverse=True,
        )
    }
    write_report(
        workdir / "report.html",
        title=f"{run.info.name}: {run.info.task}",
        config={k: v for k, v in flatten(run.run["config"]).items() if k not in useless},
        history=history,
        summaries=summaries,
        cases=examples,
        curves=figures,
        shown=shown,
        notes=run.run["data"]["notes"],
    )
