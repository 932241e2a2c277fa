"""What the validation part fixes of a segmentation: the temperature of its voxels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmed.data.splits import k_folds
from jaxmed.evaluation.calibration import apply_temperature, fit_temperature
from jaxmed.evaluation.decisions import FOLDS
from jaxmed.metrics import mean_scores
from jaxmed.metrics.voxels import score_voxels
from jaxmed.types import Row


@dataclasses.dataclass(frozen=True)
class MaskDecisions:
    """Of a segmentation by classes. Masks stay as they are: a temperature keeps the order.

    Attributes:
        temperature: of the probabilities of voxels that may be foreground, see
            `jaxmed.metrics.voxels`.
    """

    temperature: float

    @classmethod
    def fit(cls, rows: Sequence[Row]) -> MaskDecisions | None:
        """Fix it on the sampled voxels of cases that nothing was trained on; None without any."""
        labels = np.concatenate([row["voxel_labels"] for row in rows])
        if not len(labels):
            return None
        said = np.concatenate([row["voxel_probabilities"] for row in rows])
        return cls(fit_temperature(labels, said))

    def decide(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Calibrated probabilities (voxels, classes) of each case's sampled voxels."""
        return [apply_temperature(row["voxel_probabilities"], self.temperature) for row in rows]


def calibrate_masks_crosswise(
    rows: Sequence[Row], *, patients: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Each fifth of the cases calibrated by the others' temperature, patients kept whole.

    Raises:
        UserError: there are too few cases or patients.
    """
    found = [row["voxel_probabilities"] for row in rows]
    ids = [str(i) for i in range(len(rows))]
    for own, held in k_folds(ids, patients=patients, folds=FOLDS, seed=0):
        fixed = MaskDecisions.fit([rows[i] for i in own])
        if fixed is not None:
            for i, said in zip(held, fixed.decide([rows[i] for i in held]), strict=True):
                found[i] = said
    return found


def score_calibrated(
    rows: Sequence[Row], calibrated: Sequence[np.ndarray], *, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """`voxel_ece` and `voxel_brier`, means over cases, under each row of weights."""
    pairs = zip(rows, calibrated, strict=True)
    return mean_scores([score_voxels(p, row["voxel_labels"]) for row, p in pairs], weights=weights)
