"""Radiomics-like measurements of what was segmented, and how much each tells of a label."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from skimage.measure import regionprops_table
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedGroupKFold

from jaxmed.evaluation.bootstrap import Interval, bootstrap_weights, intervals
from jaxmed.metrics import divide

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
_TREES = 100
FEWEST = 4
"""Cases of a label, or patients where they are known, that importance can be told of."""


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


def summarize_mask(
    mask: np.ndarray,
    image: np.ndarray,
    *,
    spacing: Sequence[float] | np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, float]:
    """The measurements of a mask as one row, so that cases make a table.

    Args:
        mask: (*spatial) of whole numbers; 0 is background, and negative numbers too.
        image: (*spatial, channels) on the same grid.
        spacing: mm a voxel.
        class_names: of the numbers, the background first; without them they are instances.

    Returns:
        Of classes `area/CLASS` and so on, NaN but for an area of 0 where a class is absent. Of
        instances their number `objects`, and of each measurement `area mean` and `area sd` over
        them (ddof 0), NaN where there is none.
    """
    rows = {int(row.pop("label")): row for row in measure(mask, image, spacing=spacing)}
    intensities = [name for name in MEASURED if name.startswith("intensity")]
    channels = image.shape[-1]
    names = [name for name in MEASURED if name not in intensities]
    names += [
        name if channels == 1 else f"{name}-{channel}"
        for name in intensities
        for channel in range(channels)
    ]
    if class_names:
        empty = dict.fromkeys(names, np.nan) | {"area": 0.0}
        return {
            f"{name}/{class_name}": float(rows.get(number, empty)[name])
            for number, class_name in enumerate(class_names)
            if number
            for name in names
        }
    told = {"objects": float(len(rows))}
    for name in names:
        values = np.array([row[name] for row in rows.values()], np.float64)
        told[f"{name} mean"] = float(values.mean()) if len(values) else np.nan
        told[f"{name} sd"] = float(values.std()) if len(values) else np.nan
    return told


def measurement_importance(
    table: Sequence[Mapping[str, float]],
    labels: Sequence[int],
    *,
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    shuffles: int = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How well measurements tell a label, all together, each less, and each alone.

    Random forests (Breiman 2001, doi 10.1023/A:1010933404324) tell it; each case is tested once, by
    a forest grown on the other folds. The fall in accuracy where a measurement is shuffled among
    the tested cases is its permutation importance. Of measurements that say the same it is small,
    as the others stand in; how well each tells the label alone shows them. Intervals are of the
    cases under these forests, not of what other forests would find.

    Args:
        table: one row a case, all of the same names; NaN where a measurement is undefined.
        labels: one a case.
        groups: a patient (or other cluster) a case, whose cases stay in one fold and are drawn
            together.
        folds: at most; fewer where a label has fewer cases or groups.
        shuffles: of each measurement.
        resamples: of the bootstrap.
        seed: of folds, forests, shuffles and resamples.

    Returns:
        `accuracy` of the forests, and by name `fall` and `alone` (accuracy), all with intervals.

    Raises:
        ValueError: fewer than two labels, or than `FEWEST` cases (groups) of one.
    """
    classes, given = np.unique(np.asarray(labels), return_inverse=True)
    numbers: dict[Hashable, int] = {}
    named = range(len(given)) if groups is None else groups
    clusters = np.array([numbers.setdefault(name, len(numbers)) for name in named])
    counts = [len(np.unique(clusters[given == number])) for number in range(len(classes))]
    if len(counts) < 2 or min(counts) < FEWEST:
        raise ValueError(f"expected two labels or more, of {FEWEST} cases (patients) each at least")
    names = list(table[0])
    values = np.array([[row[name] for name in names] for row in table], np.float64)
    rng = np.random.default_rng(seed)
    right = np.zeros(len(given))
    shuffled, alone = np.zeros((2, len(names), len(given)))
    cut = StratifiedGroupKFold(min(folds, *counts), shuffle=True, random_state=seed)
    for grown, tested in cut.split(values, given, clusters):
        # A forest takes NaN, but no column that holds nothing else.
        known = np.isfinite(values[grown]).any(axis=0)
        tell = _grow(values[grown][:, known], given[grown], seed)
        own, truth = values[tested][:, known], given[tested]
        right[tested] = tell(own) == truth
        shuffled[:, tested] = right[tested]
        commonest = np.bincount(given[grown]).argmax()
        alone[:, tested] = truth == commonest
        for place, column in enumerate(np.flatnonzero(known)):
            changed = np.tile(own, (shuffles, 1))
            drawn = [rng.permutation(own[:, place]) for _ in range(shuffles)]
            changed[:, place] = np.concatenate(drawn)
            shuffled[column, tested] = (tell(changed).reshape(shuffles, -1) == truth).mean(axis=0)
            one = _grow(values[grown][:, [column]], given[grown], seed)
            alone[column, tested] = one(own[:, [place]]) == truth
    weights = bootstrap_weights(
        len(given), groups=clusters.tolist(), resamples=resamples, seed=seed
    ).astype(np.float64)

    def told(rows: np.ndarray) -> dict[str, Interval]:
        means = divide(weights @ rows.T, weights.sum(axis=1, keepdims=True))
        samples = dict(zip(names, means.T, strict=True))
        return intervals(samples, cases=len(given), groups=len(numbers))

    accuracy = told(np.tile(right, (len(names), 1)))[names[0]]
    return {"accuracy": accuracy, "fall": told(right - shuffled), "alone": told(alone)}


def _grow(values: np.ndarray, labels: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """What a forest grown on these cases takes others for."""
    return RandomForestClassifier(_TREES, random_state=seed).fit(values, labels).predict
