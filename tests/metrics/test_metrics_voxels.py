"""Calibration of voxels: of masks drawn from known probabilities."""

import numpy as np
import pytest

from jaxmed.evaluation.calibration import apply_temperature
from jaxmed.evaluation.mask_decisions import (
    MaskDecisions,
    calibrate_masks_crosswise,
    score_calibrated,
)
from jaxmed.metrics.classification import expected_calibration_error
from jaxmed.metrics.voxels import VOXELS, mask_confidence, sample_voxels, score_voxels
from jaxmed.tasks.segmentation import Segmentation


def masks(cases, *, ndim=2, temperature=2.5, classes=3, seed=0):
    """Probabilities that are too sure by a factor, and masks drawn from the true ones."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(cases):
        logits = rng.normal(0, 1.5, (*[12] * ndim, classes))
        true = apply_temperature(np.exp(logits), 1.0)
        mask = (true.cumsum(-1) > rng.random((*true.shape[:-1], 1))).argmax(-1)
        found.append((apply_temperature(true, 1 / temperature), mask.astype(np.int32)))
    return found


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_temperature_of_masks_is_found_and_undone(ndim):
    rows = [sample_voxels(p, m, seed=i) for i, (p, m) in enumerate(masks(60, ndim=ndim))]
    assert max(len(row["voxel_labels"]) for row in rows) <= VOXELS
    fixed = MaskDecisions.fit(rows)
    np.testing.assert_allclose(fixed.temperature, 2.5, rtol=0.1)
    weights = np.ones((1, 60))
    calibrated = calibrate_masks_crosswise(rows, patients=[f"p{i // 2}" for i in range(60)])
    after = score_calibrated(rows, calibrated, weights=weights)
    before = score_calibrated(rows, [r["voxel_probabilities"] for r in rows], weights=weights)
    assert after["voxel_brier"] < before["voxel_brier"] - 0.02
    pooled = [
        score_voxels(np.concatenate(said), np.concatenate([r["voxel_labels"] for r in rows]))
        for said in ([r["voxel_probabilities"] for r in rows], calibrated)
    ]
    assert pooled[0]["voxel_ece"] > 0.1 and pooled[1]["voxel_ece"] < 0.03


def test_only_voxels_that_may_be_foreground_and_are_known_are_drawn():
    said = np.zeros((4, 5, 2))
    said[..., 1] = np.linspace(0, 0.095, 20).reshape(4, 5)
    said[..., 0] = 1 - said[..., 1]
    mask = np.zeros((4, 5), np.int32)
    mask[3, 4] = -1
    row = sample_voxels(said, mask, seed=0)
    np.testing.assert_allclose(row["voxel_probabilities"][:, 1], said[..., 1].ravel()[2:19])
    assert (row["voxel_labels"] == 0).all()
    empty = sample_voxels(said * 0 + [1, 0], mask, seed=0)
    assert np.isnan(score_voxels(**_named(empty))["voxel_ece"])
    assert MaskDecisions.fit([empty]) is None


def _named(row):
    return {"probabilities": row["voxel_probabilities"], "labels": row["voxel_labels"]}


def test_scores_by_hand():
    said = np.array([[0.1, 0.9], [0.1, 0.9], [0.3, 0.7], [0.3, 0.7]])
    found = score_voxels(said, np.array([1, 0, 1, 1]))
    right = np.array([True, False, True, True])
    ece = expected_calibration_error(right, said.max(1), np.ones((1, 4)))
    assert 0 < found["voxel_ece"] == ece < (0.8 + 0.6) / 4  # less than the plain gaps: chance
    np.testing.assert_allclose(found["voxel_brier"], (0.01 + 0.81 + 2 * 0.09) / 4)
    np.testing.assert_allclose(mask_confidence(said.reshape(2, 2, 2)), 0.8)
    np.testing.assert_allclose(mask_confidence(np.array([[0.9, 0.1], [0.7, 0.3]])), 0.8)


def test_the_task_notes_scores_and_summarises_voxels():
    task = Segmentation(["background", "a", "b"], surface_scores=False)
    rows = []
    for index, (said, mask) in enumerate(masks(6)):
        example = {"mask": mask, "index": np.int32(index), "spacing": np.ones(2, np.float32)}
        noted = task.observe(said, example)
        rows.append(task.score(said.argmax(-1), {**example, **noted}))
    described = task.describe(rows[0])
    assert "voxel_ece" in described and "voxel_labels" not in described
    found = task.summarize(rows, weights=np.ones((1, 6)))
    assert {"dice", "voxel_ece", "voxel_brier", "aurc"} <= found.keys()
    assert "confidence" not in found and 0 < found["aurc"][0] < 1
    # Scored without a network nothing is known of its confidence.
    plain = task.score(masks(1)[0][1], {"mask": masks(1)[0][1], "spacing": np.ones(2)})
    assert "aurc" not in task.summarize([plain], weights=np.ones((1, 1)))


def test_voxels_of_instances_are_of_the_classes_that_the_network_learns():
    task = Segmentation(["background", "cell"], instances=True)
    mask = np.zeros((9, 9), np.int32)
    mask[1:6, 1:6], mask[7, 7], mask[8] = 4, 9, -1
    said = np.full((9, 9, 3), 1 / 3)
    noted = task.observe(said, {"mask": mask, "index": np.int32(0)})
    counts = np.bincount(noted["voxel_labels"], minlength=3)
    # 3 x 3 voxels are inside of the large one; a single voxel, beside an ignored row, is border.
    assert counts.tolist() == [72 - 26, 9, 17]
    assert noted["voxel_probabilities"].shape == (72, 3)
