"""What an evaluation leaves behind: files, tables, pictures and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmed.build.case_pictures import draw_cases
from jaxmed.build.checks import useless_keys
from jaxmed.build.config import config_of_run, flatten
from jaxmed.build.ensembles import Group
from jaxmed.build.planning import QUALITY_FILE, read_findings
from jaxmed.build.report_facts import card_facts, describe_split, read_card, warnings_of_run
from jaxmed.build.scored_set import print_summary, print_table, score_cells, write_set
from jaxmed.build.trained import TrainedRun
from jaxmed.evaluation import curves
from jaxmed.evaluation.report import write_report
from jaxmed.evaluation.report_parts.words import RANKED_BY, score_title
from jaxmed.training.checkpoints import best_step
from jaxmed.training.logging import METRICS_FILE, read_log
from jaxmed.types import Row, Source, count_of


def write_evaluation(
    workdir: Path,
    run: TrainedRun,
    source: Source,
    groups: Sequence[Group],
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
    folds = _folds(run, groups)
    described = write_set(
        folder, source.ids, scores, summary, task=task, patients=source.patients, folds=folds
    )
    is_chosen = best_step(workdir / "checkpoints") is not None
    chosen = f"with the best {task.main_score}" if is_chosen else "not evaluated in training"
    best = f"checkpoint {chosen} (step {run.step})"
    if run.chosen:
        best = f"{count_of(len(run.chosen), 'model')} at their best {task.main_score}"
    print_summary(summary, title=f"{part}: {count_of(len(scores), 'case')}, {best}")
    if "members" in summary:
        print_members(summary, task.main_score)
    if summary.get("decisions"):
        print_decisions(summary["decisions"])
    figures = curves.draw_curves(run.info, scores, folder, patients=source.patients)
    if folds:
        for figure in figures:
            figure["caption"] += "; all folds in one, though the scores are means over the folds"
    print("making the report: pictures of cases, and what counted for the network", flush=True)
    stated = read_card(workdir)
    examples = draw_cases(run, source, groups, described, folder / "pictures")
    is_own = summary["data_sha256"] == run.run["data"]["sha256"]
    split = describe_split(workdir, source, is_own=is_own)
    checkpoint = f"the {best.replace(task.main_score, score_title(task.main_score))}"
    _write_report(
        workdir, run, figures, examples, split, stated, checkpoint=checkpoint, shown=shown
    )
    print(f"report: {workdir / 'report.html'}")


def _folds(run: TrainedRun, groups: Sequence[Group]) -> dict[int, int]:
    """The fold whose models predicted each row; nothing where the same models predicted all."""
    found = [(rows, run.experiment.members[places[0]].fold) for rows, places in groups if places]
    return {
        row: fold for rows, fold in found if fold is not None and len(groups) > 1 for row in rows
    }


def _note_replacement(path: Path, summary: Mapping[str, Any]) -> None:
    """Say so where the evaluation of another data set is about to be replaced."""
    if not path.is_file():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["data_sha256"] != summary["data_sha256"]:
        print(f"note: this replaces the evaluation of {old['data_path']} in {path.parent}")


def print_members(summary: Mapping[str, Any], main_score: str) -> None:
    """Print the main score of each model on its own validation part."""
    from rich.table import Table

    table = Table(title=f"{main_score} of each model on its own validation part")
    for column in ("model", "step", "value", "95 % interval", "predicts"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for member in summary["members"]:
        entry = member["metrics"][main_score]
        value, interval = score_cells(entry)
        chosen = "yes" if member["chosen"] else ""
        table.add_row(member["name"], str(member["step"]), value, interval, chosen)
    print_table(table)
    spread = summary["spread"].get(main_score)
    if spread is not None:
        told = f"mean {spread['mean']:.3f}, standard deviation {spread['std']:.3f}"
        count = sum(member["chosen"] for member in summary["members"])
        print(f"{main_score} of the {count} that predict, each by itself: {told}")


def print_decisions(decisions: Mapping[str, Any]) -> None:
    """Print what was fixed on the validation part, and what it is worth."""
    told = {
        "temperature": "temperature {:.2f}",
        "threshold": "the last class from a calibrated probability of {:.3f} on",
        "score_threshold": "boxes from a score of {:.2f} on",
    }
    known = [words.format(decisions[k]) for k, words in told.items() if decisions.get(k)]
    known += [f"operating point {decisions['rule']}"] if decisions.get("rule") else []
    cells = {name: score_cells(entry) for name, entry in decisions["metrics"].items()}
    scores = ", ".join(f"{name} {value} ({interval})" for name, (value, interval) in cells.items())
    print(f"decided as fixed on the validation part: {', '.join(known)}")
    print(f"  {decisions['judged']}: {scores}")


def _write_report(
    workdir: Path,
    run: TrainedRun,
    figures: Sequence[Any],
    examples: Mapping[str, Any],
    split: Mapping[str, Any],
    stated: Mapping[str, str],
    *,
    checkpoint: str,
    shown: str,
) -> None:
    useless = useless_keys(config_of_run(run.run))
    log = workdir / METRICS_FILE
    history = read_log(log) if log.is_file() else []
    seconds = max((line.get("seconds", 0.0) for line in history), default=0.0)
    summaries = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        # Its own parts first: other data may have been trained on.
        for path in sorted(
            workdir.glob("evaluation/*/summary.json"),
            key=lambda path: ("train val test".find(path.parent.name), path),
            reverse=True,
        )
    }
    findings, looked = read_findings(workdir), (workdir / QUALITY_FILE).is_file()
    facts = card_facts(run, summaries, split, checkpoint=checkpoint, seconds=seconds)
    devices = ", ".join(run.run["devices"])
    write_report(
        workdir / "report.html",
        title=f"{run.info.name}: {run.info.task}",
        config={k: v for k, v in flatten(run.run["config"]).items() if k not in useless},
        history=history,
        summaries=summaries,
        cases=examples,
        curves=figures,
        shown=shown,
        data=run.info.name,
        checkpoint=checkpoint,
        ranked_by=RANKED_BY[run.info.task],
        warnings=warnings_of_run(run, summaries, findings, split, looked=looked),
        notes=run.run["data"]["notes"],
        split=split,
        findings=findings,
        facts={**facts, **stated},
        versions={
            **run.run["versions"],
            "devices": devices,
            "git commit": run.run["commit"] or "–",
        },
    )
