"""Whether an exported model predicts what the run does, and what fewer bits cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize

from jaxmed.build import datasets
from jaxmed.build.ensembles import make_groups, predict_groups
from jaxmed.build.members import rows_of
from jaxmed.build.trained import TrainedRun
from jaxmed.build.workdir import read_split
from jaxmed.data.sources.base import make_example
from jaxmed.evaluation.decisions import ClassDecisions, LabelDecisions
from jaxmed.evaluation.evaluate import plain_scores
from jaxmed.inference.predictor import Predictor
from jaxmed.inference.standalone import Model
from jaxmed.tasks.segmentation import OBSERVED
from jaxmed.types import Example, Row, Source, UserError

MOST = 1e-4
"""By which probabilities, and boxes in voxels, may differ; and the share of voxels of masks."""
FINE = 100.0
"""Voxels from the origin up to which boxes are held to `MOST`, and beyond it in proportion: float32
has seven digits, so that at 600 voxels two neighbouring numbers are 0.6e-4 apart."""

PredictExample = Callable[[Example], Any]


@dataclasses.dataclass(frozen=True)
class Cases:
    """What is predicted twice.

    Attributes:
        source: the run's data, or None where they are gone.
        rows: of the validation part.
    """

    source: Source | None
    rows: Sequence[int]


def find_cases(workdir: Path, run: TrainedRun, *, most: int | None) -> Cases:
    """The first cases of the validation part, or all; none where the data are gone."""
    try:
        source = datasets.make_source(run.experiment.config)
        split = read_split(workdir, source)
    except UserError as error:
        print(f"note: checked on made-up images, for the run's data cannot be read: {error}")
        return Cases(None, ())
    return Cases(source, rows_of(split, "val")[:most])


def read_cases(cases: Cases, run: TrainedRun) -> Iterator[Example]:
    """Examples in their files' own grid."""
    if cases.source is not None:
        yield from (cases.source[row] for row in cases.rows)
        return
    yield from made_up(run)


def made_up(run: TrainedRun, count: int = 3) -> Iterator[Example]:
    """Random images of the type and about the size of the run's."""
    config, rng = run.experiment.config, np.random.default_rng(0)
    shape = config.data.patch if run.info.task == "segmentation" else config.data.size
    dtype = run.run["data"]["dtypes"][0]
    for index in range(count):
        sides = [max(2, round(side * (0.8 + 0.25 * index))) for side in shape]
        values = rng.normal(size=(*sides, run.info.channels))
        if dtype == "uint8":
            image = np.clip(128 + 50 * values, 0, 255).astype(np.uint8)
        else:
            mean = np.mean(config.data.intensity.mean or (0.0,))
            std = np.mean(config.data.intensity.std or (100.0,))
            image = (mean + std * values).astype(dtype)
        yield make_example(image, index=index)


def predict_by_run(
    run: TrainedRun, examples: Sequence[Example], predictor: Predictor | None = None
) -> list[Any]:
    """What predict.py makes of examples, in their own grid; or another predictor of the run."""
    predict = run.predict if predictor is None else predictor
    predicted = predict(run.experiment.prepare(example) for example in examples)
    return [run.experiment.task.restore(found, example) for example, found in predicted]


def compare(wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """The largest differences: of probabilities and boxes, the share of voxels of masks.

    Boxes are paired as they fit best, and differ by voxels; where an image has some farther than
    `FINE` from the origin, by as many times less. Of other numbers or labels the difference is
    infinite.
    """
    if isinstance(wanted[0], dict):
        parts = [_boxes(a, b) for a, b in zip(wanted, found, strict=True)]
        boxes, scores = (max(values) for values in zip(*parts, strict=True))
        return {"boxes": boxes, "scores": scores}
    if np.issubdtype(np.asarray(wanted[0]).dtype, np.integer):
        differing = sum(_differing(a, b) for a, b in zip(wanted, found, strict=True))
        return {"voxels": differing / sum(a.size for a in wanted)}
    largest = max(float(np.abs(a - b).max()) for a, b in zip(wanted, found, strict=True))
    return {"probabilities": largest}


def compare_decided(
    fixed: ClassDecisions | LabelDecisions,
    model: Model,
    wanted: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
) -> dict[str, float]:
    """The share of cases of which a run and its export decide otherwise, by their probabilities."""
    decided, names = fixed.decide(np.stack(wanted)), np.array(model.class_names)
    apart = 0
    for place, probabilities in enumerate(found):
        own = model.decide(probabilities)
        # One class number, or which of several hold.
        same = list(np.atleast_1d(names[decided.predicted[place]])) == own["decision"]
        if decided.sets is not None:
            same &= list(names[decided.sets[place]]) == own["set"]
        apart += not same
    return {"decisions": apart / len(found)}


def check_equal(differences: dict[str, float]) -> None:
    """Refuse an export that predicts something else.

    Raises:
        UserError: a difference is above `MOST`, or no number.
    """
    for name, value in differences.items():
        if not value <= MOST:
            raise UserError(
                f"export: {name} differ from the predictor's by {value:.3g}, more than {MOST:g}; "
                "nothing was written"
            )


def _boxes(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest difference of the corners, and of the scores."""
    if len(wanted["labels"]) != len(found["labels"]):
        return np.inf, np.inf
    if not len(wanted["labels"]):
        return 0.0, 0.0
    apart = np.abs(wanted["boxes"][:, None] - found["boxes"][None]).max(-1)
    off = np.abs(wanted["scores"][:, None] - found["scores"][None])
    other = wanted["labels"][:, None] != found["labels"][None]
    rows, columns = scipy.optimize.linear_sum_assignment(apart + off + 1e6 * other)
    if other[rows, columns].any():
        return np.inf, np.inf
    unit = max(1.0, float(np.abs(wanted["boxes"]).max()) / FINE)
    return float(apart[rows, columns].max()) / unit, float(off[rows, columns].max())


def _differing(wanted: np.ndarray, found: np.ndarray) -> int:
    return int((wanted != found).sum()) if wanted.shape == found.shape else wanted.size


def score_cost(run: TrainedRun, cases: Cases, predict: PredictExample) -> dict[str, Any]:
    """Scores of the validation part by the run and by an export of fewer bits.

    Of several models both are by all that the run chose, also where some were trained on the case:
    what is asked for is the difference.

    Returns:
        for each score its value before and after.

    Raises:
        UserError: the data are gone.
    """
    source, task = cases.source, run.experiment.task
    if source is None:
        raise UserError("--dtype: the score it costs needs the run's data; give --config.data.path")
    before: dict[int, Row] = {}
    after: dict[int, Row] = {}
    for row, known, found in predict_groups(run, source, make_groups(run, cases.rows, None)):
        # An export gives masks, and nothing that could be observed of their probabilities.
        example = {name: value for name, value in known.items() if name not in OBSERVED}
        before[row] = task.score(found, example)
        after[row] = task.score(predict(example), example)
    old, new = plain_scores(task, before), plain_scores(task, after)
    return {name: {"before": old[name], "after": new.get(name)} for name in old}
