"""Features of all cases of a run as a table, with what is alike in them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.special

from jaxmed.build.config import write_json
from jaxmed.build.explained import RunToExplain
from jaxmed.build.features import FeatureReader
from jaxmed.build.members import rows_of
from jaxmed.build.workdir import read_split
from jaxmed.data.splits import k_folds
from jaxmed.evaluation.bootstrap import Interval
from jaxmed.evaluation.decisions import FOLDS
from jaxmed.evaluation.evaluate import summarize_cases
from jaxmed.evaluation.laplace import LastLayer
from jaxmed.explanation.features import (
    linear_probe,
    nearest_cases,
    principal_components,
)
from jaxmed.explanation.layers import default_layer
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
    known = check_parts(explained, source, workdir, part)
    parts = list(dict.fromkeys(["train", part]))
    read = FeatureReader(explained)
    layer = read.layer
    rows: dict[str, Sequence[int]] = {name: known[name] for name in parts}
    cases = _Cases(explained, source, output, rows)
    for name in parts:
        cases.read(read, name)
    cases.write_table()
    found = cases.found
    places, variance = principal_components(found["train"], *[found[p] for p in parts[1:]])
    draw_places(
        output / "pca.png",
        dict(zip(parts, places, strict=True)),
        cases.labels,
        class_names=explained.classes,
        variance=variance,
    )
    told = f"features: {found['train'].shape[1]} of layer {layer.name}"
    print(f"{told}, {sum(map(len, rows.values()))} cases -> {output / 'features.csv'}")
    if part == "train":
        return
    cases.write_neighbours(part, shown=shown)
    if cases.labels["train"] and not explained.run.info.multilabel:
        cases.write_probe(part, layer=layer.name)
        if layer == default_layer(explained.layers):  # what the last dense layer is given
            if part != "val" and known["val"]:
                cases.rows["val"] = known["val"]
                cases.read(read, "val")
            if "val" in found:
                cases.write_laplace(part)
    else:
        print("note: no linear probe, for the cases have no single label")


def check_parts(
    explained: RunToExplain, source: Source, workdir: Path, part: str
) -> dict[str, list[int]]:
    """Rows of train, val and `part`; of folds, of that of the model that is explained.

    Raises:
        UserError: the data are not the run's, or lack train or `part`.
    """
    run, split = explained.run, read_split(workdir, source)
    fold = run.experiment.members[run.chosen[0]].fold if run.chosen else None
    known = {name: rows_of(split, name, fold) for name in ("train", "val", part)}
    for name in ("train", part):
        if not known[name]:
            raise UserError(f"--features: the run has no {name} part")
    return known


@dataclasses.dataclass
class _Cases:
    """Cases of some parts of a run, and what is written of their features.

    Attributes:
        explained: the run.
        source: of the cases.
        output: folder to write to.
        rows: of each part.
        found: features (cases, channels) of each part that was read.
        labels: likewise the class of each case, empty where they have none.
    """

    explained: RunToExplain
    source: Source
    output: Path
    rows: dict[str, Sequence[int]]
    found: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    labels: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def read(self, read: FeatureReader, part: str) -> None:
        """Read the features of a part, and the labels of its cases."""
        prepare = self.explained.run.experiment.prepare
        found: list[np.ndarray] = []
        labels: list[int] = []
        for example, values in read(prepare(self.source[row]) for row in self.rows[part]):
            found.append(values)
            if "label" in example and example["label"].ndim == 0:
                labels.append(int(example["label"]))
        self.found[part], self.labels[part] = np.stack(found), labels

    def name_of(self, part: str, place: int) -> str:
        """The class of a case of a part, "" where there is none."""
        return self.explained.classes[self.labels[part][place]] if self.labels[part] else ""

    def write_table(self) -> None:
        """features.csv: a line a case."""
        with (self.output / "features.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            count = self.found["train"].shape[1]
            writer.writerow(["id", "part", "label", *(f"feature{i}" for i in range(count))])
            for part, own in self.rows.items():
                for place, row in enumerate(own):
                    values = (f"{x:.6g}" for x in self.found[part][place])
                    about = [self.source.ids[row], part, self.name_of(part, place)]
                    writer.writerow([*about, *values])

    def write_neighbours(self, part: str, *, shown: int) -> None:
        """For each case of the part the cases of train that it looks like."""
        train, ids = self.rows["train"], self.source.ids
        nearest = nearest_cases(self.found["train"], self.found[part], count=_NEIGHBOURS)
        near, distances = (values.tolist() for values in nearest)
        with (self.output / "neighbours.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "label", "rank", "train_id", "train_label", "distance"])
            for place, row in enumerate(self.rows[part]):
                pairs = zip(near[place], distances[place], strict=True)
                for rank, (other, away) in enumerate(pairs, start=1):
                    about = [ids[row], self.name_of(part, place), rank]
                    known = [ids[train[other]], self.name_of("train", other)]
                    writer.writerow([*about, *known, f"{away:.6g}"])
        pictures = []
        for place, row in enumerate(self.rows[part][:shown]):
            line = [(self.source[row]["image"], f"{ids[row]} {self.name_of(part, place)}")]
            for other, away in zip(near[place], distances[place], strict=True):
                image = self.source[train[other]]["image"]
                line.append((image, f"train {self.name_of('train', other)} at {away:.2f}"))
            pictures.append(line)
        draw_neighbours(self.output / "neighbours.png", pictures, width=_NEIGHBOURS + 1)

    def write_probe(self, part: str, *, layer: str) -> None:
        """probe.json: scores of a linear probe."""
        if len(set(self.labels["train"])) < 2:
            print("note: no linear probe, for the training cases are all of one class")
            return
        probabilities = linear_probe(
            self.found["train"],
            self.labels["train"],
            self.found[part],
            classes=len(self.explained.classes),
        )
        metrics = self._scores_of(part, probabilities)
        write_json(self.output / "probe.json", {"part": part, "layer": layer, "metrics": metrics})
        told = _tell(self.explained.task.main_score, metrics)
        print(f"linear probe on {layer}: {told}, {len(self.rows[part])} cases of {part}")

    def write_laplace(self, part: str) -> None:
        """laplace.json: scores of the network's own probabilities, and averaged over its head."""
        found, head = self.found, self.explained.variables["params"].get("head")
        if head is None or "kernel" not in head or len(head["kernel"]) != found["train"].shape[1]:
            return  # the features are not what a last dense layer is given
        kernel, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))
        logits = {name: features @ kernel + bias for name, features in found.items()}
        untuned = LastLayer.of(found["train"], logits["train"])
        labels = np.asarray(self.labels["val"])
        layer = untuned.tune(found["val"], logits["val"], labels)
        said = layer.predict(found[part], logits[part])
        if part == "val":  # each fifth by the precision that the others choose
            patients = self.source.patients
            own_patients = None if patients is None else [patients[row] for row in self.rows[part]]
            ids = [str(row) for row in self.rows[part]]
            try:
                folds = k_folds(ids, patients=own_patients, folds=FOLDS, seed=0)
            except UserError:
                return
            for own, held in folds:
                tuned = untuned.tune(found["val"][own], logits["val"][own], labels[own])
                said[held] = tuned.predict(found["val"][held], logits["val"][held])
        before = self._scores_of(part, scipy.special.softmax(logits[part], axis=1))
        after = self._scores_of(part, said)
        written = {
            "part": part,
            "prior_precision": layer.prior_precision,
            "chosen_on": "val",
            "judged": "by cross-fitting" if part == "val" else "here",
            "as_said": before,
            "laplace": after,
        }
        write_json(self.output / "laplace.json", written)
        told = f"{_tell('brier', after)}; as the network says {_tell('brier', before)}"
        print(f"last-layer Laplace: {told}, {len(self.rows[part])} cases of {part}")

    def _scores_of(self, part: str, probabilities: np.ndarray) -> dict[str, Interval]:
        """Scores of probabilities of a part's cases, as those of the run itself are computed."""
        task, config = self.explained.task, self.explained.run.experiment.config
        triples = zip(self.rows[part], probabilities, self.labels[part], strict=True)
        scores = {
            row: task.score(said, {"label": np.asarray(label)}) for row, said, label in triples
        }
        return summarize_cases(
            task,
            scores,
            patients=self.source.patients,
            resamples=config.evaluation.resamples,
            seed=config.seed,
        )


def _tell(name: str, metrics: Mapping[str, Interval]) -> str:
    told = metrics[name]
    low, high = told["low"], told["high"]
    interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
    value = "undefined" if told["value"] is None else f"{told['value']:.3f}"
    return f"{name} {value}{interval}"
