"""Which images are unlike those that a run was trained on: fixed by its evaluation on `val`."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.build.explained import RunToExplain
from jaxmed.build.features import FeatureReader
from jaxmed.build.members import rows_of
from jaxmed.build.trained import TrainedRun, is_of_run
from jaxmed.evaluation.bootstrap import bootstrap_weights, intervals
from jaxmed.evaluation.familiarity import FALSE_ALARMS, Familiarity
from jaxmed.evaluation.support import FEW_CASES
from jaxmed.metrics import divide
from jaxmed.training.processes import gather_rows, is_first, share_of
from jaxmed.types import Example, Source, UserError

FAMILIARITY_FILE = "familiarity.npz"
_ARRAYS = ("mean", "precision", "threshold", "layer", "cases", "parameters_sha256")


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judges prepared cases.

    Attributes:
        fixed: on the training and validation part.
        cases: of the training part, that others are compared with.
        read: features of the first of the models that predict.
    """

    fixed: Familiarity
    cases: int
    read: FeatureReader

    def distances(self, examples: Iterable[Example]) -> Iterator[tuple[Example, float]]:
        """Yield each preprocessed example with its distance, in order."""
        for example, windows in self.read.windows(examples):
            yield example, float(self.fixed.distance([windows])[0])

    def note(self, name: str, distance: float) -> str:
        """What to print of a case that is unlike the training images; "" of another."""
        if distance <= self.fixed.threshold:
            return ""
        return (
            f"note: {name} is unlike the images that the run was trained on (distance "
            f"{distance:.4g}, beyond {self.fixed.threshold:.4g})"
        )

    def told(self) -> dict[str, Any]:
        """The numbers, for summary.json."""
        return {
            "layer": self.read.layer.name,
            "training_cases": self.cases,
            "farthest": self.fixed.threshold,
            "usual": FALSE_ALARMS,
        }


def fix_familiarity(
    workdir: Path, run: TrainedRun, source: Source, split: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Fix on the run's own parts what is unfamiliar, and write it to the workdir.

    Returns:
        for summary.json; {} where a part has fewer than 20 cases.
    """
    settings = run.experiment.config
    most, rng = settings.evaluation.familiarity, np.random.default_rng(settings.seed)
    fold = run.experiment.members[run.chosen[0]].fold if run.chosen else None
    named = [rows_of(split, part, fold) for part in ("train", "val")]
    parts = [rng.permutation(rows)[:most].tolist() for rows in named]
    if not most or min(map(len, parts)) < FEW_CASES:
        return {}
    read = FeatureReader(RunToExplain(run))
    train, held_out = (list(_features(read, run, source, p).values()) for p in parts)
    judge = Judge(Familiarity.fit(train, held_out), len(train), read)
    if is_first():
        np.savez(
            workdir / FAMILIARITY_FILE,
            mean=judge.fixed.mean.astype(np.float32),
            precision=judge.fixed.precision.astype(np.float32),
            threshold=judge.fixed.threshold,
            layer=read.layer.name,
            cases=len(train),
            windows=sum(map(len, train)),
            parameters_sha256=run.sha256,
            allow_pickle=False,
        )
    return judge.told()


def apply_familiarity(
    workdir: Path, run: TrainedRun, source: Source, rows: Sequence[int]
) -> dict[str, Any]:
    """How many of other cases are unfamiliar, for summary.json; {} where nothing was fixed."""
    judge = read_familiarity(workdir, run)
    if judge is None:
        return {}
    found = _features(judge.read, run, source, rows)
    flags = judge.fixed.is_unfamiliar(list(found.values()))
    groups = None if source.patients is None else [source.patients[row] for row in found]
    settings = run.experiment.config
    weights = bootstrap_weights(
        len(found), groups=groups, resamples=settings.evaluation.resamples, seed=settings.seed
    ).astype(np.float64)
    share = {"unfamiliar": divide(weights @ flags, weights.sum(axis=1))}
    drawn = None if groups is None else len(set(groups))
    return {**judge.told(), "metrics": intervals(share, cases=len(found), groups=drawn)}


def tell_unfamiliar(familiarity: Mapping[str, Any]) -> list[str]:
    """A sentence where more cases are unfamiliar than chance would have it."""
    share = familiarity.get("metrics", {}).get("unfamiliar")
    if share is None:
        return []
    surely = share["value"] if share["low"] is None else share["low"]
    if surely <= 2 * FALSE_ALARMS:
        return []
    return [
        f"{share['value']:.0%} of the cases are unlike the training images ({FALSE_ALARMS:.0%} "
        "would be by chance): scores may be of another kind of image"
    ]


def read_familiarity(workdir: Path, run: TrainedRun) -> Judge | None:
    """What a run was found to be familiar with; None where that is not known.

    That of other weights, as of a training that went on since, is told and not used.
    """
    path = workdir / FAMILIARITY_FILE
    if not path.is_file() or not run.experiment.config.evaluation.familiarity:
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "windows" not in arrays:  # judged whole cases, by a threshold of another kind
                advice = "make it with evaluate.py --split=val"
                print(f"note: {path} is of an earlier version and not used; {advice}")
                return None
            mean, precision, threshold, layer, cases, sha256 = (arrays[n] for n in _ARRAYS)
        fixed = Familiarity(mean, precision, float(threshold))
        if precision.shape != (len(mean), len(mean)) or not np.isfinite(precision).all():
            raise ValueError("numbers are damaged")
        layer, cases, sha256 = str(layer), int(cases), str(sha256)
    except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it, and make it anew with "
            "evaluate.py --split=val"
        ) from error
    if not is_of_run(path, sha256, run):
        return None
    return Judge(fixed, cases, FeatureReader(RunToExplain(run, layer=layer)))


def _features(
    read: FeatureReader, run: TrainedRun, source: Source, rows: Sequence[int]
) -> dict[int, np.ndarray]:
    """Features (windows, channels) of cases by row, each process reading its share."""
    prepare, own = run.experiment.prepare, share_of(rows)
    found = read.windows(prepare(source[row]) for row in own)
    by_row = {row: {"x": values} for row, (_, values) in zip(own, found, strict=True)}
    return {row: values["x"] for row, values in gather_rows(by_row).items()}
