"""What a run can tell of itself in its report: how data were split, and a model card's items."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.build.trained import TrainedRun
from jaxmed.build.workdir import read_split_ids
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.evaluation.report import CARD_FILE
from jaxmed.evaluation.report_parts.model_card import check_stated
from jaxmed.evaluation.report_parts.scores import headline
from jaxmed.evaluation.report_parts.words import score_title, with_interval
from jaxmed.types import DatasetInfo, Source, UserError, count_of

FEW_EPOCHS = 5
"""Times that a network sees each case, below which a training is called short."""


def read_card(workdir: Path) -> dict[str, str]:
    """What people stated of a run in model_card.json of its workdir.

    Raises:
        UserError: where it cannot be read, or states what no item is for.
    """
    path = workdir / CARD_FILE
    if not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend it or remove it") from error
    if not isinstance(stated, dict):
        raise UserError(f'{path}: must hold texts by name, such as {{"intended_use": "..."}}')
    check_stated(stated, where=str(path))
    return stated


def describe_split(workdir: Path, source: Source, *, is_own: bool) -> dict[str, Any]:
    """Parts of the run's data with cases, patients and classes, and sentences on the split.

    Patients and classes need the run's own data; of a segmentation, or of boxes, classes are not
    counted, since every case would have to be read.
    """
    ids = read_split_ids(workdir)
    parts: dict[str, dict[str, Any]] = {part: {"cases": len(names)} for part, names in ids.items()}
    if not is_own:
        return {"parts": parts, "told": ["These are the data that the run was trained on."]}
    place = {name: row for row, name in enumerate(source.ids)}
    rows = {part: [place[name] for name in names if name in place] for part, names in ids.items()}
    for part, own in rows.items():
        if source.patients is not None:
            parts[part]["patients"] = len({source.patients[row] for row in own})
        parts[part]["classes"] = _count_classes(source, own)
    how = (
        "as the data give them"
        if set(ids) <= set(source.parts)
        else "cut at random where the data give none"
    )
    return {"parts": parts, "told": [f"Parts are {how}.", _leak(source, rows)]}


def _count_classes(source: Source, rows: Sequence[int]) -> dict[str, int]:
    if source.labels is None or not len(rows):
        return {}
    labels = np.asarray([source.labels[row] for row in rows])
    each = (
        labels == 1
        if labels.ndim == 2
        else labels[:, None] == np.arange(len(source.info.class_names))
    )
    return dict(zip(source.info.class_names, each.sum(0).tolist(), strict=True))


def _leak(source: Source, rows: Mapping[str, Sequence[int]]) -> str:
    """Whether patients are in several parts."""
    if source.patients is None and isinstance(source, Phantoms):
        return "Every image is made up by itself, so no patient is in several parts."
    if source.patients is None:
        return (
            "Patients are not known, so images of one patient may be in several parts: name them "
            "in the column patient of manifest.csv."
        )
    parts: dict[str, set[str]] = {}
    for part, own in rows.items():
        for row in own:
            parts.setdefault(source.patients[row], set()).add(part)
    shared = sum(len(found) > 1 for found in parts.values())
    if shared:
        of_all = f"{shared:,} of {count_of(len(parts), 'patient')}"
        return f"{of_all} in several parts: scores are too good."
    return f"None of the {count_of(len(parts), 'patient')} is in several parts (checked)."


def warnings_of_run(
    run: TrainedRun,
    summaries: Mapping[str, Mapping[str, Any]],
    findings: Sequence[Mapping[str, Any]],
    split: Mapping[str, Any],
    *,
    looked: bool,
) -> list[str]:
    """What a reader must know before the scores."""
    told = _tell_short(run, split)
    for part, summary in summaries.items():
        own = summary["data_sha256"] == run.run["data"]["sha256"]
        if part == "val" and own and "members" not in summary:
            told.append(
                "val: these cases chose the checkpoint, so their scores are somewhat too good; the "
                "test part, or data of another place, tell"
            )
        if summary["parameters_sha256"] != run.sha256:
            told.append(
                f"{part}: was evaluated with other weights than those of now; evaluate it again"
            )
    told += [f"data: {note}" for note in run.run["data"]["notes"] if "too good" in note]
    grave = [f["kind"] for f in findings if f["severity"] in ("error", "warning")]
    if grave:
        told.append(f"data: {', '.join(dict.fromkeys(grave))} (see Data)")
    if not looked and run.experiment.config.data.layout != "phantoms":
        told.append(
            "data: nobody looked through them with plan.py --output=WORKDIR, which finds copies "
            "and near copies in several parts, patients in several parts, and outlying cases"
        )
    return told


def _tell_short(run: TrainedRun, split: Mapping[str, Any]) -> list[str]:
    """A sentence where the network saw its cases too few times to have learnt what it could."""
    config, cases = run.experiment.config, split["parts"].get("train", {}).get("cases", 0)
    fold = config.training.folds
    seen = config.training.steps * config.data.batch_size
    seen /= max(1.0, cases * (fold - 1) / fold if fold > 1 else cases)
    if seen >= FEW_EPOCHS:
        return []
    return [
        f"training: of {count_of(config.training.steps, 'step')}, in which each case was seen "
        f"{seen:.1f} times on average; more of them are likely to do better, and features of a "
        "network that learnt little do not tell what is unfamiliar to it"
    ]


def card_facts(
    run: TrainedRun,
    summaries: Mapping[str, Mapping[str, Any]],
    split: Mapping[str, Any],
    *,
    checkpoint: str,
    seconds: float,
) -> dict[str, str]:
    """The items of a model card that the run knows."""
    info, config = run.info, run.experiment.config
    about = {
        "data": _images(info, split),
        "split": " ".join(split["told"]),
        "left_out": "; ".join(run.run["data"]["notes"][:5]) or "nothing",
        "model": _model(run),
        "start": f"those of {config.model.init}" if config.model.init else "random",
        "training": _training(run),
        "augmentation": _augmentation(config),
        "preprocessing": _preprocessing(run),
        "selection": checkpoint,
        "hardware": f"{', '.join(run.run['devices'])}; {seconds / 60:.1f} minutes of training",
        "software": ", ".join(f"{k} {v}" for k, v in run.run["versions"].items()),
        "licence": info.licence,
        "citation": info.citation,
    }
    return about | _performance(run, summaries)


def _performance(run: TrainedRun, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    own: list[str] = []
    other: list[str] = []
    known: dict[str, str] = {}
    for part, summary in summaries.items():
        is_own = summary["data_sha256"] == run.run["data"]["sha256"]
        told = headline(part, summary, data=run.info.name, checkpoint="")
        (own if is_own else other).append(told)
        errors = [
            f"{score_title(name)} {with_interval(entry)}"
            for name, entry in summary["metrics"].items()
            if name.removeprefix("voxel_").startswith(("ece", "brier"))
            and "/" not in name
            and entry["value"] is not None
        ]
        if errors and "calibration" not in known:
            known["calibration"] = f"{', '.join(errors)} on {part}"
        if summary.get("subgroups") and "subgroups" not in known:
            known["subgroups"] = f"by {', '.join(summary['subgroups'])} on {part}: see the scores"
    return known | {"scores": " ".join(own), "external": " ".join(other)}


def _images(info: DatasetInfo, split: Mapping[str, Any]) -> str:
    kind = f", {info.kind}" if info.kind else ""
    parts = ", ".join(f"{part} {entry['cases']:,}" for part, entry in split["parts"].items())
    names = ", ".join(info.class_names[:20]) + (" and more" if len(info.class_names) > 20 else "")
    told = f"{info.name}{kind}: {info.ndim}-D, {count_of(info.channels, 'channel')}"
    return f"{told}; classes {names}; cases {parts}"


def _model(run: TrainedRun) -> str:
    config, members = run.experiment.config, max(1, len(run.experiment.members))
    leaves = jax.tree.leaves(run.variables["params"])
    count = sum(leaf.size for leaf in leaves) // members
    many = f", {len(run.chosen)} of which predict together" if run.chosen else ""
    name = f"{config.model.name} for {run.info.task}, {count:,} parameters"
    return f"{count_of(members, 'model')}{many}: {name}" if members > 1 else name


def _training(run: TrainedRun) -> str:
    config = run.experiment.config
    steps, size = config.training.steps, config.data.batch_size
    return (
        f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g} "
        f"({config.optimizer.schedule}), weight decay {config.optimizer.weight_decay:g}; "
        f"{steps:,} steps of {count_of(size, 'case')}; seed {run.run['seed']}"
    )


def _augmentation(config: Any) -> str:
    if not config.augmentation.enabled:
        return "none"
    used = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in config.augmentation.items()
        if key != "enabled" and isinstance(value, (int, float)) and value
    ]
    return ", ".join(used) or "none"


def _preprocessing(run: TrainedRun) -> str:
    data = run.experiment.config.data
    told = [f"intensities: {data.normalization}", f"{count_of(data.channels, 'channel')}"]
    for key, words in (("spacing", "resampled to (mm)"), ("size", "size"), ("patch", "patches of")):
        if data[key]:
            told.append(f"{words} {' x '.join(f'{n:g}' for n in data[key])}")
    return "; ".join(told)
