"""From a resolved config to objects: one function a piece, registries as plain dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmed.augmentation import intensity as look
from jaxmed.augmentation import spatial as place
from jaxmed.augmentation.compose import compose
from jaxmed.build.config import choose
from jaxmed.data.quality import duplicate_notes, look_through
from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.coco import Coco
from jaxmed.data.sources.findings import DataError, Findings
from jaxmed.data.sources.medmnist import MedMNIST
from jaxmed.data.sources.msd import Decathlon
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.data.sources.tfds import TFDS
from jaxmed.data.sources.voc import PascalVOC
from jaxmed.models.blocks import NORMS
from jaxmed.models.detector import Detector
from jaxmed.models.resnet import STAGES, ResNet, ResNetBackbone
from jaxmed.models.unet import UNet
from jaxmed.tasks.classification import Classification
from jaxmed.tasks.detection import Detection
from jaxmed.tasks.segmentation import Segmentation
from jaxmed.training.optimizers import Optimizer, Schedule, make_optimizer, make_schedule
from jaxmed.training.sharding import AXIS
from jaxmed.types import Augment, DatasetInfo, Source, UserError

SOURCES: dict[str, Callable[..., Source]] = {
    "phantoms": lambda data, task: Phantoms(
        data.kind,
        task=task,
        ndim=data.ndim,
        size=tuple(data.extent) if len(data.extent) > 1 else data.extent[0],
        count=data.count,
        instances=data.masks == "instance",
    ),
    "class_folders": lambda data, task: ClassFolders(
        data.path, label_column=data.label_column, **_conversion(data)
    ),
    "medmnist": lambda data, task: MedMNIST(
        data.path or "data",
        name=data.name or None,
        class_names=tuple(data.class_names) or None,
        download=data.download,
    ),
    "voc": lambda data, task: PascalVOC(data.path, invalid=data.invalid, **_conversion(data)),
    "coco": lambda data, task: Coco(data.path, invalid=data.invalid, **_conversion(data)),
    "pairs": lambda data, task: ImageMaskPairs(
        data.path, masks=data.masks, invalid=data.invalid, **_conversion(data)
    ),
    "msd": lambda data, task: Decathlon(data.path, invalid=data.invalid),
    "tfds": lambda data, task: TFDS(
        data.name or data.path,
        data_dir=data.path or None,
        download=data.download,
        class_names=tuple(data.class_names) or None,
    ),
}


def _conversion(data: ConfigDict) -> dict[str, Any]:
    """What the data do not say themselves, where the config does."""
    return {"class_names": tuple(data.class_names) or None, "channels": data.channels or None}


CONFIG_VERBS = {"classification": "classify", "detection": "detect", "segmentation": "segment"}


def make_source(config: ConfigDict) -> Source:
    """Open the data set.

    Raises:
        UserError: where the layout is unknown, the path wrong, or the data are broken.
    """
    data = config.data
    make = choose(SOURCES, data.layout, key="data.layout")
    for key, choices in (("masks", ("semantic", "instance")), ("invalid", ("error", "drop"))):
        choose(dict.fromkeys(choices), data[key], key=f"data.{key}")
    if data.layout == "phantoms" and len(data.extent) not in (1, data.ndim):
        raise UserError(f"data.extent is {data.extent}; expected one side, or {data.ndim}")
    if data.layout not in ("phantoms", "medmnist", "tfds") and not data.path:
        raise UserError("data.path is empty; give --config.data.path=FOLDER of the images")
    source = make(data, config.task)
    if source.info.task != config.task:
        raise UserError(
            f"data.path={data.path or data.name}: is a set for {source.info.task}, the config is "
            f"for {config.task}; use a config named {CONFIG_VERBS[source.info.task]}_*"
        )
    return source


def look_further(config: ConfigDict, source_error: DataError) -> DataError:
    """What is wrong with a data set, where opening it failed already: with that, all broken files.

    So that the user can mend everything at once, and not the headers first and then the pixels.
    """
    lenient = config.copy_and_resolve_references()
    lenient.data.invalid = "drop"
    try:
        source = make_source(lenient)
    except UserError:
        return source_error
    broken, _ = look_through(source, range(len(source)))
    findings = Findings(Path(config.data.path), invalid=[*source_error.problems, *broken.values()])
    try:
        findings.finish()
    except DataError as error:
        return error
    return source_error


def look_through_data(
    config: ConfigDict,
    source: Source,
    split: Mapping[str, Sequence[int]],
    *,
    check: Callable[[np.ndarray, str], None] | None = None,
) -> tuple[dict[str, list[int]], list[str]]:
    """The split without the cases that cannot be used, and notes on these and on doubles.

    Args:
        config: resolved or not.
        source: the data set.
        split: rows of each part.
        check: see `look_through`.

    Raises:
        UserError: listing all broken cases, unless data.invalid is "drop"; or where a part that had
            cases has none left.
    """
    if isinstance(source, Phantoms):
        return {part: list(rows) for part, rows in split.items()}, []
    rows = sorted({row for members in split.values() for row in members})
    broken, digests = look_through(source, rows, check=check)
    findings = Findings(Path(config.data.path), invalid=list(broken.values()))
    findings.finish(policy=config.data.invalid)
    usable = {part: [r for r in rows if r not in broken] for part, rows in split.items()}
    for part, members in split.items():
        if members and not usable[part]:
            raise UserError(f"{config.data.path}: no case of {part} can be used; mend the files")
    notes = [*findings.notes, *duplicate_notes(digests, usable)]
    for note in notes:
        print(f"data: {note}")
    return usable, notes


def check_classes_left(
    config: ConfigDict,
    source: Source,
    split: Mapping[str, Sequence[int]],
    usable: Mapping[str, Sequence[int]],
) -> None:
    """Refuse to train where leaving cases out left a class without any."""
    if source.labels is None or source.info.multilabel:
        return
    before, after = (
        {int(source.labels[row]) for row in parts.get("train", ())} for parts in (split, usable)
    )
    gone = [source.info.class_names[label] for label in sorted(before - after)]
    if gone:
        raise UserError(
            f"{config.data.path}: leaving out what is broken leaves no training case of "
            f"{', '.join(gone)}; mend the files (see without --config.data.invalid=drop what is "
            "wrong)"
        )


def make_task(
    config: ConfigDict, info: DatasetInfo, *, class_counts: Sequence[int] = (), quick: bool = False
):
    """The task, with its class weights.

    Args:
        config: resolved.
        info: of the data set.
        class_counts: of the training part, for balanced weights.
        quick: leave out scores that take time, for the evaluations during training.
    """
    weights = _class_weights(config.loss.class_weights, class_counts)
    if info.task == "classification":
        return Classification(
            info.class_names,
            multilabel=info.multilabel,
            label_smoothing=config.loss.label_smoothing,
            class_weights=weights,
        )
    if info.task == "detection":
        return Detection(
            info.class_names,
            box_weight=config.loss.box_weight,
            iou_threshold=config.evaluation.iou,
            # Room for the most objects that training saw; the scores use COCO's 100 a class.
            max_detections=max(100, config.data.max_boxes),
            score_threshold=config.evaluation.score_threshold,
        )
    return Segmentation(
        info.class_names,
        instances=info.instances,
        class_weights=None if info.instances else weights,
        surface_scores=not quick,
        nsd_tolerance=config.evaluation.nsd_tolerance,
    )


def _class_weights(kind: str, counts: Sequence[int]) -> tuple[float, ...] | None:
    """Inverse to the frequencies, with mean 1 over the examples; a class never seen weighs 1."""
    if kind == "none" or not len(counts):
        return None
    if kind != "balanced":
        raise UserError(f"loss.class_weights is {kind!r}; expected none or balanced")
    total, seen = sum(counts), sum(c > 0 for c in counts)
    return tuple(total / (seen * c) if c else 1.0 for c in counts)


def make_model(config: ConfigDict, info: DatasetInfo, *, outputs: int, mapped: bool = False) -> Any:
    """The network.

    Args:
        config: resolved.
        info: of the data set.
        outputs: classes of the output.
        mapped: whether it runs under `pmap`, where batch statistics must be shared by name.
    """
    model = config.model
    choose(dict.fromkeys(NORMS), model.norm, key="model.norm")
    dtype = model_dtype(model.dtype)
    axis_name = AXIS if mapped else None
    if model.name == "unet":
        return UNet(
            outputs,
            features=model.features,
            strides=model.strides or None,
            norm=model.norm,
            dropout=model.dropout,
            deep_supervision=model.deep_supervision,
            axis_name=axis_name,
            remat=model.remat,
            dtype=dtype,
        )
    choose(dict.fromkeys([*STAGES, "unet"]), model.name, key="model.name")
    choose(dict.fromkeys((1, 2, 4)), model.stem_strides, key="model.stem_strides")
    if any(level not in range(4) for level in model.levels):
        raise UserError(f"model.levels is {tuple(model.levels)}; the backbone has stages 0 to 3")
    backbone = ResNetBackbone(
        model.name,
        width=model.width,
        stem_strides=model.stem_strides,
        norm=model.norm,
        axis_name=axis_name,
        remat=model.remat,
        dtype=dtype,
    )
    if info.task == "classification":
        return ResNet(outputs, backbone, dropout=model.dropout)
    return Detector(
        outputs,
        backbone,
        levels=model.levels,
        features=model.head_features,
        dropout=model.dropout,
        dtype=dtype,
    )


def model_dtype(name: str) -> Any:
    """The type to compute in: bfloat16 on accelerators, float32 on CPU, or as said."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return choose({"float32": jnp.float32, "bfloat16": jnp.bfloat16}, name, key="model.dtype")


