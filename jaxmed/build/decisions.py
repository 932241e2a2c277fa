"""What a run decides by: fixed by its evaluation on the validation part, kept in its workdir."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.config import differences, flatten, write_json
from jaxmed.build.trained import TrainedRun, is_of_run
from jaxmed.build.workdir import is_free
from jaxmed.evaluation.bootstrap import bootstrap_weights, intervals
from jaxmed.evaluation.box_decisions import BoxDecisions, score_boxes, thresholds_crosswise
from jaxmed.evaluation.decisions import (
    ClassDecisions,
    Decided,
    LabelDecisions,
    decide_crosswise,
    score_decided,
    score_labels,
)
from jaxmed.evaluation.mask_decisions import (
    MaskDecisions,
    calibrate_masks_crosswise,
    score_calibrated,
)
from jaxmed.training.processes import is_first
from jaxmed.types import Row, Source, UserError

DECISIONS_FILE = "decisions.json"
KINDS = {
    "classification": ClassDecisions,
    "several labels": LabelDecisions,
    "detection": BoxDecisions,
    "segmentation": MaskDecisions,
}
Decisions = ClassDecisions | LabelDecisions | BoxDecisions | MaskDecisions


_OF_DECISIONS = ("operating_point", "coverage", "calibration", "score_threshold")
"""Keys of `evaluation` that change what is decided, not what is predicted."""


def are_of_folds(run: TrainedRun) -> bool:
    """Whether models of several folds predict together.

    Their validation scores are of single models: what these fix does not suit their ensemble, which
    has learnt from every case of train and val.
    """
    return len({run.experiment.members[place].fold for place in run.chosen}) > 1


def _settings(run: TrainedRun) -> list[str]:
    """What makes predictions other than those of the run's own config, such as mirrored views."""
    changed = differences(flatten(run.run["config"]), flatten(run.experiment.config))
    # As an export is checked in float32, and what a device computes in is chosen by it.
    own = ("plan", "model.dtype", "model.remat", *(f"evaluation.{key}" for key in _OF_DECISIONS))
    keys = [(line.split(":")[0], line) for line in changed]
    return [line for key, line in keys if key not in own and not is_free(key)]


def _kind(run: TrainedRun) -> str:
    return "several labels" if run.info.multilabel else run.info.task


def fix_decisions(
    workdir: Path, run: TrainedRun, scores: Mapping[int, Row], source: Source
) -> dict[str, Any]:
    """Fix decisions on the scored cases of the validation part, and write them to the workdir.

    Returns:
        for summary.json: the numbers, and as `metrics` what they are worth, by cross-fitting; {}
        where there are too few cases, or models of folds predict together.
    """
    if are_of_folds(run):
        return {}
    rows = list(scores.values())
    patients = None if source.patients is None else [source.patients[row] for row in scores]
    weights = _weights(run, scores, source)
    fixed: Decisions | None
    if run.info.task == "detection":
        fixed = BoxDecisions.fit(rows)
        if fixed is None:
            return {}
        use_decisions(run, fixed)
        try:
            thresholds = _thresholds(run, rows, patients)
        except UserError:
            return {}
        samples, judged = score_boxes(rows, thresholds, weights=weights), "by cross-fitting"
    elif run.info.task == "segmentation":
        fixed, judged = MaskDecisions.fit(rows), "by cross-fitting"
        if fixed is None:
            return {}
        try:
            samples = _note_masks(rows, calibrate_masks_crosswise(rows, patients=patients), weights)
        except UserError:
            return {}
    else:
        labels, probabilities = _arrays(rows)
        fit = _fit_of(run)
        fixed = fit(labels, probabilities)
        try:
            decided = decide_crosswise(labels, probabilities, fit, patients=patients)
        except UserError:
            return {}  # too few cases to fix anything on
        samples = _note_classes(rows, labels, decided, weights)
        judged = "by cross-fitting"
    numbers = dataclasses.asdict(fixed)
    if is_first():
        known = {
            "parameters_sha256": run.sha256,
            "cases": len(rows),
            "settings": _settings(run),
            **numbers,
        }
        write_json(workdir / DECISIONS_FILE, known)
    metrics = intervals(samples, cases=len(rows), groups=_groups(scores, source))
    return {"fixed_on": "val", "cases": len(rows), "judged": judged, **numbers, "metrics": metrics}


