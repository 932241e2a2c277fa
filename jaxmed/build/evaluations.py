"""Evaluate a trained run on a part of its data, or on other data, and write the report."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import datasets
from jaxmed.build.config import differences, flatten
from jaxmed.build.decisions import apply_decisions, are_of_folds, fix_decisions
from jaxmed.build.ensembles import Group, make_groups, predict_groups
from jaxmed.build.evaluation_output import write_evaluation
from jaxmed.build.familiarity import apply_familiarity, fix_familiarity, tell_unfamiliar
from jaxmed.build.members import rows_of
from jaxmed.build.report_facts import read_card
from jaxmed.build.scored_set import describe_set, read_subgroups
from jaxmed.build.trained import TrainedRun, check_image, load_run, tell_diverged
from jaxmed.build.workdir import read_split, read_split_ids
from jaxmed.data.sources.findings import some
from jaxmed.evaluation.case_rows import scoring_of
from jaxmed.evaluation.evaluate import (
    score_cases,
    summarize_cases,
)
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.training.processes import gather_rows, is_first, wait_for_all
from jaxmed.types import Row, Source, UserError, count_of


def evaluate_run(
    workdir: str | Path,
    *,
    part: str = "val",
    config: ConfigDict | None = None,
    source: Source | None = None,
    subgroups: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run, write `evaluation/PART` and `report.html`.

    Args:
        workdir: of the run.
        part: "train", "val" or "test" of the run's split, or "all" of the cases of any data.
        config: the run's, with overrides such as another `data.path`.
        source: the data, where they are open already.
        subgroups: columns of the data's manifest.csv whose values have scores of their own.

    Returns:
        the content of summary.json.

    Raises:
        UserError: where the part does not exist, or the data do not fit the run.
    """
    workdir = Path(workdir)
    run = load_run(workdir, config)
    read_card(workdir)  # a mistake in it is told before the work
    if source is None:
        config = run.experiment.config.copy_and_resolve_references()
        # Other data may lack a class, or not name them.
        if config.data.layout not in ("phantoms", "msd", "medmnist"):
            config.data.class_names = run.info.class_names
        if "data.channels" in run.run["planned"]:
            config.data.channels = 0  # as the files are: nothing is converted that was not told to
        source = datasets.make_source(config)
        for note in source.notes:
            print(f"data: {note}")
    _check_fits(run, source)
    data_sha256 = digest(source)
    is_own = data_sha256 == run.run["data"]["sha256"]
    rows, overlap = find_part(workdir, source, part, is_own=is_own)
    columns = read_subgroups(source, subgroups, path=run.experiment.config.data.path)
    settings, notes = run.experiment.config, list(source.notes)
    if part == "all" or not is_own:
        # The parts of the run's own data were looked through when it was trained.
        split, found = datasets.look_through_data(
            settings, source, {part: rows}, check=functools.partial(check_image, run)
        )
        rows, notes = split[part], notes + found
    task = run.experiment.task
    # The folds of the run's own data are each predicted by the models that did not see them.
    folds = read_split(workdir, source) if is_own and part == "val" and run.chosen else None

    def score(groups: Sequence[Group]) -> dict[int, Row]:
        found = gather_rows(score_cases(predict_groups(run, source, groups), task))
        return dict(sorted(found.items()))  # the bootstrap draws by place

    summarize = functools.partial(
        summarize_cases,
        task,
        patients=source.patients,
        resamples=settings.evaluation.resamples,
        seed=settings.seed,
    )
    groups = make_groups(run, rows, folds)
    told = tell_diverged(run)
    if folds is not None:
        told += _note_choices(run, rows, groups, has_test=bool(folds.get("test")))
    for note in told:
        print(f"note: {note}")
    notes += told
    single = {
        place: score(make_groups(run, rows, folds, place=place))
        for place in range(len(run.experiment.members))
        if folds is not None and run.best["step"][place] > 0
    }
    if single and all(len(members) == 1 for _, members in groups):
        scores = {row: own for _, [i] in groups for row, own in single[i].items()}
    else:
        scores = score(groups)
    described, limits = describe_set(
        task,
        run.info,
        scores,
        patients=source.patients,
        folds=[set(rows) for rows, _ in groups],
        subgroups=columns,
        resamples=settings.evaluation.resamples,
        seed=settings.seed,
    )
    notes += limits
    summary = {
        **described,
        "step": run.step,
        "parameters_sha256": run.sha256,
        "part": part,
        "data_path": settings.data.path,
        "data_name": run.info.name if is_own else settings.data.path or source.info.name,
        "data_sha256": data_sha256,
        "overrides": differences(flatten(run.run["config"]), flatten(settings)),
        "also_in_training": overlap,
        "notes": notes,
    }
    settle = fix_decisions if part == "val" and is_own else apply_decisions
    summary["decisions"] = settle(workdir, run, scores, source)
    if part == "all" and is_own and summary["decisions"]:
        summary["decisions"]["judged"] = "here, the cases that fixed it among them"
    summary["scoring"] = scoring_of(task)  # only now: boxes count from the threshold just settled
    if part == "val" and is_own:
        familiarity = fix_familiarity(workdir, run, source, read_split(workdir, source))
    else:
        familiarity = apply_familiarity(workdir, run, source, list(scores))
    if familiarity:
        summary["familiarity"] = familiarity
        unlike = tell_unfamiliar(familiarity)
        limits += unlike
        notes += unlike
        if "metrics" in familiarity and not unlike and is_first():
            share = familiarity["metrics"]["unfamiliar"]["value"]
            print(f"{share:.1%} of the cases are unlike the training images")
    if run.chosen:
        summary["ensemble"] = [run.experiment.members[i].name for i in run.chosen]
    if folds is not None:
        summary["members"] = [
            {
                "name": run.experiment.members[place].name,
                "step": int(run.best["step"][place]),
                "chosen": place in run.chosen,
                "metrics": summarize(own),
            }
            for place, own in single.items()
        ]
        summary["spread"] = spread_of([m["metrics"] for m in summary["members"] if m["chosen"]])
    if is_first():
        shown = part if is_own else f"{part} of {settings.data.path or source.info.name}"
        write_evaluation(workdir, run, source, groups, scores, summary, shown=shown)
        for note in limits:
            print(f"note: {note}")
    wait_for_all("evaluation: written")
    return summary