def make_augment(config: ConfigDict, info: DatasetInfo) -> Augment | None:
    """All augmentations that are switched on, composed."""
    a = config.augmentation
    if not a.enabled:
        return None
    # Pictures have an upright: only left and right are swapped unless the config says more.
    axes = tuple(a.flip_axes) or ((1,) if info.ndim == 2 else (0, 1, 2))
    if axes != (-1,) and any(axis not in range(info.ndim) for axis in axes):
        raise UserError(
            f"augmentation.flip_axes is {axes}; expected axes 0 to {info.ndim - 1}, or -1 for none"
        )
    affine = {
        "rotation": a.rotation,
        "scale": a.scale,
        "translation": a.translation,
        "axes": _in_plane(config, info),
        "probability": a.affine,
    }
    switched: list[tuple[bool, Callable[[], Augment]]] = [
        (a.flip > 0 and axes != (-1,), lambda: place.flip(axes=axes, probability=a.flip)),
        (a.rot90, place.quarter_turns),
        (a.affine > 0, lambda: place.affine(**affine)),
        (a.noise > 0, lambda: look.gaussian_noise(probability=a.noise)),
        (a.blur > 0, lambda: look.gaussian_blur(probability=a.blur)),
        (a.brightness > 0, lambda: look.brightness(probability=a.brightness)),
        (a.contrast > 0, lambda: look.contrast(probability=a.contrast)),
        (a.low_resolution > 0, lambda: look.low_resolution(probability=a.low_resolution)),
        (a.gamma > 0, lambda: look.gamma(probability=a.gamma)),
        (a.color > 0, lambda: look.colour_jitter(probability=a.color)),
        (a.cutout > 0, lambda: look.cutout(probability=a.cutout)),
    ]
    return compose(*(make() for on, make in switched if on))


