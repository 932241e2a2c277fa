"""Score predictions that lie in files, whoever made them, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmed.build.scored_set import describe_set, print_summary, read_subgroups, write_set
from jaxmed.build.workdir import make_folder
from jaxmed.evaluation.case_rows import make_scorer, scoring_of
from jaxmed.evaluation.curves import draw_curves
from jaxmed.evaluation.submissions import find_kind, open_truth, read_predictions
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.types import UserError, count_of


def evaluate_predictions(
    predictions: str | Path,
    truth: str | Path,
    *,
    output: str | Path,
    part: str = "all",
    masks: str = "semantic",
    nsd_tolerance: float = 1.0,
    subgroups: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score masks, boxes or probabilities in files, as a run is evaluated.

    Args:
        predictions: a folder of masks, a .json of COCO results, or a predictions.csv; or the folder
            that holds one of the latter.
        truth: the data set; of masks perhaps only a folder of them.
        output: folder for summary.json, cases.csv, rows.npz and figures, as of an evaluation.
        part: "train", "val" or "test" of the parts that the truth names, or "all".
        masks: "semantic" or "instance".
        nsd_tolerance: mm.
        subgroups: columns of the truth's manifest.csv.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        the content of summary.json.

    Raises:
        UserError: where files cannot be read, or predictions and truth do not fit.
    """
    kind, path = find_kind(Path(predictions).expanduser())
    source = open_truth(Path(truth).expanduser(), kind, masks=masks)
    rows = list(range(len(source))) if part == "all" else list(source.parts.get(part, ()))
    if not rows:
        named = ", ".join(source.parts) or "none"
        raise UserError(f"--split={part}: the truth has no such part (there is: {named})")
    columns = read_subgroups(source, subgroups, path=truth)
    score, notes = read_predictions(path, source, rows)
    notes = [*source.notes, *notes]
    for note in notes:
        print(f"note: {note}")
    output = Path(output)
    make_folder(output)
    task = make_scorer(source.info, nsd_tolerance=nsd_tolerance)
    scores = {row: score(row, task) for row in rows}
    described, limits = describe_set(
        task,
        source.info,
        scores,
        patients=source.patients,
        subgroups=columns,
        resamples=resamples,
        seed=seed,
    )
    summary = {
        **described,
        "scoring": scoring_of(task),
        "part": part,
        "predictions": str(predictions),
        "data_path": str(truth),
        "data_sha256": digest(source),
        "notes": notes + limits,
    }
    write_set(output, source.ids, scores, summary, task=task, patients=source.patients, folds={})
    print_summary(summary, title=f"{part}: {count_of(len(scores), 'case')} of {source.info.name}")
    for note in limits:
        print(f"note: {note}")
    draw_curves(source.info, scores, output, patients=source.patients)
    print(f"written: {output / 'summary.json'}, cases.csv and figures")
    return summary
