import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import boxes as bx


def random_boxes(rng, n, ndim, size=50.0):
    low = rng.uniform(0, size, (n, ndim))
    return np.concatenate([low, low + rng.uniform(1, size / 2, (n, ndim))], axis=1).astype("f4")


def plain_iou(a, b):
    ndim = len(a) // 2
    sides = [min(a[ndim + i], b[ndim + i]) - max(a[i], b[i]) for i in range(ndim)]
    inter = np.prod([max(s, 0) for s in sides])
    volume = [np.prod([x[ndim + i] - x[i] for i in range(ndim)]) for x in (a, b)]
    return inter / (sum(volume) - inter)


def plain_nms(boxes, scores, labels, threshold):
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        clash = [labels[i] == labels[j] and plain_iou(boxes[i], boxes[j]) > threshold for j in kept]
        if not any(clash):
            kept.append(i)
    return kept


def as_3d(boxes):
    """The same boxes in a volume of depth one."""
    n = len(boxes)
    low, high = np.split(boxes, 2, axis=1)
    return np.concatenate([low, np.zeros((n, 1)), high, np.ones((n, 1))], axis=1).astype("f4")


@pytest.mark.parametrize("ndim", [2, 3])
def test_iou_equals_plain_python(ndim):
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 7, ndim), random_boxes(rng, 5, ndim)
    expected = [[plain_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(bx.pairwise_iou(jnp.array(a), jnp.array(b)), expected, atol=1e-5)


def test_volume_iou_and_giou_by_hand():
    a = jnp.array([[0.0, 0, 2, 2]])
    b = jnp.array([[1.0, 1, 3, 3]])
    assert bx.volume(a) == 4
    assert bx.volume(jnp.array([3.0, 3, 2, 5])) == 0
    np.testing.assert_allclose(bx.pairwise_iou(a, b), [[1 / 7]], rtol=1e-6)
    np.testing.assert_allclose(bx.giou(a, b), [1 / 7 - 2 / 9], rtol=1e-6)
    # Apart: IoU is 0, the hull of volume 9 is empty but for 2.
    apart = bx.giou(jnp.array([0.0, 0, 1, 1]), jnp.array([2.0, 2, 3, 3]))
    np.testing.assert_allclose(apart, -7 / 9, rtol=1e-6)


def test_two_dimensions_equal_three_of_depth_one():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 30, 2), random_boxes(rng, 30, 2)
    flat, deep = (jnp.array(a), jnp.array(b)), (jnp.array(as_3d(a)), jnp.array(as_3d(b)))
    np.testing.assert_allclose(bx.pairwise_iou(*flat), bx.pairwise_iou(*deep), atol=1e-6)
    np.testing.assert_allclose(bx.giou(*flat), bx.giou(*deep), atol=1e-5)
    scores = jnp.array(rng.random(30, "f4"))
    for x, y in zip(bx.nms(flat[0], scores), bx.nms(deep[0], scores), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("classes", [1, 3])
def test_nms_equals_plain_greedy(ndim, classes):
    rng = np.random.default_rng(2)
    boxes = random_boxes(rng, 200, ndim, size=20.0)
    scores = rng.random(200, "f4").round(1)  # with ties
    labels = rng.integers(0, classes, 200).astype("i4")
    expected = plain_nms(boxes, scores, labels, 0.3)
    args = jnp.array(boxes), jnp.array(scores), jnp.array(labels)
    index, keep = bx.nms(*args, iou_threshold=0.3, max_boxes=250)
    assert index[keep].tolist() == expected
    index, keep = bx.nms(*args, iou_threshold=0.3, max_boxes=5)
    assert index.tolist() == expected[:5] and keep.all()


def test_nms_under_jit_and_vmap_with_padding():
    rng = np.random.default_rng(3)
    boxes = jnp.array(random_boxes(rng, 120, 2).reshape(4, 30, 4))
    scores = jnp.array(rng.random((4, 30), "f4")).at[:, 20:].set(-jnp.inf)
    labels = jnp.array(rng.integers(0, 2, (4, 30)).astype("i4")).at[:, :5].set(-1)
    index, keep = jax.jit(jax.vmap(lambda *x: bx.nms(*x, max_boxes=40)))(boxes, scores, labels)
    for i in range(4):
        got = index[i][keep[i]].tolist()
        rows = slice(5, 20)
        expected = plain_nms(*(np.array(x[i][rows]) for x in (boxes, scores, labels)), 0.5)
        assert got == [5 + j for j in expected]


def test_nms_keeps_empty_boxes_once_and_skips_nan():
    boxes = jnp.zeros((3, 4))
    index, keep = bx.nms(boxes, jnp.array([0.5, jnp.nan, 0.9]), max_boxes=4)
    assert index[keep].tolist() == [2, 0]


@pytest.mark.parametrize("ndim", [2, 3])
def test_distances_round_trip(ndim):
    boxes = jnp.array(random_boxes(np.random.default_rng(4), 10, ndim))
    points = bx.centres(boxes)
    distances = bx.encode_distances(points, boxes)
    assert (distances > 0).all()
    np.testing.assert_allclose(bx.decode_distances(points, distances), boxes, atol=1e-5)


def test_grid_points_and_clip():
    points = bx.grid_points((2, 3), stride=4)
    np.testing.assert_array_equal(points[:4], [[2, 2], [2, 6], [2, 10], [6, 2]])
    anisotropic = bx.grid_points((1, 1, 2), stride=(1, 2, 4))
    np.testing.assert_array_equal(anisotropic, [[0.5, 1, 2], [0.5, 1, 6]])
    clipped = bx.clip_boxes(jnp.array([[-1.0, 2, 5, 9], [20, 20, 30, 30]]), (4, 8))
    np.testing.assert_array_equal(clipped, [[0, 2, 4, 8], [4, 8, 4, 8]])
    assert bx.volume(clipped)[1] == 0


def test_gradients_are_finite_for_degenerate_boxes():
    pairs = jnp.array([[0.0, 0, 0, 0], [5, 5, 1, 1], [0, 0, 2, 2]])
    grad = jax.grad(lambda x: bx.giou(x, pairs[::-1]).sum())(pairs)
    assert jnp.isfinite(grad).all()


def test_fused_boxes_are_what_the_models_agree_on():
    found = [[[0, 0, 10, 10], [20, 20, 30, 30]], [[0, 0, 10, 12], [50, 50, 60, 60]]]
    scores = jnp.array([[0.9, 0.8], [0.3, 0.2]])
    labels = jnp.array([[1, 0], [1, -1]])
    boxes, fused, names = jax.jit(bx.fuse_boxes, static_argnames="max_boxes")(
        jnp.array(found, jnp.float32), scores, labels, max_boxes=3
    )
    # Both saw the first, of which the surer one weighs more; one saw the second; padding is none.
    np.testing.assert_allclose(boxes[0], [0, 0, 10, (0.9 * 10 + 0.3 * 12) / 1.2], rtol=1e-6)
    np.testing.assert_allclose(boxes[1], [20, 20, 30, 30])
    np.testing.assert_allclose(fused, [0.6, 0.4, 0.0], rtol=1e-6)
    assert names.tolist() == [1, 0, -1]


def test_a_box_between_two_objects_is_fused_into_one_of_them():
    # The second model's box overlaps both of the first's by more than half.
    found = jnp.array([[[0.0, 0, 10, 10], [0, 6, 10, 16]], [[0, 3, 10, 13], [0, 0, 1, 1]]])
    scores = jnp.array([[0.9, 0.8], [0.7, 0.0]])
    labels = jnp.array([[0, 0], [0, -1]])
    boxes, fused, names = bx.fuse_boxes(found, scores, labels, iou_threshold=0.5, max_boxes=3)
    assert names.tolist() == [0, 0, -1]
    np.testing.assert_allclose(fused, [0.8, 0.4, 0], rtol=1e-6)  # seen by two, seen by one
    shift = 3 * 0.7 / 1.6
    np.testing.assert_allclose(boxes[0], [0, shift, 10, 10 + shift], rtol=1e-6)
    np.testing.assert_allclose(boxes[1], [0, 6, 10, 16], rtol=1e-6)


def test_what_all_models_see_comes_before_what_one_is_sure_of():
    alone = [[0.0, 20 * i, 10, 20 * i + 10] for i in range(1, 5)]
    agreed = [0.0, 0, 10, 10]
    found = jnp.array([[*alone, agreed], [*np.array(alone) + 500, agreed]])
    scores = jnp.array([[0.9, 0.9, 0.9, 0.9, 0.6]] * 2)
    boxes, fused, _ = bx.fuse_boxes(found, scores, jnp.zeros((2, 5), jnp.int32), max_boxes=2)
    np.testing.assert_allclose(fused, [0.6, 0.45], rtol=1e-6)
    np.testing.assert_allclose(boxes[0], agreed, atol=1e-6)


def test_boxes_of_other_labels_are_not_fused():
    same = jnp.array([[[0.0, 0, 4, 4]], [[0.0, 0, 4, 4]]])
    _, scores, labels = bx.fuse_boxes(
        same, jnp.array([[0.5], [0.7]]), jnp.array([[0], [1]]), max_boxes=2
    )
    assert labels.tolist() == [1, 0]
    np.testing.assert_allclose(scores, [0.35, 0.25])
    one = bx.fuse_boxes(same[:1], jnp.array([[0.5]]), jnp.array([[0]]), max_boxes=1)
    np.testing.assert_allclose(one[0], same[0])
    np.testing.assert_allclose(one[1], [0.5])
