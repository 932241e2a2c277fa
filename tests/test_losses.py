import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax
from sklearn.metrics import f1_score

from jaxmed import losses

EXTREME = (0.0, 1e4, -1e4, 1e30)


def example(shape=(3, 5), classes=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, classes)).astype("f4")
    return logits, rng.integers(-1, classes, shape).astype("i4")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_by_hand_ignores_minus_one(smoothing):
    logits, labels = example()
    weights = np.array([1.0, 2.0, 0.5, 3.0], "f4")
    target = np.eye(4)[np.maximum(labels, 0)] * (1 - smoothing) + smoothing / 4
    plain = -(target * log_softmax(logits, axis=-1)).sum(-1) * (labels >= 0)
    args = jnp.array(logits), jnp.array(labels)
    got = losses.cross_entropy(*args, label_smoothing=smoothing)
    np.testing.assert_allclose(got, plain, atol=1e-5)
    got = losses.cross_entropy(*args, label_smoothing=smoothing, class_weights=jnp.array(weights))
    expected = weights[np.maximum(labels, 0)] * (labels >= 0)
    np.testing.assert_allclose(got, plain * expected, atol=1e-5)
    np.testing.assert_allclose(losses.label_weights(args[1], jnp.array(weights)), expected)
    np.testing.assert_array_equal(losses.label_weights(args[1]), labels >= 0)


def test_binary_cross_entropy_hard_soft_and_ignored():
    logits = np.linspace(-3, 3, 8).astype("f4")
    targets = np.array([0, 1, -1, 0.3, 1, 0, -1, 0.9], "f4")
    p = expit(logits)
    expected = np.where(targets < 0, 0, -targets * np.log(p) - (1 - targets) * np.log(1 - p))
    got = losses.binary_cross_entropy(jnp.array(logits), jnp.array(targets))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    hard = jnp.array([0, 1, -1, 0, 1, 0, -1, 1], jnp.int32)
    np.testing.assert_allclose(
        losses.binary_cross_entropy(jnp.array(logits), hard),
        losses.focal_loss(jnp.array(logits), hard, alpha=None, gamma=0.0),
        atol=1e-6,
    )


def test_focal_loss_by_hand():
    logits, targets = jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, -1], jnp.int32)
    p, q = expit(2.0), 1 - expit(-1.0)
    expected = [-0.25 * (1 - p) ** 2 * np.log(p), -0.75 * (1 - q) ** 2 * np.log(q), 0]
    np.testing.assert_allclose(losses.focal_loss(logits, targets), expected, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 0, 1])
@pytest.mark.parametrize("value", EXTREME)
def test_losses_and_gradients_are_finite(label, value):
    logits = jnp.array([[value, -value], [value, value]], jnp.float32)
    labels = jnp.full((2,), label, jnp.int32)
    wide = jnp.broadcast_to(labels[:, None], (2, 2))

    def dice(x):
        return losses.dice_loss(*losses.dice_statistics(jax.nn.softmax(x), labels)).sum()

    for loss in (
        lambda x: losses.cross_entropy(x, labels, label_smoothing=0.1).sum(),
        lambda x: losses.cross_entropy(x, labels).sum(),
        lambda x: losses.binary_cross_entropy(x, wide).sum(),
        lambda x: losses.focal_loss(x, wide).sum(),
        dice,
    ):
        result, gradient = jax.value_and_grad(loss)(logits)
        assert jnp.isfinite(result) and jnp.isfinite(gradient).all()
        if label == -1:
            assert result == 0 and not gradient.any()


def test_dice_of_hard_predictions_is_f1():
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, (2, 4, 6, 6)).astype("i4")
    truth[:, 0] = -1
    statistics = losses.dice_statistics(
        jnp.array(np.eye(3, dtype="f4")[predicted]), jnp.array(truth)
    )
    per_example = losses.dice_loss(*statistics, smooth=1e-7)
    for i in range(4):
        f1 = f1_score(truth[i, 1:].ravel(), predicted[i, 1:].ravel(), average=None)
        np.testing.assert_allclose(per_example[i], 1 - f1[1:].mean(), atol=1e-5)
    pooled = f1_score(truth[:, 1:].ravel(), predicted[:, 1:].ravel(), average=None)
    batch = losses.dice_loss(*(s.sum(0) for s in statistics), smooth=1e-7, include_background=True)
    np.testing.assert_allclose(batch, 1 - pooled.mean(), atol=1e-5)


def test_padding_changes_no_loss():
    logits, labels = example((2, 4, 4))
    junk = np.concatenate([logits, logits * 100]), np.concatenate([labels, labels])
    padded = losses.ignore_invalid(jnp.array(junk[1]), jnp.array([1.0, 1, 0, 0]))
    assert (padded[2:] == -1).all()

    def totals(x, y):
        dice = [s.sum(0) for s in losses.dice_statistics(jax.nn.softmax(x), y)]
        return losses.cross_entropy(x, y).sum(), losses.label_weights(y).sum(), *dice

    plain = totals(jnp.array(logits), jnp.array(labels))
    for a, b in zip(plain, totals(jnp.array(junk[0]), padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_dice_two_dimensions_equal_three_of_depth_one():
    logits, labels = example((2, 5, 6))
    flat = losses.dice_statistics(jnp.array(logits), jnp.array(labels))
    deep = losses.dice_statistics(jnp.array(logits[..., None, :]), jnp.array(labels[..., None]))
    for a, b in zip(flat, deep, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_dense_cross_entropy_compiles_without_scatter_or_gather():
    logits, labels = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8), jnp.int32)
    step = jax.jit(jax.grad(lambda x, y: losses.cross_entropy(x, y).sum()))
    text = step.lower(logits, labels).as_text()
    assert "scatter" not in text and "gather" not in text


def test_giou_loss_falls_to_zero():
    box = jnp.array([[1.0, 2, 5, 7]])
    assert losses.giou_loss(box, box)[0] == 0
    far, near = (losses.giou_loss(box + shift, box)[0] for shift in (20.0, 1.0))
    assert 0 < near < 1 < far < 2
