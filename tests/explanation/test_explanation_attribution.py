import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.explanation.attribution import (
    gradient,
    integrated_gradients,
    occlusion,
    smooth_gradient,
)

SHAPES = [(8, 6, 2), (4, 6, 5, 1)]


def linear(shape, seed=0):
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    return weights, lambda image: (weights * image).sum() + 3.0


def image_of(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_linear_score_are_its_weights(shape):
    weights, score = linear(shape)
    image = image_of(shape)
    np.testing.assert_allclose(gradient(score, image), weights)
    found = smooth_gradient(score, image, jax.random.key(0), samples=8)
    np.testing.assert_allclose(found, weights, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_integrated_gradients_of_a_linear_score_are_weight_times_difference(shape):
    weights, score = linear(shape)
    image, baseline = image_of(shape), image_of(shape, 2)
    found, facts = jax.jit(lambda x: integrated_gradients(score, x, baseline))(image)
    np.testing.assert_allclose(found, weights * (image - baseline), rtol=1e-4, atol=1e-5)
    assert facts["gap"] < 1e-3 and facts["steps"] == 16


def test_integrated_gradients_take_more_steps_until_they_are_complete():
    def score(image):  # steep in the middle of the path
        return jnp.tanh(40 * (image.mean() - 0.47))

    image, baseline = jnp.ones((4, 4, 1)), jnp.zeros((4, 4, 1))
    found, facts = integrated_gradients(score, image, baseline)
    assert facts["gap"] < 0.01 and facts["steps"] > 16
    np.testing.assert_allclose(found.sum(), score(image) - score(baseline), rtol=0.01)
    few, facts = integrated_gradients(score, image, baseline, max_steps=16, batch_size=4)
    assert facts["steps"] == 16


def test_integrated_gradients_are_kept_under_vmap():
    _, score = linear((4, 4, 1))
    images = jnp.stack([image_of((4, 4, 1), seed) for seed in range(3)])
    together, _ = jax.vmap(lambda x: integrated_gradients(score, x, jnp.zeros_like(x)))(images)
    for image, found in zip(images, together, strict=True):
        one, _ = integrated_gradients(score, image, jnp.zeros_like(image))
        np.testing.assert_allclose(found, one, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_occlusion_finds_the_only_voxel_that_counts(shape):
    place = tuple(side // 2 for side in shape[:-1])
    ndim = len(shape) - 1
    image = jnp.ones(shape)
    found = occlusion(
        lambda x: x[(*place, 0)],
        image,
        jnp.zeros(shape),
        patch=(1,) * ndim,
        stride=(1,) * ndim,
    )
    expected = np.zeros(shape[:-1])
    expected[place] = 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_occlusion_covers_the_border_and_counts_each_voxel_by_its_own_patches():
    image = jnp.ones((7, 10, 1))
    # Every voxel counts the same, so that every patch counts its size, wherever it lies.
    found = occlusion(lambda x: x.sum(), image, jnp.zeros_like(image), patch=(3, 4), stride=(2, 3))
    np.testing.assert_allclose(found, 12, rtol=1e-5)
