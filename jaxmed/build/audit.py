"""Which labels of a run's own data are doubtful, which cases are hard, and which weigh on which."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build import datasets, preparation
from jaxmed.build.decisions import read_decisions, use_decisions
from jaxmed.build.ensembles import Group, make_groups, predict_groups
from jaxmed.build.members import rows_of
from jaxmed.build.trained import TrainedRun, load_run, take_members
from jaxmed.build.workdir import make_folder, read_split
from jaxmed.data.loader import stack_examples
from jaxmed.evaluation.evaluate import score_cases
from jaxmed.evaluation.pictures import draw_examples
from jaxmed.explanation.influence import example_gradients, influences, split_head
from jaxmed.explanation.label_errors import LabelErrors, find_label_errors
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.training.processes import gather_rows
from jaxmed.training.step import make_total
from jaxmed.types import Batch, Row, Source, UserError, count_of

SHOWN = 12
"""Cases in a picture and on the terminal."""
EXPLAINED, WEIGHTIEST = 6, 3
"""Cases whose influences are told, and training cases for and against each."""
FILES = ("cases.csv", "cases.png", "influence.csv")


def audit_run(
    workdir: str | Path, *, output: str | Path, config: ConfigDict | None = None
) -> list[dict[str, Any]]:
    """Rank the train and validation cases of a run by what speaks against their labels.

    Writes `cases.csv` (the most doubtful or hardest first), `influence.csv` and `cases.png`. Of
    classifications doubtful labels are found by confident learning; of other tasks the cases are
    ranked by their score. Cases of folds are judged by models that did not see them; without folds
    those of the training part are judged by a model that did, which is said.

    Args:
        workdir: of the run.
        output: folder.
        config: the run's, with overrides such as another place of the same data.

    Returns:
        the rows of `cases.csv`.

    Raises:
        UserError: where the data are not the run's.
    """
    workdir, output = Path(workdir), Path(output)
    run = load_run(workdir, config)
    source = datasets.make_source(run.experiment.config)
    if digest(source) != run.run["data"]["sha256"]:
        raise UserError(
            f"data.path={run.experiment.config.data.path}: not the data that {workdir} was trained "
            "on, whose labels are to be looked at"
        )
    make_folder(output)
    use_decisions(run, read_decisions(workdir, run)[0])
    split = read_split(workdir, source)
    groups, seen = _judges(run, split)
    cases = sum(len(rows) for rows, _ in groups)
    print(f"predicting {count_of(cases, 'case')}, and what each would change", flush=True)
    scores = gather_rows(score_cases(predict_groups(run, source, groups), run.experiment.task))
    losses = {
        row: (loss, float(np.linalg.norm(gradient)))
        for rows, places in groups
        for row, loss, gradient in _gradients(run, source, rows, places)
    }
    part_of = {row: part for part, rows in split.items() for row in rows}
    numbers = sorted(scores)
    found: list[dict[str, Any]] = []
    for row in numbers:
        loss, norm = losses[row]
        told = run.experiment.task.describe(scores[row])
        known = {"id": source.ids[row], "part": part_of[row], "seen": "yes" if row in seen else ""}
        found.append({**known, "loss": loss, "gradient_norm": norm, **told})
    doubts = _doubts(run, [scores[row] for row in numbers], found)
    order = np.argsort([case["score"] for case in found]) if doubts is None else doubts.order
    ranked = [found[i] for i in order]
    write_table(output / "cases.csv", ranked)
    _tell(ranked, seen=len(seen), suspects=None if doubts is None else int(doubts.suspect.sum()))
    first = [source[numbers[i]] for i in order[:SHOWN]]
    titles = [_title(case) for case in ranked[:SHOWN]]
    draw_examples(first, run.info.class_names, output / "cases.png", titles=titles)
    hardest = [numbers[i] for i in order]
    write_table(output / "influence.csv", _influence(run, source, split, hardest))
    print(f"written: {', '.join(str(output / name) for name in FILES)}")
    return ranked


def _judges(run: TrainedRun, split: Mapping[str, Sequence[int]]) -> tuple[list[Group], set[int]]:
    """Who predicts which cases, and the rows that were seen in training by who predicts them."""
    if run.chosen and run.experiment.members[run.chosen[0]].fold is not None:
        return make_groups(run, rows_of(split, "val"), split), set()
    trained = rows_of(split, "train")
    return make_groups(run, [*trained, *rows_of(split, "val")], None), set(trained)


def _gradients(
    run: TrainedRun, source: Source, rows: Sequence[int], places: Sequence[int]
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Row, loss and gradient of the head, of the first of the models that judge the rows.

    Of a segmentation, of one patch a case, around its foreground where it has one.
    """
    experiment = run.experiment
    config = experiment.member_configs[places[0]] if places else experiment.config
    variables = take_members(run.variables, places[:1]) if places else run.variables
    prepare_batch = preparation.make_prepare_batch(config, experiment.numbers_of(config))
    ready = preparation.PrepareForTraining(experiment.prepare)
    view = dataclasses.replace(preparation.make_training_view(config), foreground=1.0)

    @jax.jit
    def gradients(variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        head, rest = split_head(variables["params"])

        def loss(head: Any, batch: Batch) -> jax.Array:
            def apply(images: jax.Array, *, key: jax.Array) -> tuple[Any, Any]:
                del key  # as it predicts, without dropout
                own = {**variables, "params": {**rest, **head}}
                return experiment.model.apply(own, images, train=False), {}

            key = jax.random.key(0)
            return experiment.task.loss(apply, batch, key=key, total=make_total(None))[0]

        return example_gradients(loss, head, prepare_batch(batch))

    size = experiment.config.data.batch_size
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        examples = [view(ready(source[row]), np.random.default_rng(row)) for row in some]
        # Filled up with the first, so that all batches have one shape.
        batch = stack_examples(examples + examples[:1] * (size - len(examples)))
        losses, pulls = jax.device_get(gradients(variables, batch))
        yield from zip(some, losses.tolist(), pulls, strict=False)


def _doubts(
    run: TrainedRun, scores: Sequence[Row], found: Sequence[dict[str, Any]]
) -> LabelErrors | None:
    """What speaks against the labels of a classification, which is added to what was found."""
    info = run.info
    if info.task != "classification" or info.multilabel:
        return None
    labels = np.array([score["label"] for score in scores])
    doubts = find_label_errors(labels, np.stack([score["probabilities"] for score in scores]))
    told = zip(found, doubts.suspect, doubts.suggested, doubts.margin, strict=True)
    for case, suspect, suggested, margin in told:
        case["suspect"] = info.class_names[suggested] if suspect else ""
        case["margin"] = float(margin)
    return doubts


def _title(case: Mapping[str, Any]) -> str:
    if case.get("suspect"):
        return f"{case['label']}, or {case['suspect']}? {case['id']}"
    return f"{case['score']:.2f} {case['id']}"


def _tell(ranked: Sequence[Mapping[str, Any]], *, seen: int, suspects: int | None) -> None:
    if seen:
        print(
            f"note: {count_of(seen, 'case')} of the training part were seen by the model that "
            "judges them, which hides wrong labels; train with --config.training.folds=5 to have "
            "each judged by a model that did not see it"
        )
    if suspects is not None:
        print(f"{count_of(suspects, 'label')} of {len(ranked)} doubtful; to be looked at first:")
    else:
        print(f"the hardest of {count_of(len(ranked), 'case')}:")
    for case in ranked[:SHOWN]:
        told = f", {case['label']} or {case['suspect']}?" if case.get("suspect") else ""
        print(f"  {case['id']} ({case['part']}{told}) score {case['score']:.3f}")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys as CSV."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(short)


def _influence(
    run: TrainedRun, source: Source, split: Mapping[str, Sequence[int]], ranked: Sequence[int]
) -> list[dict[str, Any]]:
    """The training cases that weigh most on the hardest validation cases, by one model.

    Of folds, of the first fold's model.
    """
    places = run.chosen[:1]
    fold = run.experiment.members[places[0]].fold if places else None
    held_out = set(rows_of(split, "val", fold))
    cases = [row for row in ranked if row in held_out][:EXPLAINED]
    if not cases:
        return []
    own = np.stack([gradient for _, _, gradient in _gradients(run, source, cases, places)])
    train = rows_of(split, "train", fold)
    each = [
        influences(own, gradient[None])[:, 0]
        for _, _, gradient in _gradients(run, source, train, places)
    ]
    weights = np.stack(each, axis=1)
    table = []
    for case, weight in zip(cases, weights, strict=True):
        order = np.argsort(-weight)
        for i in (*order[:WEIGHTIEST], *order[::-1][:WEIGHTIEST][::-1]):
            does = "supports" if weight[i] > 0 else "opposes"
            table.append(
                {
                    "case": source.ids[case],
                    "training_case": source.ids[train[i]],
                    "does": does,
                    "influence": float(weight[i]),
                }
            )
    return table
