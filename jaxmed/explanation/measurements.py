"""Radiomics-like measurements of what was segmented, and how much each tells of a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from skimage.measure import regionprops_table
from sklearn.ensemble import RandomForestClassifier
from sklearn.inspection import permutation_importance

MEASURED = (
    "area",
    "equivalent_diameter_area",
    "axis_major_length",
    "extent",
    "intensity_mean",
    "intensity_std",
    "intensity_min",
    "intensity_max",
)
"""Properties of `skimage.measure.regionprops` that images and volumes have in common."""


def measure(
    mask: np.ndarray, image: np.ndarray, *, spacing: Sequence[float] | np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Measure each class or instance of a mask.

    Args:
        mask: (*spatial) of whole numbers; 0 is background, and negative numbers too.
        image: (*spatial, channels) on the same grid.
        spacing: mm a voxel; lengths are in mm, `area` in square or cubic mm.

    Returns:
        For each number in the mask `label`, the `MEASURED`, and of several channels their
        intensities as `intensity_mean-0` and so on.
    """
    labels = np.maximum(mask, 0).astype(np.int32)
    # Of a flat region the axes are not defined in 3-D, which regionprops tells by a warning.
    with np.errstate(invalid="ignore", divide="ignore"):
        table = regionprops_table(
            labels,
            intensity_image=image[..., 0] if image.shape[-1] == 1 else image,
            properties=("label", *MEASURED),
            spacing=None if spacing is None else tuple(float(mm) for mm in spacing),
        )
    rows = zip(*(values.tolist() for values in table.values()), strict=True)
    return [dict(zip(table, row, strict=True)) for row in rows]


def measurement_importance(
    table: Sequence[Mapping[str, Any]], labels: Sequence[int], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Permutation importance of measurements for a label, in a forest on held-out cases.

    Half of the cases, drawn at random within each label, grow the forest; on the others the fall in
    accuracy is measured when the values of a measurement are shuffled (Breiman 2001).

    Args:
        table: one row a case, all of the same names.
        labels: one a case.
        seed: of halves, forest and shuffles.

    Returns:
        by name, `value` the mean fall and `std` over 30 shuffles, and `n` the cases held out.

    Raises:
        ValueError: fewer than four cases of a label.
    """
    classes, given = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) < 2 or np.bincount(given).min() < 4:
        raise ValueError("expected two labels or more, of four cases each at least")
    names = list(table[0])
    values = np.array([[row[name] for name in names] for row in table], np.float64)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(given), bool)
    for number in range(len(classes)):
        own = rng.permutation(np.flatnonzero(given == number))
        held[own[: len(own) // 2]] = True
    forest = RandomForestClassifier(200, random_state=seed).fit(values[~held], given[~held])
    found = permutation_importance(
        forest, values[held], given[held], n_repeats=30, random_state=seed
    )
    pairs = zip(names, found.importances_mean, found.importances_std, strict=True)
    return {
        name: {"value": float(mean), "std": float(std), "n": int(held.sum())}
        for name, mean, std in pairs
    }