def _in_plane(config: ConfigDict, info: DatasetInfo) -> tuple[int, ...] | None:
    """The axes to rotate in: all, or those of the slices where these are thick."""
    if info.ndim == 2 or not config.data.spacing:
        return None
    fine = min(config.data.spacing)
    axes = tuple(i for i, s in enumerate(config.data.spacing) if s < 3 * fine)
    return axes if len(axes) == 2 else None


def make_optimization(config: ConfigDict) -> tuple[Optimizer, Schedule, dict[str, float]]:
    """Optimizer, schedule, and the numbers that both read."""
    o = config.optimizer
    steps = config.training.steps
    warmup = math.ceil(o.warmup * steps) if o.warmup < 1 else int(o.warmup)
    warmup = min(warmup, max(steps - 1, 0))
    name = "one_cycle" if o.schedule == "onecycle" else o.schedule
    schedule = make_schedule(name, steps=max(steps, 1), warmup_steps=warmup)
    hyper = {"learning_rate": o.learning_rate, "weight_decay": o.weight_decay}
    if o.clip_norm:
        hyper["clip_norm"] = o.clip_norm
    if o.name == "sgd":
        hyper["momentum"] = o.momentum
    if o.ema:
        hyper["ema_decay"] = o.ema
    return make_optimizer(o.name, accumulate=o.accumulate), schedule, hyper
