"""From a resolved config to objects: one function a piece, registries as plain dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmed.augmentation import intensity as look
from jaxmed.augmentation import spatial as place
from jaxmed.augmentation.compose import compose
from jaxmed.build.checks import mirrored_axes
from jaxmed.build.config import choose
from jaxmed.models.blocks import NORMS
from jaxmed.models.detector import Detector
from jaxmed.models.resnet import STAGES, ResNet, ResNetBackbone
from jaxmed.models.unet import UNet
from jaxmed.tasks.classification import Classification
from jaxmed.tasks.detection import Detection
from jaxmed.tasks.segmentation import Segmentation
from jaxmed.training.optimizers import Optimizer, Schedule, make_optimizer, make_schedule
from jaxmed.training.sharding import AXIS
from jaxmed.types import Augment, DatasetInfo, UserError

SCORE_THRESHOLD = 0.3
"""Of boxes, before one was chosen on the validation part."""


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
            score_threshold=config.evaluation.score_threshold or SCORE_THRESHOLD,
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


def make_model(
    config: ConfigDict,
    info: DatasetInfo,
    *,
    outputs: int,
    mapped: bool = False,
    numbers: Mapping[str, Any] | None = None,
) -> Any:
    """The network.

    Args:
        config: resolved.
        info: of the data set.
        outputs: classes of the output.
        mapped: whether it runs under a map over devices, where batch statistics must be shared by
            name.
        numbers: by key of the config, traced values to take in place of its own.
    """
    model = config.model
    dropout = (numbers or {}).get("model.dropout", model.dropout)
    check_words(config)
    dtype = model_dtype(model.dtype)
    axis_name = AXIS if mapped else None
    if model.name == "unet":
        return UNet(
            outputs,
            features=model.features,
            strides=model.strides or None,
            norm=model.norm,
            dropout=dropout,
            deep_supervision=model.deep_supervision,
            axis_name=axis_name,
            remat=model.remat,
            dtype=dtype,
        )
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
        return ResNet(outputs, backbone, dropout=dropout)
    return Detector(
        outputs,
        backbone,
        levels=model.levels,
        features=model.head_features,
        dropout=dropout,
        dtype=dtype,
    )


def model_dtype(name: str) -> Any:
    """The type to compute in: bfloat16 on accelerators, float32 on CPU, or as said."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return choose({"float32": jnp.float32, "bfloat16": jnp.bfloat16}, name, key="model.dtype")


def make_augment(
    config: ConfigDict, info: DatasetInfo, numbers: Mapping[str, Any] | None = None
) -> Augment | None:
    """All augmentations that are switched on, composed.

    Args:
        config: resolved.
        info: of the data set.
        numbers: by key of the config, traced values to take in place of its own; what they are
            given for is switched on.
    """
    if not config.augmentation.enabled:
        return None
    traced = {
        key.removeprefix("augmentation."): value
        for key, value in (numbers or {}).items()
        if key.startswith("augmentation.")
    }
    a = SimpleNamespace(**{**config.augmentation, **traced})
    axes = mirrored_axes(config, info)
    affine = {
        "rotation": a.rotation,
        "scale": a.scale,
        "translation": a.translation,
        "axes": _in_plane(config, info),
        "probability": a.affine,
    }
    make: dict[str, Callable[[], Augment]] = {
        "flip": lambda: place.flip(axes=axes, probability=a.flip),
        "rot90": place.quarter_turns,
        "affine": lambda: place.affine(**affine),
        "noise": lambda: look.gaussian_noise(probability=a.noise),
        "blur": lambda: look.gaussian_blur(probability=a.blur),
        "brightness": lambda: look.brightness(probability=a.brightness),
        "contrast": lambda: look.contrast(probability=a.contrast),
        "low_resolution": lambda: look.low_resolution(probability=a.low_resolution),
        "gamma": lambda: look.gamma(probability=a.gamma),
        "color": lambda: look.colour_jitter(probability=a.color),
        "cutout": lambda: look.cutout(probability=a.cutout),
    }
    off = {name for name in make if name not in traced and not getattr(a, name) > 0}
    if not axes:
        off.add("flip")
    return compose(*(None if name in off else made() for name, made in make.items()))


def _in_plane(config: ConfigDict, info: DatasetInfo) -> tuple[int, ...] | None:
    """The axes to rotate in: all, or those of the slices where these are thick."""
    if info.ndim == 2 or not config.data.spacing:
        return None
    fine = min(config.data.spacing)
    axes = tuple(i for i, s in enumerate(config.data.spacing) if s < 3 * fine)
    return axes if len(axes) == 2 else None


def check_words(config: ConfigDict) -> None:
    """Refuse words that name nothing, before any data are read.

    Raises:
        UserError: naming the key.
    """
    model = config.model
    make_optimization(config)
    model_dtype(model.dtype)
    choose(dict.fromkeys([*STAGES, "unet"]), model.name, key="model.name")
    choose(dict.fromkeys(NORMS), model.norm, key="model.norm")


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
