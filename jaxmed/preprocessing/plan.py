"""Settings that follow from the data: sizes, normalisation, network and length of training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.types import DatasetInfo

# What two cores of a common server manage in training, in floating-point operations a second, by
# the axes of an image (64 to 95 GFLOP/s were measured in 2-D and 114 to 129 in 3-D), and for how
# long a planned training may run there. Planned lengths are the same on every device, so that
# results do not depend on where they were computed.
CPU_FLOPS = {2: 60e9, 3: 110e9}
SECONDS = 400.0
EPOCHS = (8, 150)


REASONS = {
    "data.channels": "as the images have",
    "data.normalization": (
        "8-bit pictures and CT mean the same in every image and share statistics; others, and all "
        "that is segmented but CT, are scaled each by itself"
    ),
    "data.intensity.mean": "of the training part",
    "data.intensity.std": "of the training part",
    "data.intensity.clip": "0.5 and 99.5 percentile in CT; nothing is cut elsewhere",
    "data.size": "the median image, shrunk to what a network can look at whole",
    "data.fit": "stretched where all images have one aspect, else padded",
    "data.patch": "as much of the median image as fits, in its proportions",
    "data.spacing": "the median, to which volumes with other voxels are brought",
    "data.batch_size": (
        "many small updates learn more in a given time than few large ones; fits the memory"
    ),
    "data.max_boxes": "half as many again as in the busiest image",
    "model.width": "moderate, for some minutes on two CPU cores",
    "model.stem_strides": "1 for sides of up to 40, 2 of up to 96, else 4",
    "model.levels": "the stages whose cells are as large as the objects",
    "model.head_features": "96 in 2-D, 48 in 3-D, where there are many cells",
    "model.features": "doubled at each level",
    "model.strides": "axes are halved until 4 voxels are left, thick ones later",
    "evaluation.nsd_tolerance": (
        "1 mm, which a voxel of unknown size counts as; where voxels are below 0.1 mm, one voxel"
    ),
    "training.steps": "some minutes on two CPU cores, within 8 to 150 epochs",
}
"""Why each setting is planned as it is."""


def plan_settings(
    fingerprint: Mapping[str, Any], info: DatasetInfo, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Values for the config keys that were left to the plan, save the length of training.

    Args:
        fingerprint: of the training part, see `fingerprint.take_fingerprint`.
        info: of the data set.
        given: the flat config; what is set in it stays and is built upon.

    Returns:
        flat settings such as `{"data.size": (64, 64)}`, only for keys that `given` leaves empty.
    """
    settings: dict[str, Any] = {"data.channels": info.channels}
    settings |= _intensity(fingerprint, info, given)
    if info.task == "segmentation":
        settings |= _segmentation(fingerprint, info, given)
    else:
        settings |= _whole_image(fingerprint, info, given)
    if info.task == "detection":
        # Room for images busier than the busiest one that was opened.
        settings["data.max_boxes"] = _round_up(fingerprint["max_boxes"] * 1.5 + 1, 8)
    return {key: value for key, value in settings.items() if is_open(given.get(key))}


def is_open(value: Any) -> bool:
    """Whether a setting is left to the plan: empty, or zero."""
    return value is None or value == () or value == "" or (value == 0 and value is not False)


def plan_steps(
    step_flops: Callable[[], float],
    *,
    ndim: int,
    cases: int,
    batch_size: int,
    epochs: tuple[int, int] = EPOCHS,
) -> int:
    """Length of training, in steps: what fits the time, but neither too few nor too many epochs.

    Args:
        step_flops: floating-point operations of one training step.
        ndim: spatial axes of an image.
        cases: of the training part.
        batch_size: cases a step.
        epochs: fewest and most.
    """
    affordable = SECONDS * CPU_FLOPS[ndim] / max(step_flops(), 1.0)
    epoch = max(1.0, cases / batch_size)
    return int(max(epochs[0] * epoch, min(affordable, epochs[1] * epoch), 50))


