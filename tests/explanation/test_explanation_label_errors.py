"""Doubtful labels, and what single examples do to a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.explanation.influence import example_gradients, influences, split_head
from jaxmed.explanation.label_errors import find_label_errors, precision_at


def simulated(cases=2000, classes=4, flipped=0.05, seed=0):
    """True classes, given labels and probabilities of a good model that never saw them."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=cases)
    logits = rng.normal(size=(cases, classes)) + 5 * (truth[:, None] == np.arange(classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = rng.random(cases) < flipped
    labels = np.where(wrong, (truth + rng.integers(1, classes, size=cases)) % classes, truth)
    return truth, labels, probabilities, wrong


def test_flipped_labels_come_first_and_the_truth_is_suggested():
    truth, labels, probabilities, wrong = simulated()
    found = find_label_errors(labels, probabilities)
    assert precision_at(found.order, wrong) > 0.9
    assert found.suspect[wrong].mean() > 0.85 and found.suspect[~wrong].mean() < 0.05
    both = found.suspect & wrong
    assert (found.suggested[both] == truth[both]).mean() > 0.95
    assert (found.suggested[~found.suspect] == labels[~found.suspect]).all()
    # A random order finds what is there by chance.
    assert precision_at(np.random.default_rng(1).permutation(len(labels)), wrong) < 0.15


def test_a_class_of_which_the_model_is_never_sure_is_not_suspected_as_a_whole():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    # The rare-looking class has a third of the probability at most, and more where it is true.
    second = np.where(labels == 1, 0.3, 0.05) + rng.uniform(-0.04, 0.04, 400)
    found = find_label_errors(labels, np.stack([1 - second, second], 1))
    assert not found.suspect.any()
    assert (np.stack([1 - second, second], 1).argmax(1) == 0).all()


def test_classes_without_a_case_and_sets_without_one():
    found = find_label_errors(np.array([0, 1, 1]), np.eye(3)[[0, 1, 2]])
    assert found.suggested.max() < 2  # of the third class nobody knows what is usual
    assert len(find_label_errors(np.zeros(0, int), np.zeros((0, 3))).order) == 0
    with pytest.raises(ValueError, match="labels go from 0 to 3 of 3 classes"):
        find_label_errors(np.array([0, 3]), np.full((2, 3), 1 / 3))


def softmax_loss(head, batch):
    return -jax.nn.log_softmax(batch["x"] @ head["kernel"])[0, batch["y"][0]]


def test_gradients_of_examples_are_those_of_each_by_itself():
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
    batch = {"x": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), "y": jnp.arange(4) % 3}
    losses, gradients = jax.jit(lambda b: example_gradients(softmax_loss, head, b))(batch)
    for i in range(4):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        # The gradient of cross-entropy by a linear layer: x (p - y).
        p = jax.nn.softmax(alone["x"] @ head["kernel"])[0]
        expected = jnp.outer(alone["x"][0], p - jax.nn.one_hot(alone["y"][0], 3))
        np.testing.assert_allclose(gradients[i].reshape(5, 3), expected, atol=1e-6)
        np.testing.assert_allclose(losses[i], softmax_loss(head, alone), rtol=1e-6)


def test_influence_is_what_a_step_on_the_training_example_gains():
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
    batch = {"x": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "y": jnp.arange(6) % 3}
    _, gradients = example_gradients(softmax_loss, head, batch)
    gains = influences(np.asarray(gradients[:2]), np.asarray(gradients))
    for case in range(2):
        alone = jax.tree.map(lambda x, i=case: x[i : i + 1], batch)
        for train in range(6):
            step = {"kernel": head["kernel"] - 1e-3 * gradients[train].reshape(5, 3)}
            gained = softmax_loss(head, alone) - softmax_loss(step, alone)
            np.testing.assert_allclose(gains[case, train], gained / 1e-3, atol=0.02)
    assert gains[0, 0] > 0


def test_heads_are_told_from_the_rest():
    head, rest = split_head({"backbone": 1, "class_head": 2, "box_head": 3})
    assert head == {"class_head": 2, "box_head": 3} and rest == {"backbone": 1}
    with pytest.raises(ValueError, match="no layer with 'head'"):
        split_head({"backbone": 1})