def _note_choices(
    run: TrainedRun, rows: Sequence[int], groups: Sequence[Group], *, has_test: bool
) -> list[str]:
    """What makes the validation scores of models trained together too good, or incomplete."""
    settings = len({member.setting for member in run.experiment.members})
    chosen = f", and the best of {settings} settings" if settings > 1 else ""
    judge = "the test part tells" if has_test else "data that no model saw would tell"
    notes = [
        f"these scores chose the step of each model{chosen}, and are too good for that; {judge}"
    ]
    if are_of_folds(run):
        notes.append(
            "no temperature, threshold or sets are fixed: models of all folds predict together, "
            "and no case is left that none of them learned from"
        )
    left = len(set(rows) - {row for own, _ in groups for row in own})
    if left:
        notes.append(f"{count_of(left, 'case')} of folds without a model are not scored")
    return notes


def spread_of(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of a sample) of each score over the models that have it."""
    spread = {}
    for name in dict.fromkeys(name for metrics in summaries for name in metrics):
        found = [metrics[name]["value"] for metrics in summaries if name in metrics]
        known = [value for value in found if value is not None]
        if len(known) > 1:
            spread[name] = {"mean": float(np.mean(known)), "std": float(np.std(known, ddof=1))}
    return spread


def find_part(workdir: Path, source: Source, part: str, *, is_own: bool) -> tuple[list[int], int]:
    """Rows of a part, and how many of them are also in the run's training part.

    Of the run's own data (`is_own`) it is the saved split; of other data the part that they name,
    or all.
    """
    saved = read_split_ids(workdir)
    if part == "all":
        rows = list(range(len(source)))
    elif is_own:
        rows = rows_of(read_split(workdir, source), part)
    else:
        rows = list(source.parts.get(part, []))
    if not rows and not is_own and rows_of(saved, part):
        ids = {name for names in saved.values() for name in names}
        gone = sorted(ids - set(source.ids))
        # Where most are there it is the run's own set, of which some are lost.
        if gone and len(gone) < len(ids) / 2:
            raise UserError(
                f"--split={part}: {len(gone)} cases of the run are not in the data any more "
                f"({some(gone)}); put them back, or evaluate what is there with --split=all"
            )
    if not rows:
        names = ("train", "val", "test")
        own = [name for name in names if rows_of(saved, name)]
        given = ", ".join(own if is_own else source.parts) or "none"
        raise UserError(
            f"--split={part}: the data have no such part (there is: {given}); use one of these, or "
            "--split=all --config.data.path=OTHER"
        )
    # The run's own val (of folds each by models that did not see it) and test were not trained on.
    trained = set() if is_own and part in ("val", "test") else set(rows_of(saved, "train"))
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
