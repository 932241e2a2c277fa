"""How far the probabilities of a mask mean what they say, voxel by voxel.

Most voxels are background beyond doubt, and would make any network look well calibrated. What
counts are the voxels that may be foreground: those with a probability of at least `DOUBT`. Which
they are depends on the probabilities alone, so that calibrated ones stay calibrated among them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jaxmed.metrics.classification import expected_calibration_error
from jaxmed.types import Row

DOUBT = 0.01
"""Probability of not being background."""
VOXELS = 1000
"""Of a case at most, drawn at random: rows of all cases are held in memory."""


def sample_voxels(
    probabilities: Float[np.ndarray, "*spatial classes"],
    mask: Int[np.ndarray, " *spatial"],
    *,
    seed: int,
) -> Row:
    """Some of the voxels of a case that may be foreground, and whose truth is known.

    Args:
        probabilities: on the grid of `mask`, the background first.
        mask: class numbers; -1 is unknown.
        seed: of the draw.

    Returns:
        `voxel_probabilities` (voxels, classes) and `voxel_labels` (voxels,).
    """
    places = np.flatnonzero((mask >= 0) & (probabilities[..., 0] <= 1 - DOUBT))
    if len(places) > VOXELS:
        places = np.random.default_rng(seed).choice(places, VOXELS, replace=False, shuffle=False)
    found = probabilities.reshape(-1, probabilities.shape[-1])[places]
    return {
        "voxel_probabilities": found.astype(np.float32),
        "voxel_labels": mask.reshape(-1)[places].astype(np.int32),
    }


def score_voxels(
    probabilities: Float[np.ndarray, "voxels classes"], labels: Int[np.ndarray, " voxels"]
) -> dict[str, float]:
    """`voxel_ece`, of the likeliest class, and `voxel_brier` of one case; NaN without voxels.

    Of the error what chance adds among so many voxels is taken off, as if they were independent; in
    a mean over cases that are all calibrated some of it remains, since no error is below 0.
    """
    if not len(labels):
        return {"voxel_ece": np.nan, "voxel_brier": np.nan}
    right = probabilities.argmax(axis=1) == labels
    ones = np.ones((1, len(labels)))
    ece = expected_calibration_error(right, probabilities.max(axis=1), ones)[0]
    truth = labels[:, None] == np.arange(probabilities.shape[1])
    brier = ((probabilities - truth) ** 2).sum(axis=1).mean() / 2
    return {"voxel_ece": float(ece), "voxel_brier": float(brier)}


def mask_confidence(probabilities: Float[np.ndarray, "*spatial classes"]) -> float:
    """Mean probability of what each voxel is taken for, over the foreground that is predicted.

    Over all voxels where there is none.
    """
    surest = probabilities.max(axis=-1)
    foreground = probabilities.argmax(axis=-1) > 0
    return float(surest[foreground].mean() if foreground.any() else surest.mean())
