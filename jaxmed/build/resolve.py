"""Fill in what a config leaves open, from the plan and the training part of the data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.checks import check_fits
from jaxmed.build.config import flatten, update
from jaxmed.build.experiment import Experiment
from jaxmed.build.members import Member, fold_name, plan_members, rows_of
from jaxmed.data.sources.findings import some
from jaxmed.data.splits import k_folds
from jaxmed.preprocessing.fingerprint import take_fingerprint
from jaxmed.preprocessing.plan import (
    is_open,
    plan_settings,
    plan_steps,
    shared_statistics,
    shrink_patch,
)
from jaxmed.training.sharding import AXIS
from jaxmed.training.speed import device_bytes
from jaxmed.types import Source, UserError, count_of

MEMORY_SHARE = 0.7
"""Of the device's memory that a step may take; a quarter may hold the training cases."""

# The keys that something must set before an experiment can be built.
REQUIRED = {
    "all": ("data.channels", "data.normalization", "data.batch_size", "training.steps"),
    "classification": ("data.size", "data.fit", "model.width", "model.stem_strides"),
    "detection": (
        "data.size",
        "data.fit",
        "data.max_boxes",
        "model.width",
        "model.stem_strides",
        "model.levels",
        "model.head_features",
    ),
    "segmentation": ("data.patch", "model.features", "evaluation.nsd_tolerance"),
}


