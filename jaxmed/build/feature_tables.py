"""Features of all cases of a run as a table, with what is alike in them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.special

from jaxmed.build.config import write_json
from jaxmed.build.explained import RunToExplain
from jaxmed.build.features import FeatureReader
from jaxmed.build.workdir import read_split
from jaxmed.evaluation.bootstrap import Interval
from jaxmed.evaluation.evaluate import summarize_cases
from jaxmed.evaluation.laplace import LastLayer
from jaxmed.explanation.features import (
    linear_probe,
    nearest_cases,
    principal_components,
)
from jaxmed.explanation.pictures import draw_neighbours, draw_places
from jaxmed.types import Source, UserError

_NEIGHBOURS = 3


def write_features(
    explained: RunToExplain,
    source: Source,
    workdir: Path,
    part: str,
    output: Path,
    *,
    shown: int,
) -> None:
    """Write features.csv, pca.png, neighbours.csv and .png, and of one label two more files.

    probe.json has the scores of a linear probe, laplace.json of a last-layer Laplace approximation
    (`jaxmed.evaluation.laplace`), whose prior is chosen on the validation part.

    Args:
        explained: the run.
        source: its own data.
        workdir: of the run, for its split.
        part: whose cases are compared with those of train.
        output: folder to write to.
        shown: cases of the part whose neighbours are drawn.

    Raises:
        UserError: the data are not the run's, or lack a part.
    """
    split = read_split(workdir, source)
    parts = list(dict.fromkeys(["train", part]))
    for name in parts:
        if not split.get(name):
            raise UserError(f"--features: the run has no {name} part")
    read = FeatureReader(explained)
    layer = read.layer
    rows = {name: split[name] for name in parts}
    found, labels = {}, {}
    for name, own in rows.items():
        found[name], labels[name] = _features(read, explained, source, own)
    _write_table(output / "features.csv", source, rows, found, labels, explained)
    places, variance = principal_components(found["train"], *[found[p] for p in parts[1:]])
    draw_places(
        output / "pca.png",
        dict(zip(parts, places, strict=True)),
        labels,
        class_names=explained.classes,
        variance=variance,
    )
    told = f"features: {found['train'].shape[1]} of layer {layer.name}"
    print(f"{told}, {sum(map(len, rows.values()))} cases -> {output / 'features.csv'}")
    if part == "train":
        return
    _write_neighbours(output, source, rows, found, labels, explained, part, shown)
    if labels["train"] and not explained.run.info.multilabel:
        _write_probe(output, source, rows, found, labels, explained, part, layer.name)
        if part != "val" and split.get("val"):
            found["val"], labels["val"] = _features(read, explained, source, split["val"])
        if "val" in found:
            _write_laplace(output, source, rows, found, labels, explained, part)
    else:
        print("note: no linear probe, for the cases have no single label")


def _features(
    read: FeatureReader, explained: RunToExplain, source: Source, rows: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """Features (cases, channels); and labels, if cases have one."""
    prepare = explained.run.experiment.prepare
    found, labels = [], []
    for example, values in read(prepare(source[row]) for row in rows):
        found.append(values)
        if "label" in example and example["label"].ndim == 0:
            labels.append(int(example["label"]))
    return np.stack(found), labels


def _write_table(
    path: Path,
    source: Source,
    rows: Mapping[str, Sequence[int]],
    found: dict[str, np.ndarray],
    labels: dict[str, list[int]],
    explained: RunToExplain,
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        count = next(iter(found.values())).shape[1]
        writer.writerow(["id", "part", "label", *(f"feature{i}" for i in range(count))])
        for part, own in rows.items():
            for place, row in enumerate(own):
                name = explained.classes[labels[part][place]] if labels[part] else ""
                values = (f"{x:.6g}" for x in found[part][place])
                writer.writerow([source.ids[row], part, name, *values])


def _write_neighbours(
    output: Path,
    source: Source,
    rows: Mapping[str, Sequence[int]],
    found: dict[str, np.ndarray],
    labels: dict[str, list[int]],
    explained: RunToExplain,
    part: str,
    shown: int,
) -> None:
    """For each case of the part the cases of train that it looks like."""
    found_near = nearest_cases(found["train"], found[part], count=_NEIGHBOURS)
    near, distances = (values.tolist() for values in found_near)

    def name_of(own: str, place: int) -> str:
        return explained.classes[labels[own][place]] if labels[own] else ""

    with (output / "neighbours.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "rank", "train_id", "train_label", "distance"])
        for place, row in enumerate(rows[part]):
            for rank, (other, away) in enumerate(
                zip(near[place], distances[place], strict=True), start=1
            ):
                train = source.ids[rows["train"][other]], name_of("train", other)
                writer.writerow(
                    [source.ids[row], name_of(part, place), rank, *train, f"{away:.6g}"]
                )
    pictures = []
    for place, row in enumerate(rows[part][:shown]):
        line = [(source[row]["image"], f"{source.ids[row]} {name_of(part, place)}")]
        for other, away in zip(near[place], distances[place], strict=True):
            image = source[rows["train"][other]]["image"]
            line.append((image, f"train {name_of('train', other)} at {away:.2f}"))
        pictures.append(line)
    draw_neighbours(output / "neighbours.png", pictures, width=_NEIGHBOURS + 1)


def _write_probe(
    output: Path,
    source: Source,
    rows: Mapping[str, Sequence[int]],
    found: dict[str, np.ndarray],
    labels: dict[str, list[int]],
    explained: RunToExplain,
    part: str,
    layer: str,
) -> None:
    """Scores of a linear probe, as those of the run itself are computed."""
    if len(set(labels["train"])) < 2:
        print("note: no linear probe, for the training cases are all of one class")
        return
    probabilities = linear_probe(
        found["train"], labels["train"], found[part], classes=len(explained.classes)
    )
    metrics = _scores_of(probabilities, rows[part], labels[part], explained, source)
    write_json(output / "probe.json", {"part": part, "layer": layer, "metrics": metrics})
    told = _tell(explained.task.main_score, metrics)
    print(f"linear probe on {layer}: {told}, {len(rows[part])} cases of {part}")


def _write_laplace(
    output: Path,
    source: Source,
    rows: Mapping[str, Sequence[int]],
    found: dict[str, np.ndarray],
    labels: dict[str, list[int]],
    explained: RunToExplain,
    part: str,
) -> None:
    """Scores of the network's own probabilities, and of those averaged over its last layer."""
    head = explained.variables["params"].get("head")
    if head is None or "kernel" not in head or len(head["kernel"]) != found["train"].shape[1]:
        return  # the features are not what a last dense layer is given
    kernel, bias = np.asarray(head["kernel"], np.float64), np.asarray(head["bias"], np.float64)
    logits = {name: features @ kernel + bias for name, features in found.items()}
    layer = LastLayer.of(found["train"], logits["train"])
    layer = layer.tune(found["val"], logits["val"], np.asarray(labels["val"]))
    said = scipy.special.softmax(logits[part], axis=1)
    averaged = layer.predict(found[part], logits[part])
    own = (rows[part], labels[part], explained, source)
    before, after = _scores_of(said, *own), _scores_of(averaged, *own)
    written = {
        "part": part,
        "prior_precision": layer.prior_precision,
        "chosen_on": "val",
        "as_said": before,
        "laplace": after,
    }
    write_json(output / "laplace.json", written)
    told = f"{_tell('brier', after)}; as the network says {_tell('brier', before)}"
    print(f"last-layer Laplace: {told}, {len(rows[part])} cases of {part}")


def _scores_of(
    probabilities: np.ndarray,
    rows: Sequence[int],
    labels: Sequence[int],
    explained: RunToExplain,
    source: Source,
) -> dict[str, Interval]:
    """Scores of probabilities of a part's cases, as those of the run itself are computed."""
    scores = {
        row: explained.task.score(probability, {"label": np.asarray(label)})
        for row, probability, label in zip(rows, probabilities, labels, strict=True)
    }
    config = explained.run.experiment.config
    return summarize_cases(
        explained.task,
        scores,
        patients=source.patients,
        resamples=config.evaluation.resamples,
        seed=config.seed,
    )


def _tell(name: str, metrics: Mapping[str, Interval]) -> str:
    told = metrics[name]
    low, high = told["low"], told["high"]
    interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
    value = "undefined" if told["value"] is None else f"{told['value']:.3f}"
    return f"{name} {value}{interval}"