def apply_decisions(
    workdir: Path, run: TrainedRun, scores: Mapping[int, Row], source: Source
) -> dict[str, Any]:
    """What decisions fixed before are worth on other cases, for summary.json; {} without any."""
    fixed, cases = read_decisions(workdir, run)
    if fixed is None:
        return {}
    rows, weights = list(scores.values()), _weights(run, scores, source)
    if isinstance(fixed, BoxDecisions):
        use_decisions(run, fixed)
        thresholds = np.full(len(rows), run.experiment.task.score_threshold)
        samples = score_boxes(rows, thresholds, weights=weights)
    elif isinstance(fixed, MaskDecisions):
        samples = _note_masks(rows, fixed.decide(rows), weights)
    else:
        labels, probabilities = _arrays(rows)
        samples = _note_classes(rows, labels, fixed.decide(probabilities), weights)
    metrics = intervals(samples, cases=len(rows), groups=_groups(scores, source))
    numbers = dataclasses.asdict(fixed)
    return {"fixed_on": "val", "cases": cases, "judged": "here", **numbers, "metrics": metrics}


def _thresholds(run: TrainedRun, rows: Sequence[Row], patients: Sequence[str] | None) -> np.ndarray:
    """For each image the threshold that others chose, or the one that was given."""
    if given := run.experiment.config.evaluation.score_threshold:
        return np.full(len(rows), given)
    return thresholds_crosswise(rows, patients=patients)


def use_decisions(run: TrainedRun, fixed: Decisions | None) -> None:
    """Let the task count boxes from the threshold that was chosen, unless one was given."""
    if isinstance(fixed, BoxDecisions) and not run.experiment.config.evaluation.score_threshold:
        run.experiment.task.score_threshold = fixed.score_threshold


def read_decisions(workdir: Path, run: TrainedRun) -> tuple[Decisions | None, int]:
    """The decisions of a run, and on how many cases they were fixed; None where there are none.

    Those of other weights, as of a training that went on since, or of predictions made otherwise
    are told and not used.
    """
    path = workdir / DECISIONS_FILE
    if not path.is_file() or are_of_folds(run):
        return None, 0
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        sha256, cases = known.pop("parameters_sha256"), int(known.pop("cases"))
        settings = known.pop("settings", [])
        fixed = KINDS[_kind(run)](**known)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it, and make it anew with "
            "evaluate.py --split=val"
        ) from error
    if not is_of_run(path, sha256, run):
        return None, 0
    if settings != (own := _settings(run)):
        told = "; ".join(settings) or "the run's own"
        print(
            f"note: {path} is of predictions with other settings ({told}) than these "
            f"({'; '.join(own) or 'of the run'}) and not used; make it with the same overrides and "
            "evaluate.py --split=val"
        )
        return None, 0
    return fixed, cases


def _fit_of(run: TrainedRun) -> Callable[..., ClassDecisions | LabelDecisions]:
    """What fixes the decisions of a classification, as the config asks for."""
    settings = run.experiment.config.evaluation
    if run.info.multilabel:
        return functools.partial(LabelDecisions.fit, rule=settings.operating_point)
    return functools.partial(
        ClassDecisions.fit,
        rule=settings.operating_point,
        coverage=settings.coverage,
        biased=settings.calibration == "bias_corrected",
    )


def _note_classes(
    rows: Sequence[Row], labels: np.ndarray, decided: Decided, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of what was decided; rows get their `calibrated` probabilities, for the figures."""
    for row, calibrated in zip(rows, decided.probabilities, strict=True):
        row["calibrated"] = calibrated
    score = score_decided if labels.ndim == 1 else score_labels
    return score(labels, decided, weights=weights)


def _note_masks(
    rows: Sequence[Row], calibrated: Sequence[np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of calibrated voxels; rows get them as `voxel_calibrated`, for the figures."""
    for row, said in zip(rows, calibrated, strict=True):
        row["voxel_calibrated"] = said.astype(np.float32)
    return score_calibrated(rows, calibrated, weights=weights)


def _arrays(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of scored cases."""
    labels = np.stack([np.asarray(row["label"], int) for row in rows])
    return labels, np.stack([np.asarray(row["probabilities"], np.float64) for row in rows])


def _weights(run: TrainedRun, scores: Mapping[int, Row], source: Source) -> np.ndarray:
    """As those of the evaluation's own intervals."""
    settings = run.experiment.config
    groups = None if source.patients is None else [source.patients[row] for row in scores]
    resamples = settings.evaluation.resamples
    return bootstrap_weights(len(scores), groups=groups, resamples=resamples, seed=settings.seed)


def _groups(scores: Mapping[int, Row], source: Source) -> int | None:
    """How many patients the scored cases are of; None where they are not known."""
    patients = source.patients
    return None if patients is None else len({patients[row] for row in scores})
