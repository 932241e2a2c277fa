"""Augmentations that imitate what scanners get wrong."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jaxmed.augmentation.compose import DeviceExample, check_range, random_apply
from jaxmed.augmentation.intensity import reduce_spatial
from jaxmed.types import Augment, Number


def bias_field(*, strength: float = 0.3, order: int = 3, probability: Number = 1.0) -> Augment:
    """Uneven sensitivity of an MR coil: multiply by exp of a random polynomial of the position.

    Values are counted from the least one of the channel, so that the dark surround stays dark
    (Van Leemput et al., IEEE TMI 18(10), 1999, for the model of the field).

    Args:
        strength: largest coefficient of the polynomial, over positions from -1 to 1.
        order: its degree.
        probability: of an example being changed.
    """

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        image = example["image"]
        ndim = image.ndim - 1
        grids = jnp.meshgrid(
            *[(2 * jnp.arange(side) + 1) / side - 1 for side in image.shape[:-1]],
            indexing="ij",
            sparse=True,
        )
        powers = [
            p for p in itertools.product(range(order + 1), repeat=ndim) if 0 < sum(p) <= order
        ]
        coefficients = strength * jax.random.uniform(key, (len(powers),), minval=-1, maxval=1)
        field = jnp.zeros(image.shape[:-1])
        for coefficient, power in zip(coefficients, powers, strict=True):
            term = coefficient
            for grid, exponent in zip(grids, power, strict=True):
                term = term * grid**exponent
            field = field + term
        low = reduce_spatial(jnp.min, image)
        return {**example, "image": (image - low) * jnp.exp(field)[..., None] + low}

    return random_apply(apply, probability=probability)


def ringing(*, cutoff: tuple[float, float] = (0.4, 0.9), probability: Number = 1.0) -> Augment:
    """Gibbs ringing: drop the high frequencies of an MR acquisition along one drawn axis.

    Args:
        cutoff: (low, high) of the highest frequency kept, as a fraction of the highest there is.
        probability: of an example being changed.
    """
    check_range("ringing cutoff", cutoff, least=0.0)

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        image = example["image"]
        where, how = jax.random.split(key)
        chosen = jax.random.randint(where, (), 0, image.ndim - 1)
        kept = jax.random.uniform(how, minval=cutoff[0], maxval=cutoff[1])
        for axis in range(image.ndim - 1):
            side = image.shape[axis]
            frequency = jnp.arange(side // 2 + 1) / max(side // 2, 1)
            low = (frequency <= kept).reshape((-1,) + (1,) * (image.ndim - 1 - axis))
            rung = jnp.fft.irfft(jnp.fft.rfft(image, axis=axis) * low, side, axis=axis)
            image = jnp.where(chosen == axis, rung, image)
        return {**example, "image": image}

    return random_apply(apply, probability=probability)
