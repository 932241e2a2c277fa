"""Boxes of tiles: every point has one core, and suppression is that of the device."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.boxes import nms
from jaxmed.inference.sliding_window import window_regions
from jaxmed.inference.tiles import cores, merge_boxes


@hypothesis.given(
    st.tuples(st.integers(10, 90), st.integers(10, 90)),
    st.tuples(st.integers(5, 10), st.integers(5, 10)),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_every_point_is_in_one_core_and_its_tile(shape, tile, overlap):
    regions = window_regions(shape, tile, overlap=overlap)
    points = np.random.default_rng(0).uniform(0, shape, (200, 2))
    held = np.stack([core.holds(np.tile(points, 2)) for core in cores(regions)])
    assert (held.sum(0) == 1).all()
    for region, inside in zip(regions, held, strict=True):
        for axis, part in enumerate(region):
            assert (points[inside, axis] >= part.start).all()
            assert (points[inside, axis] <= part.stop).all()


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.6, 1.0])
def test_suppression_over_tiles_is_that_of_the_device(ndim, threshold):
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 60, (300, ndim))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 30, (300, ndim))], 1).astype(np.float32)
    scores = rng.permutation(300).astype(np.float32)
    labels = rng.integers(0, 2, 300).astype(np.int32)
    each = [
        {"boxes": boxes[i : i + 1], "scores": scores[i : i + 1], "labels": labels[i : i + 1]}
        for i in range(300)
    ]
    merged = merge_boxes(each, iou_threshold=threshold)
    given = map(jnp.asarray, (boxes, scores, labels))
    rows, found = nms(*given, iou_threshold=threshold, max_boxes=300)
    rows = np.asarray(rows)[np.asarray(found)]
    np.testing.assert_array_equal(merged["boxes"], boxes[rows])
    np.testing.assert_array_equal(merged["scores"], scores[rows])
    np.testing.assert_array_equal(merged["labels"], labels[rows])


def test_boxes_of_one_tile_stay_and_no_boxes_are_no_boxes():
    same = {
        "boxes": np.array([[0, 0, 9, 9], [0, 0, 9, 9]], np.float32),
        "scores": np.array([0.25, 0.5], np.float32),
        "labels": np.zeros(2, np.int32),
    }
    none = {key: value[:0] for key, value in same.items()}
    assert merge_boxes([same, none], iou_threshold=0.5)["scores"].tolist() == [0.5, 0.25]
    np.testing.assert_allclose(merge_boxes([same, none], iou_threshold=0.5)["boxes"].shape, (2, 4))
    assert len(merge_boxes([none], iou_threshold=0.5)["scores"]) == 0
