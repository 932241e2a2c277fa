"""Explain what a trained run says of images: maps, their checks, pictures and tables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import datasets
from jaxmed.build.config import write_json
from jaxmed.build.evaluations import find_part
from jaxmed.build.explained import DEFAULT_METHODS, Explained, RunToExplain, restore_map
from jaxmed.build.explanation_table import (
    print_summary,
    short,
    summarize_channels,
    write_table,
)
from jaxmed.build.familiarity import Judge, read_familiarity
from jaxmed.build.feature_tables import check_parts, write_features
from jaxmed.build.measured import check_column, write_importance
from jaxmed.build.members import rows_of
from jaxmed.build.prediction_files import find_inputs
from jaxmed.build.trained import TrainedRun, check_image, load_run
from jaxmed.build.workdir import make_folder, read_split
from jaxmed.data.images import Image, image_stem, read_image, write_image
from jaxmed.data.sources.base import FileSource, make_example
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.explanation import faithfulness
from jaxmed.explanation.explainer import BASELINES, METHODS, check_map, random_areas
from jaxmed.explanation.measurements import measure
from jaxmed.explanation.pictures import draw_attributions
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.types import Example, Source, UserError, count_of

MARGIN = 0.05
"""Of the shortest side: what is this near to a lesion counts as on it, for edges are evidence."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A case to explain.

    Attributes:
        name: of its files below the output folder.
        example: as its source or file gives it.
        image: with the geometry that maps are written in.
        cause: (*spatial) bool: what is known to make its label, or None.
    """

    name: str
    example: Example
    image: Image
    cause: np.ndarray | None = None


def explain_run(
    workdir: str | Path,
    inputs: Sequence[str] = (),
    *,
    output: str | Path,
    methods: Sequence[str] = (),
    target: str = "",
    layer: str = "",
    baseline: str = "blurred",
    part: str = "val",
    cases: int = 4,
    features: bool = False,
    importance: str = "",
    config: ConfigDict | None = None,
) -> list[dict[str, Any]]:
    """Write maps, pictures and checks of what the run says of some cases.

    Args:
        workdir: of the run.
        inputs: image files or folders; without any, the first cases of `part`.
        output: folder to write to.
        methods: of `jaxmed.explanation.explainer.METHODS`; without any, `DEFAULT_METHODS`.
        target: name of a class; "" takes what the network sees most of.
        layer: of Grad-CAM and of features; "" takes the default.
        baseline: key of `jaxmed.explanation.explainer.BASELINES`.
        part: of the run's split.
        cases: how many of it.
        features: also write tables and pictures of features of all cases of train and `part`.
        importance: of a segmentation, a column of the data's manifest: also measure what is
            segmented in all cases of `part`, and how much each measurement tells of the column.
        config: the run's, with overrides.

    Returns:
        what is in attributions.json.

    Raises:
        UserError: for a mistake in the arguments; after all else, for files that are broken.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--method={method}: no such method; there are {', '.join(METHODS)}")
    if baseline not in BASELINES:
        raise UserError(f"--baseline={baseline}: expected one of {', '.join(BASELINES)}")
    if cases < 1 and not inputs:
        raise UserError(f"--cases={cases}: expected at least 1")
    workdir, output = Path(workdir), Path(output)
    run = load_run(workdir, config)
    explained = RunToExplain(run, layer=layer)
    methods = methods or DEFAULT_METHODS[run.info.task]
    label = explained.label_of(target)
    if run.info.task == "segmentation" and label == 0:
        raise UserError(f"--target={target}: is the background; choose another class")
    own_data = features or importance or not inputs
    source = datasets.make_source(run.experiment.config) if own_data else None
    column = check_column(run, source, importance) if importance and source else []
    if features and source:
        check_parts(explained, source, workdir, part)
    judge = read_familiarity(workdir, run)
    make_folder(output)
    _tell(explained, methods, baseline)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    if inputs:
        found = _read_files(inputs, explained, output, failures)
    else:
        assert source is not None
        found = _read_part(run, source, workdir, part, cases)
    for case in found:
        try:
            rows += _explain_case(case, explained, label, methods, baseline, output, judge)
        except UserError as error:
            told = str(error)
            failures.append(told if case.name in told else f"{case.name}: {told}")
            print(f"not explained: {failures[-1]}")
    channels = summarize_channels(rows)
    write_json(output / "attributions.json", {"step": run.step, "channels": channels, "maps": rows})
    write_table(output / "attributions.csv", rows)
    print_summary(rows, methods, channels)
    if features:
        assert source is not None
        write_features(explained, source, workdir, part, output, shown=cases)
    if importance:
        assert source is not None
        measured = _rows_of(run, source, workdir, part)
        write_importance(explained.alone, source, measured, column, importance, output)
    print(f"{count_of(len({row['case'] for row in rows}), 'case')} explained -> {output}")
    if failures:
        raise UserError("\n".join([f"{count_of(len(failures), 'case')} not explained", *failures]))
    return rows


def _tell(explained: RunToExplain, methods: Sequence[str], baseline: str) -> None:
    if explained.run.chosen:
        name = explained.run.experiment.members[explained.run.chosen[0]].name
        print(f"note: of several models the first is explained ({name})")
    said = {"blurred": "the image blurred", "dark": "the least value of each channel"}[baseline]
    print(f"methods: {', '.join(methods)}; in place of what is taken away: {said}")


