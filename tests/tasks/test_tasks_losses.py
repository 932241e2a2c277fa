"""Tasks: padding changes no loss, assignment is sane, instances come back from their own target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.inference.predictor import check_finite
from jaxmed.tasks.assignment import assign
from jaxmed.tasks.classification import Classification
from jaxmed.tasks.detection import Detection
from jaxmed.tasks.segmentation import (
    Segmentation,
    instance_targets,
    separate_instances,
    shrink_labels,
)
from jaxmed.types import NotFiniteError


def identity(x):
    return x


def dense_outputs(images, classes=2):
    """A stand-in for a detector: boxes of 8 x 8 around a grid, scores from the image's mean."""
    grid = jnp.stack(jnp.meshgrid(jnp.arange(4.0), jnp.arange(4.0), indexing="ij"), -1)
    points = grid.reshape(-1, 2) * 8 + 4
    boxes = jnp.concatenate([points - 5, points + 4], -1)
    logits = images.mean((1, 2, 3))[:, None, None] + jnp.linspace(-1, 1, 16 * classes).reshape(
        16, classes
    )
    return {
        "logits": logits,
        "boxes": jnp.broadcast_to(boxes, (len(images), *boxes.shape)),
        "points": points,
        "sides": jnp.full((16, 2), 8.0),
    }


def batches():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(3, 32, 32, 1)), jnp.float32)
    valid = jnp.ones(3)
    boxes = jnp.asarray([[[3, 3, 12, 13], [0, 0, 0, 0]]] * 3, jnp.float32)
    return {
        "classification": (
            Classification(("a", "b")),
            {"image": image, "valid": valid, "label": jnp.array([0, 1, 1], jnp.int32)},
            lambda x: jnp.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], -1),
        ),
        "multilabel": (
            Classification(("a", "b"), multilabel=True),
            {"image": image, "valid": valid, "label": jnp.array([[0, 1], [1, 1], [0, 0]])},
            lambda x: jnp.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], -1),
        ),
        "detection": (
            Detection(("a", "b")),
            {
                "image": image,
                "valid": valid,
                "boxes": boxes,
                "box_label": jnp.array([[1, -1]] * 3, jnp.int32),
            },
            dense_outputs,
        ),
        "segmentation": (
            Segmentation(("background", "a")),
            {
                "image": image,
                "valid": valid,
                "mask": jnp.asarray(rng.integers(-1, 2, (3, 32, 32)), jnp.int32),
            },
            lambda x: jnp.concatenate([x, x**2], -1),
        ),
        "instances": (
            Segmentation(("background", "object"), instances=True),
            {
                "image": image,
                "valid": valid,
                "mask": jnp.asarray(
                    np.kron(rng.integers(0, 5, (3, 4, 4)), np.ones((1, 8, 8), int)), jnp.int32
                ),
            },
            lambda x: jnp.concatenate([x, x**2, -x], -1),
        ),
    }


@pytest.mark.parametrize("name", list(batches()))
def test_padded_examples_change_no_loss(name):
    task, batch, network = batches()[name]

    def loss(batch):
        def apply(images, key):
            return network(images), {}

        return task.loss(apply, batch, key=jax.random.key(0), total=identity)[0]

    rng = np.random.default_rng(1)
    padding = {k: jnp.asarray(rng.permutation(np.asarray(v)[:2])) for k, v in batch.items()}
    padding["valid"] = jnp.zeros(2)
    padded = {k: jnp.concatenate([v, padding[k]]) for k, v in batch.items()}
    assert float(loss(batch)) > 0
    np.testing.assert_allclose(loss(padded), loss(batch), rtol=1e-5)


def test_a_perfect_detector_is_told_so():
    truth = jnp.array([[4, 4, 20, 20], [30, 30, 40, 44], [0, 0, 0, 0]], jnp.float32)
    labels = jnp.array([0, 1, -1])
    points = jnp.array([[12.0, 12.0], [35.0, 37.0], [60.0, 60.0]])
    sides = jnp.full((3, 2), 8.0)
    boxes = jnp.array([[4, 4, 20, 20], [30, 30, 40, 44], [50, 50, 60, 60]], jnp.float32)
    scores = jnp.full((3, 2), 0.5)
    owner, quality = assign(points, sides, scores, boxes, truth, labels)
    np.testing.assert_array_equal(owner, [0, 1, -1])
    np.testing.assert_allclose(quality, [1, 1, 0], atol=1e-5)


