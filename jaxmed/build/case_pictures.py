"""Pictures of the worst, typical and best cases of an evaluation, and what the network saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.ensembles import Group
from jaxmed.build.explained import DEFAULT_METHODS, RunToExplain, restore_map
from jaxmed.build.predictions import drawn_prediction
from jaxmed.build.trained import TrainedRun
from jaxmed.evaluation import pictures
from jaxmed.evaluation.evaluate import predict_cases
from jaxmed.evaluation.report_parts.blocks import Picture
from jaxmed.evaluation.report_parts.cases import picture_block, picture_limit
from jaxmed.evaluation.report_parts.slices import make_slices, plain_picture
from jaxmed.explanation.explainer import METHODS
from jaxmed.explanation.faithfulness import ALIKE, compare_maps
from jaxmed.explanation.pictures import blend_attribution
from jaxmed.inference.uncertainty import entropy
from jaxmed.types import Example, Source, UserError

PICTURES_A_GROUP = 3


def draw_cases(
    run: TrainedRun,
    source: Source,
    groups: Sequence[Group],
    described: Mapping[int, Mapping[str, Any]],
    folder: Path,
) -> dict[str, list[dict[str, Any]]]:
    """Pictures of chosen cases, each predicted once more and drawn beside its truth.

    Args:
        run: trained.
        source: of the cases.
        groups: who predicts which rows.
        described: what cases.csv tells of each row.
        folder: for the pictures.

    Returns:
        cases for `write_report`.
    """
    cases = choose_cases(described)
    wanted = {row for group in cases.values() for row in group}
    task, prepare = run.experiment.task, run.experiment.prepare
    explained = RunToExplain(run) if run.experiment.config.evaluation.explain and wanted else None
    folder.mkdir(exist_ok=True)
    dense = run.info.task == "segmentation"

    def restore(raw: Any, example: Example) -> tuple[Any, np.ndarray | None]:
        unsure = restore_map(entropy(np.asarray(raw, np.float32)), example) if dense else None
        return task.restore(raw, example), unsure

    drawn: dict[int, dict[str, Any]] = {}
    for rows, members in groups:
        own = [row for row in rows if row in wanted]
        judge = explained and explained.of_member(members[0] if members else None)
        predicted = predict_cases(
            run.predict_with(members), task, source, own, prepare=prepare, restore=restore
        )
        for row, example, (prediction, unsure) in predicted:
            name = next(g for g, rows in cases.items() if row in rows)
            path = folder / f"{name}_{cases[name].index(row)}.png"
            told = described[row]
            alt, limit = f"{name} case {source.ids[row]}", picture_limit(4 * len(wanted))
            shown = _draw_case(run, path, example, prediction, alt=alt, limit=limit)
            if unsure is not None:
                shown.append(_draw_entropy(unsure, example, prediction, alt=alt, limit=limit))
            scores = {k: v for k, v in told.items() if k != "score"}
            if judge:
                try:
                    shown.append(_explain(judge, example, alt=alt, limit=limit))
                except UserError as error:
                    scores["explanation"] = f"none, {error}"
            drawn[row] = {"id": source.ids[row], "score": told["score"], "told": scores}
            drawn[row]["pictures"] = shown
    return {name: [drawn[row] for row in group] for name, group in cases.items()}


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


def _draw_case(
    run: TrainedRun, path: Path, example: Example, prediction: Any, *, alt: str, limit: int
) -> list[Any]:
    """Truth and prediction of one case, of a volume in all its slices."""
    what, names = pictures_of(run, example, prediction), run.info.class_names
    pictures.draw_overlay(path, example["image"], **what, class_names=names)
    entry: dict[str, Any] = {"picture": path, "caption": what.get("title", "")}
    if run.info.task != "classification":
        entry["caption"] = what.get("title") or "truth dashed, prediction solid"
    if run.info.ndim == 3:
        slices = make_slices(
            example["image"],
            **what,
            spacing=example.get("spacing"),
            class_names=names,
            alt=alt,
            limit=limit,
        )
        return [dataclasses.replace(slices, still=picture_block(entry, alt=alt))]
    if run.info.task == "classification":
        return [entry]
    return [plain_picture(example["image"], alt=f"{alt}: image", limit=limit), entry]


def _draw_entropy(
    unsure: np.ndarray, example: Example, mask: np.ndarray, *, alt: str, limit: int
) -> Picture:
    """Where a segmentation was unsure."""
    pixels, view = blend_attribution(example["image"], unsure, mask > 0)
    aspect = view.aspect(example.get("spacing"))
    shown = plain_picture(pixels, alt=f"{alt}: uncertainty", limit=limit, aspect=aspect)
    return dataclasses.replace(shown, caption="entropy: the more orange, the less sure")


def _explain(explained: RunToExplain, example: Example, *, alt: str, limit: int) -> Picture:
    """What counted for what the network sees in a case, and whether random weights say the same.

    Raises:
        UserError: the network sees nothing in it.
    """
    run = explained.run
    prepared = run.experiment.prepare(
        {k: v for k, v in example.items() if k not in ("mask", "boxes", "box_label")}
    )
    chosen = explained.explain(prepared, None)
    method, explainer = DEFAULT_METHODS[run.info.task][0], explained.explainer(chosen)
    maps = [
        explainer.attribute(method, weights, chosen.image, chosen.image, chosen.what)[0]
        for weights in (explained.variables, explained.random)
    ]
    compared = compare_maps(*maps)
    said = "not compared with random weights, whose map is even"
    if "correlation" in compared:
        alike = compared["correlation"]
        said = f"rank correlation with random weights {alike:.2f}"
        said += "; it fails: this is no explanation" if abs(alike) > ALIKE else ""
    if not (maps[0] > 0).any():
        said = "it fails: nothing in it speaks for it"
    found = restore_map(maps[0], chosen.example)
    pixels, view = blend_attribution(example["image"], found, chosen.region)
    spacing = example.get("spacing")
    name = METHODS[method]
    shown = plain_picture(pixels, alt=f"{alt}: {name}", limit=limit, aspect=view.aspect(spacing))
    caption = f"{name} of {chosen.told}: orange speaks for it, blue against it; {said}"
    return dataclasses.replace(shown, caption=caption)


def pictures_of(run: TrainedRun, example: Example, prediction: Any) -> dict[str, Any]:
    """Prediction and truth of a case as the arguments of a picture."""
    shown = drawn_prediction(prediction, run)
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
