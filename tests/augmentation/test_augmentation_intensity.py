import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from jaxmed.augmentation import (
    bias_field,
    brightness,
    colour_jitter,
    contrast,
    cutout,
    gamma,
    gaussian_blur,
    gaussian_noise,
    low_resolution,
    ringing,
)
from jaxmed.augmentation.intensity import quick_normal
from jaxmed.types import UserError

KEYS = jax.random.split(jax.random.key(0), 4)
MAKERS = [
    bias_field,
    brightness,
    colour_jitter,
    contrast,
    cutout,
    gamma,
    gaussian_blur,
    gaussian_noise,
    low_resolution,
    ringing,
]


def make_image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).gamma(2.0, size=(*shape, 2)), jnp.float32)


@pytest.mark.parametrize("maker", MAKERS)
def test_every_augmentation(maker):
    """Finite and changed; labels untouched; vmap = loop; jit = eager."""
    image = make_image(16, 12)
    example = {"image": image, "mask": jnp.zeros((16, 12), jnp.int32)}
    batch = jax.tree.map(lambda x: jnp.stack([x] * 4), example)
    changed = jax.jit(jax.vmap(maker()))(KEYS, batch)
    assert changed["image"].shape == batch["image"].shape
    assert changed["image"].dtype == jnp.float32
    assert np.isfinite(changed["image"]).all()
    assert not np.allclose(changed["image"], batch["image"])
    np.testing.assert_array_equal(changed["mask"], batch["mask"])
    alone = maker()(KEYS[1], example)  # eager
    np.testing.assert_allclose(alone["image"], changed["image"][1], atol=1e-4)


def test_constant_images_stay_finite():
    every = jax.jit(lambda key, x: [m()(key, {"image": x})["image"] for m in MAKERS])
    for value in (0.0, 7.0):
        for changed in every(KEYS[0], jnp.full((6, 5, 4, 2), value)):
            assert np.isfinite(changed).all()


STILL = [
    brightness(factor=(1.0, 1.0)),
    contrast(factor=(1.0, 1.0)),
    gamma(power=(1.0, 1.0)),
    gamma(power=(1.0, 1.0), inverted=True),
    gaussian_noise(std=(0.0, 0.0)),
    gaussian_blur(sigma=(0.0, 0.0)),
    low_resolution(zoom=(1.0, 1.0)),
    colour_jitter(gain=(1.0, 1.0), offset=0.0),
    bias_field(strength=0.0),
    ringing(cutoff=(1.0, 1.0)),
]


def test_zero_ranges_are_the_identity():
    image = make_image(6, 8, 5)
    every = jax.jit(lambda key, x: [augment(key, {"image": x})["image"] for augment in STILL])
    for augment, changed in zip(STILL, every(KEYS[0], image), strict=True):
        np.testing.assert_allclose(changed, image, atol=2e-5, err_msg=str(augment))


def test_a_volume_of_depth_one_is_an_image():
    makers = [brightness, contrast, gamma, gaussian_blur, gaussian_noise, low_resolution]
    every = jax.jit(lambda key, x: [maker()(key, {"image": x})["image"] for maker in makers])
    image = make_image(16, 12)
    for flat, deep in zip(every(KEYS[0], image), every(KEYS[0], image[:, :, None]), strict=True):
        np.testing.assert_allclose(deep[:, :, 0], flat, atol=1e-5)


def test_probability_decides_for_each_example():
    batch = {"image": jnp.stack([make_image(8, 8)] * 64)}
    keys = jax.random.split(jax.random.key(3), 64)
    changed = jax.jit(jax.vmap(brightness(probability=0.25)))(keys, batch)["image"]
    share = np.mean([(new != old).any() for new, old in zip(changed, batch["image"], strict=True)])
    assert 0.1 < share < 0.45


def test_blur_is_scipys():
    image = make_image(20, 18)
    blurred = gaussian_blur(sigma=(1.2, 1.2))(KEYS[0], {"image": image})["image"]
    expected = scipy.ndimage.gaussian_filter(
        np.asarray(image), (1.2, 1.2, 0), mode="nearest", radius=(4, 4, 0)
    )
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_gamma_keeps_mean_and_deviation():
    image = make_image(20, 18)
    for inverted in (False, True):
        bent = gamma(power=(1.4, 1.4), inverted=inverted)(KEYS[0], {"image": image})["image"]
        np.testing.assert_allclose(bent.mean((0, 1)), image.mean((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(bent.std((0, 1)), image.std((0, 1)), rtol=1e-4)


def test_contrast_keeps_the_range():
    image = make_image(20, 18)
    stretched = contrast(factor=(2.0, 2.0))(KEYS[0], {"image": image})["image"]
    assert stretched.min() >= image.min()
    assert stretched.max() <= image.max()
    free = contrast(factor=(2.0, 2.0), preserve_range=False)(KEYS[0], {"image": image})["image"]
    np.testing.assert_allclose(free.std((0, 1)), 2 * image.std((0, 1)), rtol=1e-4)


def test_noise_is_relative_to_the_deviation():
    image = 100 * make_image(64, 64)
    noise = gaussian_noise(std=(0.5, 0.5))(KEYS[0], {"image": image})["image"] - image
    np.testing.assert_allclose(noise.std((0, 1)), 0.5 * image.std((0, 1)), rtol=0.05)


def test_low_resolution_is_nearest_down_and_linear_up():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(12, 1, 1)), jnp.float32)
    coarse = low_resolution(zoom=(1 / 3, 1 / 3), axes=(0,))(KEYS[0], {"image": image})["image"]
    middles = np.asarray(image)[1::3, 0, 0]
    expected = np.interp((np.arange(12) + 0.5) / 3 - 0.5, np.arange(4), middles)
    np.testing.assert_allclose(coarse[:, 0, 0], expected, atol=1e-5)


def test_channels_are_drawn_together_unless_asked():
    image = jnp.ones((8, 8, 3))
    together = brightness()(KEYS[0], {"image": image})["image"]
    apart = brightness(per_channel=True)(KEYS[0], {"image": image})["image"]
    assert len(np.unique(together)) == 1
    assert len(np.unique(apart)) == 3


def test_mistakes_are_named():
    with pytest.raises(UserError, match="gamma power"):
        gamma(power=(0.0, 1.0))


@pytest.mark.parametrize("shape", [(512, 512), (64, 64, 64)])
def test_quick_normal_numbers_are_normal_and_independent(shape):
    drawn = np.asarray([quick_normal(jax.random.key(seed), shape) for seed in range(3)], np.float64)
    count = drawn[0].size
    error = 5 / np.sqrt(count)  # five standard errors of a mean of unit variance
    for noise in drawn:
        assert abs(noise.mean()) < error
        assert abs(noise.var() - 1) < 2 * error
        assert abs((noise**3).mean()) < 4 * error
        assert abs((noise**4).mean() - 2.97) < 10 * error
        assert scipy.stats.kstest(noise.ravel(), "norm").statistic < 2 / np.sqrt(count) + 2e-3
        for axis in range(noise.ndim):
            for step in (1, 2, 8):
                shifted = np.roll(noise, step, axis)
                assert abs((noise * shifted).mean()) < error
                assert abs((noise**2 * shifted**2).mean() - 1) < 4 * error
    for one, other in itertools.combinations(drawn, 2):
        assert abs((one * other).mean()) < error
        assert (one == other).mean() < 1e-3
    np.testing.assert_array_equal(drawn[0], quick_normal(jax.random.key(0), shape))