def _read_files(
    inputs: Sequence[str], explained: RunToExplain, output: Path, failures: list[str]
) -> Iterator[Case]:
    run = explained.run
    for name, path in find_inputs(inputs, output=output):
        try:
            image = read_image(path)
            if image.array.ndim - 1 != run.info.ndim:
                raise UserError(
                    f"{path}: has {image.array.ndim - 1} dimensions; the network was trained on "
                    f"{run.info.ndim}"
                )
            check_image(run, image.array, str(path))
        except UserError as error:
            failures.append(str(error))
            print(f"not explained: {error}")
            continue
        yield Case(name, make_example(image.array, index=0, spacing=image.spacing), image)


def _read_part(
    run: TrainedRun, source: Source, workdir: Path, part: str, cases: int
) -> Iterator[Case]:
    for row in _rows_of(run, source, workdir, part)[:cases]:
        example = source[row]
        cause = source.cause(row) if isinstance(source, Phantoms) else None
        yield Case(source.ids[row], example, _image_of(source, row, example), cause)


def _rows_of(run: TrainedRun, source: Source, workdir: Path, part: str) -> list[int]:
    """Rows of a part; of folds, of that of the model that is explained."""
    is_own = digest(source) == run.run["data"]["sha256"]
    rows, _ = find_part(workdir, source, part, is_own=is_own)
    fold = run.experiment.members[run.chosen[0]].fold if run.chosen else None
    if is_own and fold is not None:
        return rows_of(read_split(workdir, source), part, fold)
    return rows


def _image_of(source: Source, row: int, example: Example) -> Image:
    """The image with its geometry: of its file, or where it has none of its spacing."""
    if isinstance(source, FileSource) and len(source.cases[row].images) == 1:
        return read_image(source.cases[row].images[0])
    affine = None
    if example["image"].ndim == 4:
        affine = np.diag([*example["spacing"].astype(np.float64), 1.0])
    # Written as what came of a format that cannot hold it: NIfTI, or TIFF of two dimensions.
    return Image(example["image"], example["spacing"], affine, "dicom", None, Path(os.devnull))


def _explain_case(
    case: Case,
    explained: RunToExplain,
    label: int | None,
    methods: Sequence[str],
    baseline: str,
    output: Path,
    judge: Judge | None,
) -> list[dict[str, Any]]:
    """Explain one case; the rows of its methods."""
    prepared = explained.run.experiment.prepare(
        {k: v for k, v in case.example.items() if k not in ("mask", "boxes", "box_label")}
    )
    unlike = {} if judge is None else _judge(case.name, prepared, judge)
    chosen = explained.explain(prepared, label)
    explainer = explained.explainer(chosen)
    blank = BASELINES[baseline](chosen.image)
    variables = explained.variables
    areas = random_areas(explainer, variables, chosen.image, blank, chosen.what)
    rows, maps, notes = [], {}, {}
    for method in methods:
        found, facts = explainer.attribute(method, variables, chosen.image, blank, chosen.what)
        checks = check_map(
            explainer,
            method,
            found,
            facts,
            variables=variables,
            random=explained.random,
            image=chosen.image,
            baseline=blank,
            what=chosen.what,
            areas=areas,
        )
        shown = restore_map(found, chosen.example)
        checks |= _on_region(shown, case, chosen)
        if checks.get("share", 1.0) <= checks.get("region", 0.0):
            checks["failures"].append(f"no more on the {checks['share_of']} than an even map")
        write_image(output / "maps" / method / case.name, shown[..., None], case.image)
        maps[method] = shown
        notes[method] = short(checks)
        layer = explainer.layer.name if "cam" in method else ""
        about = {"case": case.name, "method": method, "target": chosen.told, "layer": layer}
        rows.append({**about, "score": chosen.score, "baseline": baseline, **checks})
        print(f"{case.name}: {method}: {notes[method]}")
    extra = unlike | _more(case, chosen, explained, blank)
    for row in rows:
        row.update(extra)
    draw_attributions(
        output / "pictures" / Path(case.name).with_name(image_stem(case.name) + ".png"),
        case.example["image"],
        maps,
        title=f"{case.name}   target: {chosen.told}, score {chosen.score:.3f}",
        notes=notes,
        region=chosen.region if chosen.region is not None else case.cause,
        spacing=case.example["spacing"],
    )
    return rows


def _on_region(shown: np.ndarray, case: Case, chosen: Explained) -> dict[str, Any]:
    """The share of a map on what is known to be the cause, or else on what is explained."""
    region = case.cause if case.cause is not None else chosen.region
    if region is None or not region.any():
        return {}
    margin = MARGIN * min(region.shape)
    found = faithfulness.share_on(shown, faithfulness.dilate(region, margin=margin))
    of = "cause" if case.cause is not None else "target"
    return {"share": found["share"], "pointing": found["pointing"]} | {
        "share_of": of,
        "margin_voxels": margin,
        "region": found["region"],
    }


def _judge(name: str, prepared: Example, judge: Judge) -> dict[str, Any]:
    """Whether a case is unlike the training images, which is told."""
    [(_, distance)] = judge.distances([prepared])
    if note := judge.note(name, distance):
        print(note)
    return {"distance": distance, "unfamiliar": bool(note)}


def _more(
    case: Case, chosen: Explained, explained: RunToExplain, blank: np.ndarray
) -> dict[str, Any]:
    """Importance of the channels, and measurements of what was segmented."""
    channels = chosen.image.shape[-1]
    extra: dict[str, Any] = {}
    if channels > 1:
        values = explained.explainer(chosen).channels(
            explained.variables, chosen.image, blank, chosen.what
        )
        extra = {f"channel/{i}": float(value) for i, value in enumerate(values)}
    if chosen.region is not None and explained.run.info.task == "segmentation":
        found = measure(
            chosen.region.astype(np.int32),
            case.example["image"],
            spacing=case.example["spacing"],
        )
        extra |= {f"measured/{k}": v for row in found for k, v in row.items() if k != "label"}
    return extra