def resolve(
    config: ConfigDict,
    source: Source,
    rows: Sequence[int],
    *,
    earlier: Mapping[str, Any] | None = None,
) -> tuple[ConfigDict, dict[str, Any], dict[str, Any]]:
    """Fill in what the config leaves to the plan, from the training part.

    Args:
        config: as given; not changed.
        source: the data set.
        rows: of the training part.
        earlier: flat resolved config of the run that is to go on; what was left open then keeps
            its value, so that other software or hardware cannot plan another one.

    Returns:
        the resolved config, the settings that the plan made, and the fingerprint.

    Raises:
        UserError: where something is still open, or the plan's file is wrong.
    """
    config = config.copy_and_resolve_references()
    given = flatten(config)
    fingerprint = take_fingerprint(source, rows, channels=config.data.channels)
    settings: dict[str, Any] = {}
    if earlier is not None:
        settings = {k: v for k, v in earlier.items() if k in given and is_open(given[k])}
        settings = {k: v for k, v in settings.items() if not is_open(v)}
        if config.training.epochs:  # perhaps more of them
            settings.pop("training.steps", None)
        if config.optimizer.schedule == "constant" and 0 < config.optimizer.warmup < 1:
            settings["optimizer.warmup"] = earlier["optimizer.warmup"]
    elif config.plan == "auto":
        settings = plan_settings(fingerprint, source.info, given)
    elif config.plan != "none":
        settings = {k: v for k, v in _read_plan(config.plan).items() if is_open(given.get(k))}
    update(config, settings, where=f"plan={config.plan}")
    if "data.batch_size" in settings and earlier is None:
        _fit_to_devices(config, settings)
    _check_complete(config, leave_out=("training.steps",))
    check_fits(config, source.info)
    counts = fingerprint["class_counts"]
    drafted = config
    config = _with_length(drafted, settings, source, rows, counts)
    while "data.batch_size" in settings and earlier is None and config.plan == "auto":
        smaller = _smaller(config, settings, source, rows, counts)
        if not smaller:
            break
        settings |= smaller
        update(drafted, smaller, where="plan=auto")
        config = _with_length(drafted, settings, source, rows, counts)
    steps = config.training.steps
    defaults = {
        "log_every": min(20, max(1, steps // 25)),
        "evaluate_every": evaluations_apart(config),
        "checkpoint_every": max(50, steps // 10),
    }
    for key, every in defaults.items():
        config.training[key] = config.training[key] or every
    _check_complete(config)
    return config, settings, fingerprint


def evaluations_apart(config: ConfigDict) -> int:
    """Steps between evaluations; where the length is left to the plan, the fewest there will be."""
    return config.training.evaluate_every or max(50, config.training.steps // 10)


def _with_length(
    config: ConfigDict,
    settings: dict[str, Any],
    source: Source,
    rows: Sequence[int],
    counts: Sequence[int],
) -> ConfigDict:
    """The config with its steps; where they are planned, `settings` gets them too."""
    config = config.copy_and_resolve_references()
    cases = train_count(config, len(rows))
    if config.training.epochs and not config.training.steps:
        steps = max(1, round(config.training.epochs * cases / max(config.data.batch_size, 1)))
        config.training.steps = steps
    elif config.plan == "auto" and not config.training.steps:
        config.training.steps = 1
        experiment = Experiment(config, source.info, counts)
        config.training.steps = settings["training.steps"] = plan_steps(
            lambda: experiment.step_flops(source[rows[0]]),
            ndim=source.info.ndim,
            cases=round(cases),
            batch_size=config.data.batch_size,
        )
    if 0 < config.optimizer.warmup < 1:  # in steps, so that a longer run warms up alike
        config.optimizer.warmup = float(math.ceil(config.optimizer.warmup * config.training.steps))
    return config


def _smaller(
    config: ConfigDict,
    settings: Mapping[str, Any],
    source: Source,
    rows: Sequence[int],
    counts: Sequence[int],
) -> dict[str, Any]:
    """What to plan smaller, so that a step, which is compiled to know, fits the device's memory.

    Raises:
        UserError: where nothing that was planned can be smaller.
    """
    experiment = Experiment(config, source.info, counts, plan_members(config))
    room = int(MEMORY_SHARE * device_bytes())
    print("plan: compiling a step, to measure its memory", flush=True)
    need = experiment.step_bytes(source[rows[0]])
    print(f"plan: a step takes {need / 2**30:.2g} of {room / 2**30:.3g} GiB of memory (measured)")
    if need <= room:
        return {}
    least = experiment.mesh.shape[AXIS]
    size = config.data.batch_size
    if size > least:
        return {"data.batch_size": max(least, size // 2 // least * least)}
    if "data.patch" in settings:
        patch = shrink_patch(
            config.data.patch, config.model.strides, factor=(room / need) ** (1 / source.info.ndim)
        )
        if patch != tuple(config.data.patch):
            return {"data.patch": patch}
    raise UserError(
        f"plan=auto: a step takes {need / 2**30:.2g} GiB even so, more than the {room / 2**30:.2g} "
        "GiB of this device; make the network smaller (model.*), or use another device"
    )


def train_count(config: ConfigDict, cases: int) -> float:
    """Cases that one model learns from: of `cases`, folds hold a part of their own out."""
    folds = config.training.folds
    return cases * (folds - 1) / folds if folds else cases


def cut_folds(
    config: ConfigDict, source: Source, split: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """The split with the validation parts of the folds in place of train and val."""
    rows = sorted({*split["train"], *split["val"]})
    known = source.patients
    groups = len(rows) if known is None else len({known[row] or row for row in rows})
    if groups < config.training.folds:
        raise UserError(
            f"training.folds is {config.training.folds}; train and val have "
            f"{count_of(groups, 'case' if known is None else 'patient')} to divide among them"
        )
    folds = k_folds(
        source.ids,
        patients=source.patients,
        labels=source.labels,
        folds=config.training.folds,
        seed=config.seed,
        rows=rows,
    )
    rest = {part: list(own) for part, own in split.items() if part not in ("train", "val")}
    return {fold_name(i): held_out for i, (_, held_out) in enumerate(folds)} | rest


def fold_gaps(source: Source, split: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence for each fold that lacks a class, and for each whose model would never see one."""
    if source.labels is None:
        return []
    labels, names = np.asarray(source.labels), source.info.class_names
    folds = [part for part in split if part.startswith("fold")]

    def lacks(rows: Sequence[int]) -> list[str]:
        own = labels[list(rows)]
        there = own == 1 if own.ndim == 2 else own[:, None] == np.arange(len(names))
        return [name for name, found in zip(names, there.any(0), strict=True) if not found]

    notes = []
    for fold, part in enumerate(folds):
        gone = lacks(split[part])
        if gone:
            notes.append(f"{part} has no case of {some(gone)}: its scores of these are undefined")
        unseen = [name for name in lacks(rows_of(split, "train", fold)) if name not in gone]
        if unseen:
            notes.append(f"all cases of {some(unseen)} are in {part}: its model never learns these")
    return notes


def with_own_statistics(
    members: Sequence[Member],
    config: ConfigDict,
    source: Source,
    split: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any],
) -> tuple[Member, ...]:
    """Models whose intensities are scaled by what they learn from, not by what they are tested on.

    All else that was planned (sizes, network, class weights) is of all folds, and so are
    statistics of which some were given.

    Args:
        members: the models.
        config: resolved.
        source: the data set.
        split: rows of each part.
        settings: what the plan made.
    """
    clip = tuple(config.data.intensity.clip)
    names = ("mean", "std", "clip") if clip else ("mean", "std")
    keys = [f"data.intensity.{name}" for name in names]
    if config.plan != "auto" or not all(key in settings for key in keys):
        if "data.intensity.mean" in settings and any(m.fold is not None for m in members):
            print(f"note: {config.plan} scales all folds alike, by data that some validate on")
        return tuple(members)
    own: dict[int | None, dict[str, Any]] = {None: {}}
    for fold in {member.fold for member in members} - {None}:
        rows = rows_of(split, "train", fold)
        fingerprint = take_fingerprint(source, rows, channels=config.data.channels)
        statistics = shared_statistics(fingerprint, clip=bool(clip))
        own[fold] = {key: statistics[key] for key in keys}
    return tuple(
        dataclasses.replace(member, changes={**member.changes, **own[member.fold]})
        for member in members
    )


def _read_plan(path: str) -> dict[str, Any]:
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(plan, dict):
            raise ValueError("it is no object of keys and values")
        return flatten(plan)
    except (OSError, ValueError) as error:
        raise UserError(
            f"plan={path}: cannot be read ({error}); expected auto, none, or a JSON file"
        ) from error


def _fit_to_devices(config: ConfigDict, settings: dict[str, Any]) -> None:
    """Round a planned batch up to what the devices can share equally."""
    devices = config.sharding.devices or len(jax.devices())
    devices //= math.gcd(
        devices, len(plan_members(config)) or 1
    )  # over which models are spread first
    size = -(-config.data.batch_size // devices) * devices
    settings["data.batch_size"] = config.data.batch_size = size


def _check_complete(config: ConfigDict, *, leave_out: Sequence[str] = ()) -> None:
    flat = flatten(config)
    required = [k for k in REQUIRED["all"] + REQUIRED[config.task] if k not in leave_out]
    if config.data.normalization == "dataset":
        required += ["data.intensity.mean", "data.intensity.std"]
    missing = [k for k in required if is_open(flat[k])]
    if missing:
        raise UserError(
            f"plan={config.plan} leaves {', '.join(missing)} open; set them with "
            f"--config.{missing[0]}=..., or use plan=auto"
        )
