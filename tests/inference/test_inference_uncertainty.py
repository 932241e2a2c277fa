import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.inference.uncertainty import entropy, split_uncertainty
from jaxmed.models.blocks import dropout_by
from jaxmed.models.unet import UNet


def draw(*shape, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1])


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_entropy_is_that_of_scipy(classes):
    p = draw(5, 6, classes)
    expected = scipy.stats.entropy(p, axis=-1) / np.log(classes)
    np.testing.assert_allclose(entropy(p), expected, atol=1e-9)
    np.testing.assert_allclose(entropy(jnp.asarray(p)), expected, atol=1e-5)


def test_entropy_goes_from_0_to_1():
    assert entropy(np.eye(4)) == pytest.approx(0, abs=1e-9)
    assert entropy(np.full((2, 4), 0.25)) == pytest.approx(1)
    assert entropy(np.array([[0.5, 1.0, 0.0]]), multilabel=True) == pytest.approx(1 / 3)
    assert entropy(np.ones((3, 1))) == pytest.approx(0)


def packed(samples):
    """As the network's forward pass packs it."""
    return np.concatenate([samples.mean(0), entropy(samples).mean(0)[..., None]], -1)


def test_samples_that_agree_have_no_mutual_information():
    one = draw(1, 8, 3)
    mean, total, information = split_uncertainty(packed(np.repeat(one, 4, axis=0)))
    np.testing.assert_allclose(mean, one[0])
    np.testing.assert_allclose(total, entropy(one[0]))
    np.testing.assert_allclose(information, 0, atol=1e-9)


def test_samples_that_are_sure_of_different_things_are_all_mutual_information():
    samples = np.eye(3)[:, None]  # three networks, each sure of another class
    _, total, information = split_uncertainty(packed(samples))
    assert total == pytest.approx(1) and information == pytest.approx(1)


def test_the_parts_are_those_of_the_definition():
    samples = draw(6, 10, 4)
    _, total, information = split_uncertainty(packed(samples))
    mean = samples.mean(0)
    divergence = scipy.stats.entropy(samples, mean[None], axis=-1).mean(0) / np.log(4)
    np.testing.assert_allclose(information, divergence, atol=1e-9)
    assert (information > 0).all() and (information <= total).all()


def network(rate):
    model = UNet(2, features=(4, 8), dropout=rate)
    image = jax.random.normal(jax.random.key(1), (3, 16, 16, 1))
    return model, model.init(jax.random.key(0), image), image


def test_dropout_samples_differ_and_average_to_about_the_network():
    model, variables, image = network(0.3)
    plain = model.apply(variables, image, train=False)

    def sample(key):
        with dropout_by(key, 0.3):
            return model.apply(variables, image, train=False)

    keys = jax.random.split(jax.random.key(2), 200)
    samples = jax.lax.map(sample, keys)
    assert float(jnp.abs(samples[0] - samples[1]).max()) > 1e-3
    np.testing.assert_array_equal(sample(keys[0]), sample(keys[0]))
    # What is after the dropout is no more than nearly linear.
    spread = float(samples.std(0).mean())
    assert float(jnp.abs(samples.mean(0) - plain).mean()) < spread / 2
    np.testing.assert_array_equal(model.apply(variables, image, train=False), plain)


def test_what_is_dropped_does_not_depend_on_the_rest_of_the_batch():
    model, variables, image = network(0.5)
    with dropout_by(jax.random.key(3), 0.5):
        together = model.apply(variables, image, train=False)
        alone = model.apply(variables, image[1:2], train=False)
    assert float(jnp.abs(together[1] - alone[0]).max()) > 0  # two dropouts, two draws
    with dropout_by(jax.random.key(3), 0.5):
        alone = model.apply(variables, image[1:2], train=False)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
