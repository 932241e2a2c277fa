"""What is wrong with a config, found before anything is built from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.config import flatten
from jaxmed.evaluation.operating_points import parse_rule
from jaxmed.models.blocks import per_axis
from jaxmed.types import DatasetInfo, UserError

# How many numbers a key takes, where neither the task nor the data decide it.
LENGTHS = {"data.fractions": 3, "data.window": 2, "augmentation.scale": 2}
MAY_BE_NEGATIVE = (
    "seed",
    "data.window",
    "data.intensity.mean",
    "data.intensity.clip",
    "augmentation.flip_axes",
)


BELOW_ONE = (
    "model.dropout",
    "optimizer.ema",
    "optimizer.momentum",
    "evaluation.overlap",
    "evaluation.coverage",
    "evaluation.score_threshold",
)
"""Shares of which the whole makes no sense."""
PROBABILITIES = tuple(
    f"augmentation.{name}"
    for name in (
        "flip",
        "affine",
        "brightness",
        "contrast",
        "gamma",
        "noise",
        "blur",
        "low_resolution",
        "color",
        "cutout",
    )
)
"""How often each transform is applied."""


CALIBRATIONS = ("temperature", "bias_corrected")


def check_numbers(config: ConfigDict) -> None:
    """Refuse words, too few or too many numbers, and those out of range, which flags cannot tell.

    Raises:
        UserError: naming the key.
    """
    parse_rule(config.evaluation.operating_point)
    if config.evaluation.calibration not in CALIBRATIONS:
        raise UserError(
            f"evaluation.calibration is {config.evaluation.calibration!r}; expected "
            f"{' or '.join(CALIBRATIONS)}"
        )
    for key, value in flatten(config).items():
        numbers = _leaves(value)
        if isinstance(value, tuple) and key != "data.class_names":
            if any(not isinstance(n, (int, float)) for n in numbers):
                raise UserError(f"{key} is {value!r}; expected numbers, as in --config.{key}=64,64")
            if len(value) != LENGTHS.get(key, len(value)):
                raise UserError(f"{key} is {value!r}; expected {LENGTHS[key]} numbers")
        if key == "data.class_names" and len(value) == 1 and "," in str(value[0]):
            meant = tuple(name.strip() for name in str(value[0]).split(","))
            raise UserError(f'{key} is {value!r}, one name; expected --config.{key}="{meant!r}"')
        if key not in MAY_BE_NEGATIVE and any(
            isinstance(n, (int, float)) and not n >= 0 for n in numbers
        ):
            raise UserError(f"{key} is {value!r}; expected no negative number")
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            raise UserError(f"{key} is {value!r}; expected a finite number")
        if key in BELOW_ONE and value >= 1:
            raise UserError(f"{key} is {value!r}; expected a share from 0 to below 1")
        if key in PROBABILITIES and value > 1:
            raise UserError(f"{key} is {value!r}; expected a probability from 0 to 1")


def _leaves(value: Any) -> list[Any]:
    """All that is in a tuple, or in tuples in it; or the value itself."""
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, tuple) else [value]


INSTEAD = {
    "model.width": "model.features",
    "model.features": "model.width",
    "model.stem_strides": "model.strides",
    "model.strides": "model.stem_strides",
}
"""What sets the same of the networks that have no use for a key."""


def useless_keys(config: ConfigDict) -> list[str]:
    """Keys that this task, layout and model have no use for."""
    task, layout, model = config.task, config.data.layout, config.model.name
    augmentation = config.augmentation
    transforms = " ".join(f"augmentation.{key}" for key in augmentation if key != "enabled")
    segmentation, detection = task == "segmentation", task == "detection"
    keys = {
        "data.size data.fit": segmentation,
        "data.patch data.foreground data.masks": not segmentation,
        "evaluation.nsd_tolerance": not segmentation,
        "evaluation.overlap": task == "classification",
        "data.max_boxes model.levels model.head_features": not detection,
        "loss.box_weight evaluation.iou evaluation.score_threshold": not detection,
        "evaluation.operating_point evaluation.calibration evaluation.coverage": task
        != "classification",
        "evaluation.flips evaluation.dropout_samples": detection,
        "loss.label_smoothing": task != "classification",
        "loss.class_weights": detection or (segmentation and config.data.masks == "instance"),
        "model.width model.stem_strides": model == "unet",
        "model.features model.strides model.deep_supervision": model != "unet",
        "data.window": config.data.normalization != "window",
        "data.intensity.mean data.intensity.std data.intensity.clip": (
            config.data.normalization not in ("", "dataset")
        ),
        "data.kind data.ndim data.count data.extent": layout != "phantoms",
        "data.name data.download": layout not in ("medmnist", "tfds"),
        "data.path": layout == "phantoms",
        "data.label_column": layout != "class_folders",
        "optimizer.momentum": config.optimizer.name != "sgd",
        "augmentation.rotation augmentation.scale augmentation.translation": (
            not augmentation.affine
        ),
        "augmentation.flip": tuple(augmentation.flip_axes) == (-1,),
        transforms: not augmentation.enabled,
    }
    return [key for names, useless in keys.items() if useless for key in names.split()]


def check_fits(config: ConfigDict, info: DatasetInfo) -> None:
    """Refuse what would otherwise be found out when the network is built or first evaluated.

    Raises:
        UserError: naming the key.
    """
    _check_model(config)
    _check_shapes(config, info)
    _check_evaluation(config, info)
    _check_levels(config, info)


def _check_model(config: ConfigDict) -> None:
    if (config.model.name == "unet") != (config.task == "segmentation"):
        use = "unet" if config.task == "segmentation" else "resnet18, resnet34 or resnet50"
        raise UserError(f"model.name is {config.model.name!r}; for {config.task} use {use}")


def _check_shapes(config: ConfigDict, info: DatasetInfo) -> None:
    """Sizes have one positive number an axis, statistics one a channel."""
    for key in ("mean", "std"):
        value = tuple(config.data.intensity[key])
        if value and len(value) not in (1, config.data.channels):
            raise UserError(
                f"data.intensity.{key} is {value}; expected one number for each of the "
                f"{config.data.channels} channels"
            )
    for key in ("size", "patch", "spacing"):
        value = tuple(config.data[key])
        if value and (len(value) != info.ndim or min(value) <= 0):
            raise UserError(
                f"data.{key} is {value}; expected {info.ndim} positive numbers, one an axis, as in "
                f"--config.data.{key}={','.join(['64'] * info.ndim)}"
            )


def mirrored_axes(config: ConfigDict, info: DatasetInfo) -> tuple[int, ...]:
    """The spatial axes along which training may mirror images; none where it never does.

    Raises:
        UserError: for axes that the images do not have.
    """
    augmentation = config.augmentation
    axes = tuple(augmentation.flip_axes)
    if axes != (-1,) and any(axis not in range(info.ndim) for axis in axes):
        raise UserError(
            f"augmentation.flip_axes is {axes}; expected axes 0 to {info.ndim - 1}, or -1 for none"
        )
    if axes == (-1,) or not augmentation.enabled:
        return ()
    # Images have an upright: only left and right are swapped unless the config says more.
    return axes or ((1,) if info.ndim == 2 else (0,))


def _check_evaluation(config: ConfigDict, info: DatasetInfo) -> None:
    """What would otherwise be found out at the first evaluation."""
    if config.evaluation.flips and config.task == "detection":
        raise UserError(
            "evaluation.flips does not work for detection; set --config.evaluation.flips=false"
        )
    if config.evaluation.dropout_samples and config.task == "detection":
        raise UserError(
            "evaluation.dropout_samples does not work for detection; set it to 0, and train "
            "several models (--config.training.seeds=3)"
        )
    varied = "model.dropout" in config.training.vary
    if config.evaluation.dropout_samples and not config.model.dropout and not varied:
        raise UserError(
            "evaluation.dropout_samples needs a network that was trained with dropout; train with "
            "--config.model.dropout=0.2, or set it to 0"
        )
    mirrored = mirrored_axes(config, info) if config.augmentation.flip else ()
    if config.evaluation.flips and not mirrored:
        raise UserError(
            "evaluation.flips averages over mirrored images, and training mirrors none "
            "(augmentation.flip, flip_axes); set --config.evaluation.flips=false"
        )


def _check_levels(config: ConfigDict, info: DatasetInfo) -> None:
    """A patch can be halved as often as the U-Net does."""
    if config.model.name != "unet":
        return
    model = config.model
    levels = len(model.features)
    strides = tuple(model.strides) or (2,) * (levels - 1)
    if len(strides) != levels - 1:
        raise UserError(
            f"model.strides has {len(strides)} steps for the {levels} levels of model.features; "
            f"expected {levels - 1}"
        )
    factors = np.prod([per_axis(s, info.ndim) for s in strides] or [(1,) * info.ndim], axis=0)
    if any(side % factor for side, factor in zip(config.data.patch, factors, strict=True)):
        raise UserError(
            f"data.patch is {tuple(config.data.patch)}; the {levels} levels of the U-Net need "
            f"multiples of {tuple(factors.tolist())}"
        )