def test_a_cell_belongs_to_one_object_only():
    truth = jnp.array([[0, 0, 10, 10], [4, 4, 12, 12]], jnp.float32)
    points = jnp.array([[6.0, 6.0], [1.0, 1.0]])
    boxes = jnp.array([[3.5, 4, 12, 12], [0, 0, 9, 10]], jnp.float32)
    owner, quality = assign(
        points, jnp.full((2, 2), 4.0), jnp.full((2, 1), 0.5), boxes, truth, jnp.array([0, 0])
    )
    np.testing.assert_array_equal(owner, [1, 0])
    assert (np.asarray(quality) > 0.8).all()


def test_an_object_smaller_than_a_cell_still_finds_one():
    truth = jnp.array([[9, 9, 11, 11]], jnp.float32)
    points = jnp.array([[8.0, 8.0], [24.0, 24.0]])
    boxes = jnp.concatenate([points - 4, points + 4], -1)
    owner, _ = assign(
        points, jnp.full((2, 2), 16.0), jnp.full((2, 1), 0.1), boxes, truth, jnp.array([0])
    )
    np.testing.assert_array_equal(owner, [0, -1])


def test_detection_keeps_the_best_of_overlapping_boxes():
    task = Detection(("a",), max_detections=5)
    boxes = jnp.array([[[0, 0, 10, 10], [0, 0, 10, 9.5], [20, 20, 30, 30]]])
    outputs = {"logits": jnp.array([[[3.0], [2.0], [1.0]]]), "boxes": boxes}
    found = task.predict(outputs, {"image": jnp.zeros((1, 25, 40, 1))})
    np.testing.assert_array_equal(found["labels"][0], [0, 0, -1, -1, -1])
    np.testing.assert_allclose(found["boxes"][0, 1], [20, 20, 25, 30])


@pytest.mark.parametrize("name", ["logits", "boxes"])
def test_boxes_of_what_is_no_number_are_not_none(name):
    """Nothing found would be the worst answer; it holds for its image alone, of ensembles too."""
    task = Detection(("a",), max_detections=5)
    outputs = {
        "logits": np.zeros((2, 3, 1), np.float32),
        "boxes": np.tile(np.float32([0, 0, 4, 4]), (2, 3, 1)),
    }
    outputs[name][1, 2] = np.nan
    found = task.predict(jax.tree.map(jnp.asarray, outputs), {"image": jnp.zeros((2, 8, 8, 1))})
    fused = task.combine(jax.tree.map(lambda x: jnp.stack([x, x]), found))
    for each in (found, fused):
        check_finite(jax.tree.map(lambda x: x[0], each))
        with pytest.raises(NotFiniteError):
            check_finite(jax.tree.map(lambda x: x[1], each))


@pytest.mark.parametrize("ndim", [2, 3])
def test_instances_come_back_from_their_own_target(ndim):
    mask = np.zeros((24,) * ndim, np.int32)
    half = (slice(2, 12),) * (ndim - 1)
    mask[(*half, slice(2, 11))] = 7
    mask[(*half, slice(11, 20))] = 3  # touches the first
    target = np.asarray(instance_targets(jnp.asarray(mask)[None]))[0]
    probabilities = np.eye(3, dtype=np.float32)[target]
    found = separate_instances(probabilities)
    assert found.max() == 2
    pairs = {(int(a), int(b)) for a, b in zip(mask.ravel(), found.ravel(), strict=True)}
    assert len(pairs) <= 3 + 2, "background, two instances, and at most a few voxels between"
    overlap = ((mask == 7) & (found == found[(5,) * ndim])).sum() / (mask == 7).sum()
    assert overlap > 0.9


def test_instance_targets_keep_ignored_voxels():
    mask = jnp.asarray([[[-1, -1, 4, 4, 4], [-1, -1, 4, 4, 4], [0, 0, 4, 4, 4]]], jnp.int32)
    target = instance_targets(mask)
    np.testing.assert_array_equal(target[0, :, 0], [-1, -1, 0])
    assert set(np.unique(target[0, :, 4])) == {1}


def test_specks_are_no_instances():
    probabilities = np.zeros((20, 20, 3), np.float32)
    probabilities[..., 0] = 1
    probabilities[3, 3] = [0, 1, 0]
    probabilities[8:16, 8:16] = [0, 1, 0]
    assert separate_instances(probabilities).max() == 1


def test_shrunken_labels_are_a_sub_grid():
    labels = jnp.arange(64).reshape(1, 8, 8)
    assert shrink_labels(labels, (4, 4)).shape == (1, 4, 4)
    np.testing.assert_array_equal(shrink_labels(labels, (8, 8)), labels)