def _intensity(
    fingerprint: Mapping[str, Any], info: DatasetInfo, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Shared statistics where intensities mean the same in every image, its own ones elsewhere.

    Eight-bit pictures and Hounsfield units are comparable between images; MRI and microscopy with
    deeper pixels are not.
    """
    ct = is_ct(fingerprint, info)
    comparable = fingerprint["dtypes"] == ["uint8"] or ct
    normalization = "dataset" if comparable else "zscore"
    if info.task == "segmentation" and not ct:
        normalization = "zscore"  # stains and exposures differ more than a mask's meaning does
    normalization = given.get("data.normalization") or normalization
    if normalization != "dataset":
        return {"data.normalization": normalization}
    return {"data.normalization": normalization, **shared_statistics(fingerprint, clip=ct)}


def is_ct(fingerprint: Mapping[str, Any], info: DatasetInfo) -> bool:
    """Whether images are of Hounsfield units: as the data set says or, where not, by air."""
    said = re.findall(r"[A-Z]+", info.kind.upper())
    if any(word in said for word in ("CT", "MR", "MRI")):
        return "CT" in said and not any(word in said for word in ("MR", "MRI"))
    # Among pictures of 8 bits a single scan must not decide how all are scaled.
    return "uint8" not in fingerprint["dtypes"] and max(fingerprint["least"]) < -200


def shared_statistics(fingerprint: Mapping[str, Any], *, clip: bool) -> dict[str, Any]:
    """What scales the intensities of a whole set: one number a channel each.

    Args:
        fingerprint: of the training part.
        clip: whether to cut them first.
    """
    bounds = (fingerprint["low"], fingerprint["high"]) if clip else ()
    return {
        "data.intensity.mean": tuple(fingerprint["mean"]),
        "data.intensity.std": tuple(max(s, 1e-6) for s in fingerprint["std"]),
        "data.intensity.clip": tuple(tuple(bound) for bound in bounds),
    }


def _whole_image(
    fingerprint: Mapping[str, Any], info: DatasetInfo, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Size, ResNet and batch of tasks that see an image at once."""
    detection = info.task == "detection"
    shapes = np.asarray(fingerprint["shapes"])
    median = np.median(shapes, axis=0)
    longest: float = {2: 320 if detection else 128, 3: 64}[info.ndim]
    if detection and fingerprint["box_sizes"]:
        # Small objects must keep some 12 voxels, as far as the memory allows.
        wanted = median.max() * 12 / max(fingerprint["box_sizes"][0], 1)
        longest = float(np.clip(wanted, longest, 2 * longest))
    multiple = 16 if detection else 4
    shrink = min(1.0, longest / median.max())
    size = tuple(_round_up(side * shrink, multiple) for side in median)
    size = tuple(given.get("data.size") or size)
    stem = 1 if max(size) <= 40 else 2 if max(size) <= 96 else 4
    aspects = shapes / shapes.max(1, keepdims=True)
    uniform = bool(np.ptp(aspects, axis=0).max() < 0.05)
    voxels = math.prod(size) / stem**info.ndim
    settings: dict[str, Any] = {
        "data.size": size,
        "data.fit": "stretch" if uniform and not detection else "pad",
        "data.batch_size": _batch(voxels, fingerprint["cases"], most=16 if detection else 32),
        "model.width": 32 if info.ndim == 2 else 16,
        "model.stem_strides": stem,
    }
    if detection:
        settings |= {
            "model.levels": (1, 2, 3) if stem >= 2 or info.ndim == 3 else (2, 3),
            # The heads work at the finest level, where volumes have many cells.
            "model.head_features": 96 if info.ndim == 2 else 48,
        }
    return settings


def _segmentation(
    fingerprint: Mapping[str, Any], info: DatasetInfo, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Spacing, patch, U-Net levels and batch."""
    settings: dict[str, Any] = {}
    shapes = np.asarray(fingerprint["shapes"], float)
    spacing = np.asarray(fingerprint["spacing"])
    # Also where all have the same: volumes that are predicted may have another. What is only
    # assumed is nothing to resample to.
    if info.ndim == 3 and not fingerprint["unsized"]:
        settings["data.spacing"] = tuple(float(s) for s in spacing)
    target = np.asarray(given.get("data.spacing") or spacing)
    median = np.median(shapes, axis=0) * spacing / target
    patch = tuple(given.get("data.patch") or _patch(median, target, info.ndim))
    levels = len(given.get("model.features") or ()) or 6
    strides = tuple(given.get("model.strides") or _strides(patch, target)[: levels - 1])
    voxels = math.prod(patch)
    features = tuple(min(16 * 2**i, 256) for i in range(len(strides) + 1))
    settings |= {
        "data.patch": patch,
        "data.batch_size": _batch(voxels, fingerprint["cases"], most=8),
        "model.features": features,
        "model.strides": strides,
        # A millimetre is a voxel or so of a scan, but thousands of a microscope's.
        "evaluation.nsd_tolerance": 1.0 if target.max() >= 0.1 else float(target.max()),
    }
    return settings


def _patch(median: np.ndarray, spacing: np.ndarray, ndim: int) -> tuple[int, ...]:
    """As much of the median image as the budget of voxels holds, in the image's own proportions."""
    budget = {2: 192**2, 3: 56**3}[ndim]
    scale = min(1.0, (budget / math.prod(median)) ** (1 / ndim))
    fine = spacing.min()
    # A thick axis is halved fewer times, so its side needs fewer factors of two; and of a short
    # side rounding up by many voxels were much of the patch.
    multiples = [
        16 if s < 2 * fine and m >= 64 else 8 if m >= 16 else 4
        for s, m in zip(spacing, median, strict=True)
    ]
    return tuple(
        _round_up(side * scale, multiple) for side, multiple in zip(median, multiples, strict=True)
    )


def shrink_patch(
    patch: Sequence[int], strides: Sequence[Sequence[int] | int], *, factor: float
) -> tuple[int, ...]:
    """A patch smaller by `factor` along each axis, which a U-Net of these strides can still halve.

    >>> shrink_patch((128, 96), [(2, 2), (2, 2)], factor=0.7)
    (88, 64)
    """
    ones = np.ones(len(patch), int)
    multiples = np.prod([ones, *(ones * np.asarray(step) for step in strides)], axis=0).tolist()
    return tuple(
        max(m, int(side * factor) // m * m) for side, m in zip(patch, multiples, strict=True)
    )


def _strides(patch: Sequence[int], spacing: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Halve axes until they are some 4 voxels long, thick axes only once they are the finest."""
    sides, spacing = list(patch), np.array(spacing, float)
    strides: list[tuple[int, ...]] = []
    while len(strides) < 5:
        fine = spacing.min()
        can = [n % 2 == 0 and n // 2 >= 4 for n in sides]
        step = tuple(
            2 if able and s < 2 * fine else 1 for able, s in zip(can, spacing, strict=True)
        )
        if max(step) == 1:
            break
        strides.append(step)
        sides = [n // f for n, f in zip(sides, step, strict=True)]
        spacing = spacing * step
    return tuple(strides)


def _batch(voxels: float, cases: int, *, most: int) -> int:
    """A power of two: at most `most`, some 300,000 voxels, and a fifth of all cases.

    In a given time many updates from small batches learn more than a few from large ones.
    """
    return 2 ** int(math.log2(max(2, min(most, 300_000 / voxels, cases / 5))))


def _round_up(value: float, multiple: int) -> int:
    return max(multiple, math.ceil(value / multiple - 1e-6) * multiple)
