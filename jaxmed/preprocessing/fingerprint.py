"""What a data set is like, measured on its training part; and a digest of the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.data.formats.common import UNSIZED
from jaxmed.data.sources.base import read_noted
from jaxmed.preprocessing.spatial import convert_channels
from jaxmed.types import Source, UserError

VOXELS_AN_IMAGE = 20_000


def take_fingerprint(
    source: Source, rows: Sequence[int], *, channels: int = 0, limit: int = 200
) -> dict[str, Any]:
    """Measure shapes, spacings, intensities and labels of the given rows.

    Args:
        source: the data set.
        rows: of the training part only, so that nothing of the other parts leaks into the plan.
        channels: to which images are converted first; 0 keeps their own.
        limit: images that are opened at most, spread evenly; counts are of these.

    Returns:
        plain numbers and lists, ready for JSON: `cases`, `opened`, `shapes` (one an opened image),
        `spacing` (median), `unsized` (how many of the opened do not state theirs), `dtypes`,
        `mean`, `std`, `low`, `high` (each channel: 0.5 and 99.5 percentile), `class_counts` (boxes
        or voxels a class, or images of the whole part), `max_boxes` and `box_sizes` (5, 50 and 95
        percentile of the longest side).
    """
    rng = np.random.default_rng(0)
    chosen = _spread(rows, limit)
    shapes, spacings, dtypes, voxels, unsized = [], [], set(), [], 0
    counts = np.zeros(len(source.info.class_names), np.int64)
    boxes, box_sides = [0], []
    for row in chosen:
        example, notes = read_noted(source, row)
        unsized += UNSIZED in notes
        if channels:
            example = convert_channels(example, channels=channels)
        image = example["image"]
        shapes.append(list(image.shape[:-1]))
        spacings.append(example["spacing"])
        dtypes.add(str(image.dtype))
        flat = image.reshape(-1, image.shape[-1])
        # At random: a regular stride would fall in step with the columns of an image.
        sample = rng.integers(0, len(flat), min(len(flat), VOXELS_AN_IMAGE))
        voxels.append(flat[sample].astype(np.float32))
        counts += _class_counts(example, source.info.instances, len(counts))
        if "boxes" in example:
            low, high = np.split(example["boxes"], 2, axis=-1)
            boxes.append(len(low))
            box_sides.extend((high - low).max(-1, initial=0).tolist())
    if source.labels is not None:  # all of the part, not only what was opened
        known = np.asarray([source.labels[row] for row in rows])
        one_hot = known if known.ndim == 2 else known[:, None] == np.arange(len(counts))
        counts = one_hot.sum(0)
    return {
        "cases": len(rows),
        "opened": len(chosen),
        "shapes": shapes,
        "spacing": np.median(spacings, axis=0).tolist(),
        "unsized": unsized,
        "dtypes": sorted(dtypes),
        **_intensity(np.concatenate(voxels)),
        "class_counts": counts.tolist(),
        "max_boxes": max(boxes),
        "box_sizes": np.percentile(box_sides, (5, 50, 95)).tolist() if box_sides else [],
    }


def _spread(rows: Sequence[int], limit: int) -> list[int]:
    places = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    return [int(rows[i]) for i in places]


def _class_counts(example: dict[str, np.ndarray], instances: bool, classes: int) -> np.ndarray:
    if "label" in example:
        label = example["label"]
        return label.astype(np.int64) if label.ndim else np.bincount(label[None], minlength=classes)
    if "box_label" in example:
        labels = example["box_label"]
    else:
        mask = example["mask"]
        labels = (mask > 0) * 1 if instances else mask
    return np.bincount(labels[labels >= 0].ravel(), minlength=classes)


def _intensity(voxels: np.ndarray) -> dict[str, list[float]]:
    low, high = np.percentile(voxels, (0.5, 99.5), axis=0)
    return {
        "mean": voxels.mean(0, dtype=np.float64).tolist(),
        "std": voxels.std(0, dtype=np.float64).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "least": voxels.min(0).tolist(),
    }


def digest(source: Source, *, limit: int = 32) -> str:
    """A SHA-256 that is equal for equal data, wherever they lie.

    It covers the ids, the given parts, and images and labels of up to `limit` cases; of one that
    cannot be read, that it cannot.
    """
    content = hashlib.sha256()
    info = source.info
    content.update(repr((info.task, info.ndim, info.class_names, list(source.ids))).encode())
    content.update(repr({part: list(rows) for part, rows in source.parts.items()}).encode())
    for row in _spread(range(len(source)), limit):
        try:
            example = source[row]
        except UserError:
            content.update(b"broken")
            continue
        for key in sorted(example):
            content.update(key.encode() + np.ascontiguousarray(example[key]).tobytes())
    return content.hexdigest()
