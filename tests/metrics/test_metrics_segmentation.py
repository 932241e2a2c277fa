import numpy as np
import pytest

from jaxmed.metrics import count_cases, mean_scores
from jaxmed.metrics import segmentation as sg

NAMES = ["background", "a", "b"]


def ball(radius, centre, shape=(40, 40, 40)):
    grid = np.indices(shape) - np.reshape(centre, (-1, *[1] * len(shape)))
    return (grid**2).sum(0) <= radius**2


def score(prediction, truth, *, spacing=None, names=NAMES, **options):
    spacing = spacing or (1.0,) * truth.ndim
    prediction, truth = (np.asarray(m).astype("i4") for m in (prediction, truth))
    return sg.score_masks(prediction, truth, spacing=spacing, class_names=names, **options)


def test_identical_masks_are_perfect():
    mask = np.where(ball(8, (20, 20, 20)), 1, 0) + np.where(ball(4, (5, 5, 5)), 2, 0)
    got = score(mask, mask)
    assert {got[f"{s}/{c}"] for s in ("dice", "iou", "nsd") for c in "ab"} == {1.0}
    assert got["hd95"] == got["hd95/a"] == 0 and got["dice"] == 1


def test_shifted_box_by_hand():
    truth, prediction = np.zeros((2, 20, 20), int)
    truth[2:12, 2:12], prediction[2:12, 5:15] = 1, 1
    got = score(prediction, truth, names=NAMES[:2], spacing=(1.0, 2.0), tolerance=5.0)
    assert got["dice"] == pytest.approx(0.7) and got["iou"] == pytest.approx(70 / 130)
    # 36 surface voxels; a side of ten lies 3 voxels of 2 mm off: more than 5 % of them.
    assert got["hd95"] == pytest.approx(6.0)
    # Beyond 5 mm: the column of 10 that sticks out, less its two ends' neighbours.
    outward, inward = sg.surface_distances(prediction == 1, truth == 1, spacing=(1.0, 2.0))
    assert len(outward) == len(inward) == 36
    beyond = (outward > 5).sum() + (inward > 5).sum()
    assert got["nsd"] == pytest.approx(1 - beyond / 72) and beyond == 20
    assert score(prediction, truth, names=NAMES[:2], spacing=(1.0, 2.0), tolerance=6)["nsd"] == 1


def test_concentric_spheres_have_distance_of_their_radii():
    truth, prediction = (ball(r, (20, 20, 20)) for r in (15, 10))
    got = score(prediction, truth, names=NAMES[:2], spacing=(0.5, 0.5, 0.5), tolerance=1.0)
    assert got["hd95"] == pytest.approx(2.5, abs=0.5)  # to within a voxel
    assert got["nsd"] == 0
    assert got["dice"] == pytest.approx(2 * 10**3 / (15**3 + 10**3), abs=0.01)


def test_gap_of_ten_millimetres_between_plates():
    truth, prediction = np.zeros((2, 30, 8, 8), int)
    truth[5], prediction[10] = 1, 1
    got = score(prediction, truth, names=NAMES[:2], spacing=(2.0, 1.0, 1.0))
    assert got["hd95"] == 10 and got["dice"] == 0


def test_distances_equal_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 9, 8, 7)) < 0.4
    spacing = np.array([1.0, 0.5, 3.0])

    def surface(mask):
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(3):
            for shift in (1, -1):
                inner &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inner) * spacing

    pa, pb = surface(a), surface(b)
    table = np.linalg.norm(pa[:, None] - pb[None], axis=-1)
    outward, inward = sg.surface_distances(a, b, spacing=spacing)
    np.testing.assert_allclose(outward, table.min(1))
    np.testing.assert_allclose(inward, table.min(0))


def test_rule_of_empty_masks():
    empty, full = np.zeros((30, 40), int), np.zeros((30, 40), int)
    full[3:6, 4:9] = 1
    diagonal = np.hypot(30 * 2, 40 * 1)
    for prediction, truth in ((full, empty), (empty, full)):
        got = score(prediction, truth, spacing=(2.0, 1.0))
        assert got["dice/a"] == got["iou/a"] == got["nsd/a"] == 0
        assert got["hd95/a"] == pytest.approx(diagonal)
        # Class b is in neither: it counts in no mean.
        assert np.isnan(got["dice/b"]) and got["dice"] == 0
    nothing = score(empty, empty)
    assert all(np.isnan(v) for v in nothing.values())


def test_a_missed_structure_lowers_the_surface_scores_of_a_set():
    """Leaving it out of the means, as NaN, would reward giving hard cases up."""
    truth = np.zeros((30, 40), int)
    truth[3:9, 4:12] = 1
    rough = np.roll(truth, 3, axis=0)
    fair, missed = (score(p, truth, names=NAMES[:2]) for p in (rough, np.zeros_like(truth)))
    ones = np.ones((1, 3))
    with_it, without = (
        {k: v[0] for k, v in mean_scores([fair, fair, case], weights=ones).items()}
        for case in (fair, missed)
    )
    assert without["nsd"] < with_it["nsd"] and without["nsd/a"] < with_it["nsd/a"]
    assert without["hd95"] > with_it["hd95"] and without["dice"] < with_it["dice"]
    assert count_cases([fair, fair, missed])["hd95"] == 3


def test_ignored_voxels_change_nothing():
    rng = np.random.default_rng(1)
    truth, prediction = rng.integers(0, 3, (2, 12, 12))
    truth[:, 9:] = -1
    other = prediction.copy()
    other[:, 9:] = rng.integers(0, 3, (12, 3))
    assert score(prediction, truth) == score(other, truth)
    cut = score(prediction[:, :9], truth[:, :9])
    got = score(prediction, truth)
    assert cut == pytest.approx(got)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_dimensions_equal_three_of_depth_one(axis):
    rng = np.random.default_rng(2)
    truth, prediction = rng.integers(0, 3, (2, 12, 15))
    prediction[prediction == 2] = 0
    deep = [np.expand_dims(m, axis) for m in (prediction, truth)]
    spacing = [0.7, 2.0]
    got = score(prediction, truth, spacing=tuple(spacing))
    thick = spacing.copy()
    thick.insert(axis, 0.001)
    assert score(*deep, spacing=tuple(thick)) == pytest.approx(got)


def test_mean_over_cases_skips_undefined_and_counts():
    rows = [{"dice": 0.5, "dice/a": 0.5}, {"dice": float("nan"), "dice/a": 1.0}, {"dice": 1.0}]
    weights = np.array([[1.0, 1, 1], [2, 5, 0], [0, 3, 0]], "f4")
    got = mean_scores(rows, weights=weights)
    np.testing.assert_allclose(got["dice"], [0.75, 0.5, np.nan])
    np.testing.assert_allclose(got["dice/a"], [0.75, 6 / 7, 1.0])
    assert count_cases(rows) == {"dice": 2, "dice/a": 2}
