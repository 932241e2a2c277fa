import numpy as np
import pytest
from skimage.measure import label

from jaxmed.metrics.instances import overlapping_pairs, score_instances


def plain_scores(prediction, truth):
    """The definition, object by object."""
    ious = []
    ids = [set(np.unique(m)) - {0, -1} for m in (prediction, truth)]
    for p in ids[0]:
        for t in ids[1]:
            a, b = prediction == p, truth == t
            iou = (a & b).sum() / (a | b).sum()
            if iou > 0.5:
                ious.append(iou)
    tp, fp, fn = len(ious), len(ids[0]) - len(ious), len(ids[1]) - len(ious)
    return tp / (tp + fp + fn), sum(ious) / (tp + fp / 2 + fn / 2)


@pytest.mark.parametrize("shape", [(60, 60), (16, 16, 16)])
def test_equals_definition(shape):
    rng = np.random.default_rng(0)
    truth = label(rng.random(shape) < 0.25, connectivity=1)
    prediction = label((truth > 0) ^ (rng.random(shape) < 0.04), connectivity=1)
    got = score_instances(prediction, truth)
    expected = plain_scores(prediction, truth)
    assert 0 < expected[0] < 1
    assert list(got.values()) == pytest.approx(expected)


def test_numbers_are_only_names():
    rng = np.random.default_rng(1)
    truth = label(rng.random((40, 40)) < 0.3)
    renamed = rng.permutation(60_000)[: truth.max() + 1].astype("u2") + 1
    renamed[0] = 0
    got = score_instances(renamed[truth], truth.astype("i4"))
    assert got == {"instance_ap50": 1.0, "panoptic_quality": 1.0}


def test_by_hand_with_split_miss_and_false_alarm():
    truth, prediction = np.zeros((2, 10, 30), int)
    truth[:, :10] = 1  # cut into 6 and 4 columns: one match, IoU .6
    prediction[:, :6], prediction[:, 6:10] = 5, 6
    truth[:, 12:14] = 2  # missed
    got = score_instances(prediction, truth)
    assert got["instance_ap50"] == pytest.approx(1 / 3)
    assert got["panoptic_quality"] == pytest.approx(0.6 / (1 + 1 / 2 + 1 / 2))
    ious, predicted, true = overlapping_pairs(prediction, truth)
    assert sorted(ious) == pytest.approx([0.4, 0.6]) and (predicted, true) == (2, 2)


def test_exactly_one_half_is_no_match():
    truth = np.array([[1, 1, 0]])
    assert score_instances(np.array([[1, 0, 0]]), truth)["instance_ap50"] == 0


def test_ignored_pixels_and_empty_images():
    truth = np.array([[1, 1, -1, -1], [0, 0, -1, -1]])
    prediction = np.array([[1, 1, 1, 2], [0, 0, 1, 2]])
    assert score_instances(prediction, truth) == {"instance_ap50": 1.0, "panoptic_quality": 1.0}
    empty = np.zeros((4, 4), int)
    for ignored in (empty, empty - 1):
        assert np.isnan(list(score_instances(empty, ignored).values())).all()
    assert score_instances(np.eye(4, dtype=int), empty)["instance_ap50"] == 0
    assert score_instances(empty, np.eye(4, dtype=int))["panoptic_quality"] == 0
