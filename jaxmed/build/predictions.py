"""Predict image files with a trained run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.decisions import read_decisions, use_decisions
from jaxmed.build.explained import restore_map
from jaxmed.build.familiarity import read_familiarity
from jaxmed.build.large import is_large, predict_large
from jaxmed.build.prediction_files import check_apart, claim, find_inputs
from jaxmed.build.trained import TrainedRun, check_image, load_run
from jaxmed.data.formats.dicom_seg import check_available
from jaxmed.data.images import Image, image_stem, read_image, write_image
from jaxmed.data.looks import FEWEST_VALUES, different_values
from jaxmed.data.sources.base import make_example
from jaxmed.data.sources.findings import first_of, some
from jaxmed.evaluation.box_decisions import BoxDecisions
from jaxmed.evaluation.decisions import ClassDecisions, LabelDecisions
from jaxmed.evaluation.pictures import draw_overlay
from jaxmed.inference.predictor import Pace, check_finite
from jaxmed.inference.uncertainty import split_uncertainty
from jaxmed.inference.writers import BoxWriter, FileTable, MaskWriter, ProbabilityWriter
from jaxmed.training.processes import gather_json, share_of
from jaxmed.types import Example, UserError, count_of

SPACING_APART = 1.2
"""Times by which a side of a voxel may be longer or shorter than those of training."""

TABLES = {
    "classification": "predictions.csv",
    "detection": "familiarity.csv",
    "segmentation": "familiarity.csv",
}
"""What has a line a file, by task."""


def predict_run(
    workdir: str | Path,
    inputs: Sequence[str],
    *,
    output: str | Path,
    overlay: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    config: ConfigDict | None = None,
) -> None:
    """Predict files and folders, and write what the task gives to `output`.

    Args:
        workdir: of the run.
        inputs: image files, DICOM series folders, or folders of images.
        output: folder; a mask has the name that its image has below the folder given.
        overlay: also write pictures to look at, to `output`/overlays.
        probabilities: of a segmentation, also write the probability of every class at every voxel,
            to `output`/probabilities.
        uncertainty: also write how unsure predictions are: of a segmentation the entropy at every
            voxel to `output`/entropy, and what of it samples of the network disagree on to
            `output`/mutual_information, where there are several; of a classification as columns.
        config: the run's, with overrides.

    Pictures of more than `jaxmed.build.large.LARGE` pixels are predicted part by part, after the
    others, and have no overlay and no maps.

    A file that cannot be read or predicted stops nothing: it is told at once and once more at the
    end, as is what readers left out, assumed or converted.

    Raises:
        UserError: where an input is missing, or masks would lie among the images; after all else,
            where a file is broken or of other dimensions than the network's.
    """
    files = find_inputs(inputs, output=Path(output))
    run = load_run(workdir, config)
    if probabilities and run.info.task != "segmentation":
        raise UserError(
            f"--probabilities is for segmentations; those of a {run.info.task} are always written"
        )
    if uncertainty and run.info.task == "detection":
        raise UserError(
            "--uncertainty is not for boxes; how often boxes of a score are right is what "
            "evaluate.py --split=val finds out"
        )
    predict = run.predict_with(run.chosen, uncertain=True) if uncertainty else run.predict
    # Large pictures are always predicted by the run's own.
    predict.watch = run.predict.watch = Pace()
    output = Path(output)
    if run.info.task == "segmentation":
        check_apart(files, output)
    origin = {"trained_on": run.info.name, "step": run.step, "parameters_sha256": run.sha256}
    claim(output, origin)
    table = FileTable(output / TABLES[run.info.task])
    writer = _make_writer(Path(workdir), run, output, table)
    judge = read_familiarity(Path(workdir), run)
    images: dict[int, Image] = {}
    large: list[int] = []
    failures: list[str] = []
    noted: dict[str, list[str]] = {}  # names of the files, by what their readers noted

    def failed(index: int, error: UserError) -> None:
        path, told = str(files[index][1]), str(error)
        failures.append(told if path in told else f"{path}: {told}")
        print(f"not predicted: {failures[-1]}", file=sys.stderr)

    def examples() -> Iterator[Example]:
        for index in share_of(range(len(files))):
            path = files[index][1]
            try:
                if is_large(path, run):
                    large.append(index)
                    continue
                image = read_image(path)
                for note in image.notes:
                    noted.setdefault(note, []).append(files[index][0])
                example = make_example(image.array, index=index, spacing=image.spacing)
                _check(path, example, run)
                if run.info.task == "segmentation" and image.kind == "dicom":
                    check_available(path)  # before the work
                prepared = run.experiment.prepare(example)
            except UserError as error:
                failed(index, error)
                continue
            images[index] = image
            yield prepared

    given, distances = examples(), None
    if judge:  # a copy that nobody reads would keep every image
        given, judged = itertools.tee(given)
        distances = judge.distances(judged)
    try:
        for example, found in predict(given):
            raw = found[..., :-1] if uncertainty else found
            distance = next(distances)[1] if distances else None
            index = int(example["index"])
            name, image = files[index][0], images.pop(index)
            try:
                check_finite(found)
                prediction = run.experiment.task.restore(raw, example)
                if probabilities:
                    classes = run.experiment.task.restore_probabilities(raw, example)
                    write_image(output / "probabilities" / name, classes, image)
                told, unlike = writer.add(index, name, image, prediction), ""
                print(f"{name}: {told}")
                if uncertainty:
                    _write_uncertainty(found, index, name, image, example, run, output, table)
                if judge and distance is not None:
                    unlike = judge.note(name, distance)
                    columns = {"distance": f"{distance:.4g}", "unfamiliar": "yes" if unlike else ""}
                    table.add(index, name, columns)
                    if unlike:
                        print(unlike)
            except UserError as error:
                failed(index, error)
                continue
            if overlay:
                title = told if run.info.task == "classification" else ""
                _draw(
                    output / "overlays" / _overlay_name(name),
                    image,
                    prediction,
                    run,
                    title=title,
                    warning="unlike the training images" if unlike else "",
                )
        for index in large:
            name, path = files[index]
            try:
                told, notes = predict_large(path, index, name, run, writer)
                print(f"{name}: {told}")
                for note in notes:
                    noted.setdefault(note, []).append(name)
            except UserError as error:
                failed(index, error)
                continue
            if overlay or probabilities or uncertainty:
                print(f"note: {name} is too large for overlays and maps beside its prediction")
    finally:
        # Whatever goes wrong must not lose what was predicted before it.
        written = writer.close()
        table.close()
    for note, names in noted.items():
        print(f"note: {note}: {count_of(len(names), 'file')}, {some(names)}")
    failures = gather_json(failures)
    if len(failures) < len(files):
        print(f"{count_of(len(files) - len(failures), 'image')} -> {written}")
    if failures:
        told = f"{len(failures)} of {count_of(len(files), 'file')} could not be predicted"
        raise UserError("\n".join([told, *first_of(failures)]))


def _write_uncertainty(
    found: np.ndarray,
    index: int,
    name: str,
    image: Image,
    example: Example,
    run: TrainedRun,
    output: Path,
    table: FileTable,
) -> None:
    """Entropy and mutual information of one file: as columns, or as maps of a segmentation."""
    settings = run.experiment.config.evaluation
    several = len(run.chosen) > 1 or settings.flips or settings.dropout_samples > 1
    _, total, information = split_uncertainty(found, multilabel=run.info.multilabel)
    parts = {"entropy": total} | ({"mutual_information": information} if several else {})
    for quantity, values in parts.items():
        if run.info.task == "classification":
            table.add(index, name, {quantity: f"{values.item():.6f}"})
        else:
            restored = restore_map(np.asarray(values, np.float32), example)
            write_image(output / quantity / name, restored[..., None], image)


def _overlay_name(name: str) -> str:
    """A PNG for every name; as inputs may differ in the folder or stem alone, these stay."""
    return str(Path(name).with_name(image_stem(name) + ".png"))


def _draw(
    path: Path, image: Image, prediction: Any, run: TrainedRun, *, title: str, warning: str
) -> None:
    shown = drawn_prediction(prediction, run) | ({"title": title} if title else {})
    names = run.info.class_names
    draw_overlay(
        path,
        image.array,
        spacing=image.spacing,
        class_names=names,
        warning=warning,
        **shown,
    )


def _check(path: Path, example: Example, run: TrainedRun) -> None:
    ndim, trained = example["image"].ndim - 1, run.info.ndim
    if ndim != trained:
        raise UserError(f"{path}: has {ndim} dimensions; the network was trained on {trained}")
    check_image(run, example["image"], str(path))
    if ndim == 3 and 1 in example["image"].shape[:-1]:
        print(f"note: {path} is one slice, which a network of volumes sees nothing around")
    if told := _spacing_apart(example, run):
        print(f"note: {path} {told}")
    values = different_values(example["image"])
    if values < FEWEST_VALUES:
        told = f"{values} different values: is it a mask?" if values > 1 else "one value"
        print(f"note: {path} has only {told}")


def _spacing_apart(example: Example, run: TrainedRun) -> str:
    """What to say where a run that resamples nothing gets voxels of another size; "" elsewhere.

    Of pictures most files state no size, and theirs is 1.
    """
    trained = run.run["data"].get("spacing")  # runs of before it was noted have none
    if not trained or run.experiment.config.data.spacing or run.info.task != "segmentation":
        return ""
    own, wanted = np.asarray(example["spacing"]), np.asarray(trained)
    unstated = run.info.ndim == 2 and ((own == 1).all() or (wanted == 1).all())
    if unstated or np.abs(np.log(own / wanted)).max() < np.log(SPACING_APART):
        return ""
    found, usual = (" x ".join(f"{mm:g}" for mm in spacing) for spacing in (own, wanted))
    return (
        f"has voxels of {found} mm, most training images of {usual} mm, and the run resamples "
        "nothing (data.spacing): its mask may be wrong"
    )


def _make_writer(workdir: Path, run: TrainedRun, output: Path, table: FileTable) -> Any:
    info = run.info
    fixed, _ = read_decisions(workdir, run)
    if info.task == "classification":
        decide = fixed.decide if isinstance(fixed, ClassDecisions | LabelDecisions) else None
        return ProbabilityWriter(table, info.class_names, multilabel=info.multilabel, decide=decide)
    if info.task == "detection":
        use_decisions(run, fixed)
        threshold = run.experiment.task.score_threshold
        right = fixed.probability if isinstance(fixed, BoxDecisions) else None
        return BoxWriter(output, info.class_names, score_threshold=threshold, probability=right)
    return MaskWriter(output, info.class_names, instances=info.instances)


def drawn_prediction(prediction: Any, run: TrainedRun) -> dict[str, Any]:
    """A prediction as the arguments of a picture, without boxes scored below the threshold."""
    info = run.info
    if info.task == "segmentation":
        return {"mask": prediction}
    if info.task == "detection":
        sure = prediction["scores"] >= run.experiment.task.score_threshold
        return {
            "boxes": prediction["boxes"][sure],
            "labels": prediction["labels"][sure],
            "scores": prediction["scores"][sure],
        }
    best = int(prediction.argmax())
    return {"title": f"{info.class_names[best]} {prediction[best]:.3f}"}
