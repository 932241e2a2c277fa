"""Augmentations that change values and leave voxels where they are.

Factors are drawn log-uniformly: half as bright is as likely as twice as bright. Sizes of noise and
of shifts are in standard deviations of the image, so that one setting suits images scaled to 0..1
and images with zero mean and unit variance. `per_channel=True` draws for each channel apart: right
for the sequences of a multi-modal MRI, while the channels of a colour image belong together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.augmentation.compose import check_range, random_apply
from jaxmed.types import Augment, Number

Image = Float[Array, "*spatial channels"]


def reduce_spatial(
    reduce: Callable[..., jax.Array], image: Float[Array, "*spatial channels"]
) -> Float[Array, " channels"]:
    """Reduce each channel to one number by `jnp.min`, `jnp.max` or `jnp.mean`.

    The inner loop runs over the voxels of a channel, laid out as one row, and not over the
    channels. `reduce_precision` to all the digits that a float32 has changes no number, but without
    it XLA's CPU compiler draws the reduction into the loop that uses its result: 10 to 40 times
    slower in `contrast` (measured, jax 0.10 and 0.12).
    """
    return jax.lax.reduce_precision(reduce(_rows(image), -1), 8, 23)


def _rows(image: Image) -> Float[Array, "channels voxels"]:
    return image.reshape(-1, image.shape[-1]).T


def brightness(
    *,
    factor: tuple[float, float] = (0.75, 1.25),
    shift: float = 0.0,
    per_channel: bool = False,
    probability: Number = 1.0,
) -> Augment:
    """Multiply by a factor, then add up to `shift` standard deviations either way."""
    check_range("brightness factor", factor, least=0.0)

    def change(key: jax.Array, image: Image) -> Image:
        multiply, add = jax.random.split(key)
        image = image * _draw_factor(multiply, image, factor, per_channel)
        if shift == 0:
            return image
        return image + shift * _draw(add, image, -1.0, 1.0, per_channel) * _spread(image)

    return _on_image(change, probability)


def contrast(
    *,
    factor: tuple[float, float] = (0.75, 1.25),
    preserve_range: bool = True,
    per_channel: bool = False,
    probability: Number = 1.0,
) -> Augment:
    """Stretch or squeeze values about the mean of their channel.

    Args:
        factor: (low, high) of the stretch.
        preserve_range: clip to the range that the channel had before.
        per_channel: draw for each channel apart.
        probability: of an example being changed.
    """
    check_range("contrast factor", factor, least=0.0)

    def change(key: jax.Array, image: Image) -> Image:
        mean = reduce_spatial(jnp.mean, image)
        stretched = (image - mean) * _draw_factor(key, image, factor, per_channel) + mean
        if not preserve_range:
            return stretched
        return jnp.clip(stretched, reduce_spatial(jnp.min, image), reduce_spatial(jnp.max, image))

    return _on_image(change, probability)


def gamma(
    *,
    power: tuple[float, float] = (0.7, 1.5),
    inverted: bool = False,
    retain_stats: bool = True,
    per_channel: bool = False,
    probability: Number = 1.0,
) -> Augment:
    """Raise to a power within the range of the channel: y = ((x - min) / range)^g * range + min.

    Args:
        power: (low, high) of g.
        inverted: work on the negative, which bends the bright end instead of the dark one.
        retain_stats: give the channel back its mean and standard deviation, so that only the shape
            of the histogram changes.
        per_channel: draw for each channel apart.
        probability: of an example being changed.
    """
    check_range("gamma power", power, least=0.0)

    def change(key: jax.Array, image: Image) -> Image:
        source = -image if inverted else image
        low = reduce_spatial(jnp.min, source)
        extent = reduce_spatial(jnp.max, source) - low
        unit = (source - low) / jnp.where(extent > 0, extent, 1)
        # exp(g log u) runs vectorised, `power` does not; log(0) gives exp(-inf) = 0, as it should.
        bent = jnp.exp(_draw_factor(key, image, power, per_channel) * jnp.log(unit)) * extent + low
        if retain_stats:
            spread = _spread(bent)
            ratio = jnp.where(spread > 0, _spread(source) / jnp.where(spread > 0, spread, 1), 1)
            bent = (bent - reduce_spatial(jnp.mean, bent)) * ratio + reduce_spatial(
                jnp.mean, source
            )
        return -bent if inverted else bent

    return _on_image(change, probability)


def gaussian_noise(
    *, std: tuple[float, float] = (0.0, 0.3), per_channel: bool = False, probability: Number = 1.0
) -> Augment:
    """Add white noise of a drawn strength, in standard deviations of the channel."""
    check_range("noise std", std)

    def change(key: jax.Array, image: Image) -> Image:
        size, values = jax.random.split(key)
        strength = _draw(size, image, *std, per_channel) * _spread(image)
        return image + strength * quick_normal(values, image.shape)

    return _on_image(change, probability)


def quick_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Numbers of a standard normal distribution, good enough for noise and five times as fast.

    JAX's own generator and the inverse of the error function take most of the time of a whole
    augmentation on a CPU. Here each voxel's place is mixed with the key into two words of 32 bits
    (a finaliser of MurmurHash3's kind, constants of Wellons' search), whose 64 bits are counted: a
    binomial number, made continuous by a uniform one. Variance 1, excess kurtosis -0.03, at most
    5.6 standard deviations. All of a voxel's bits come from one word, so there are 2^32 different
    numbers at most: plenty for noise, too few for statistics.

    Args:
        key: typed PRNG key.
        shape: of the result.
    """
    start = jax.random.bits(key, (2,))
    places = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(tuple(shape))
    first = _mix_bits(_mix_bits(places * jnp.uint32(0x9E3779B9) + start[0]) + start[1])
    second = _mix_bits(first ^ jnp.uint32(0x9E3779B9))
    third = _mix_bits(first + second)
    ones = (jax.lax.population_count(x).astype(jnp.float32) for x in (first, second))
    share = (third >> 8).astype(jnp.float32) * 2**-24
    # Of 64 bits, 32 are ones in the mean, with a variance of 16; of the share they are 1/2, 1/12.
    return (sum(ones) + share - 32.5) * (1 / math.sqrt(16 + 1 / 12))


def _mix_bits(x: jax.Array) -> jax.Array:
    """Spread each bit of 32 over all others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def gaussian_blur(
    *,
    sigma: tuple[float, float] = (0.5, 1.0),
    per_channel: bool = False,
    probability: Number = 1.0,
) -> Augment:
    """Blur by a Gaussian of a drawn width in voxels, cut off at three times the largest one.

    Written as a sum of shifted images an axis, which XLA fuses into one pass; a depthwise
    convolution is many times slower on a CPU.
    """
    check_range("blur sigma", sigma, least=-1e-9)
    radius = math.ceil(3 * sigma[1])

    def change(key: jax.Array, image: Image) -> Image:
        width = jnp.maximum(_draw(key, image, *sigma, per_channel), 1e-3)
        distance = jnp.arange(-radius, radius + 1)[:, None]
        weights = jnp.exp(-0.5 * jnp.square(distance / width))
        weights = weights / weights.sum(0)
        for axis in _spatial(image):
            margin = [(radius, radius) if axis == other else (0, 0) for other in range(image.ndim)]
            padded = jnp.pad(image, margin, mode="edge")
            image = sum(
                weight * jax.lax.slice_in_dim(padded, start, start + image.shape[axis], axis=axis)
                for start, weight in enumerate(weights)
            )
        return image

    return _on_image(change, probability)


def low_resolution(
    *,
    zoom: tuple[float, float] = (0.5, 1.0),
    axes: Sequence[int] | None = None,
    probability: Number = 1.0,
) -> Augment:
    """Imitate a coarser scan: nearest voxels of a grid `zoom` times as fine, linearly enlarged.

    The coarse grid is never made, since its size is drawn: each voxel looks up its two coarse
    neighbours along each axis. After nnU-Net's simulated low resolution.

    Args:
        zoom: (low, high) of coarse over fine voxels a side, at most 1.
        axes: spatial axes to coarsen; all of them if None.
        probability: of an example being changed.
    """
    check_range("low-resolution zoom", zoom, least=0.0)

    def change(key: jax.Array, image: Image) -> Image:
        drawn = jax.random.uniform(key, minval=zoom[0], maxval=zoom[1])
        chosen = _spatial(image) if axes is None else axes
        neighbours = [
            _coarse_neighbours(image, axis, drawn if axis in chosen else 1.0)
            for axis in _spatial(image)
        ]

        def sample(channel):
            total = 0.0
            for corner in itertools.product(*neighbours):
                weight = math.prod(part for _, part in corner)
                total = total + weight * channel[tuple(index for index, _ in corner)]
            return total

        return jax.vmap(sample, -1, -1)(image)

    return _on_image(change, probability)


def _coarse_neighbours(
    image: Image, axis: int, zoom: Float[Array, ""] | float
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The voxels that stand for the coarse cells below and above each voxel, and their weights."""
    side = image.shape[axis]
    coarse = (jnp.arange(side) + 0.5) * zoom - 0.5
    below = jnp.floor(coarse)
    part = coarse - below

    def voxel(cell):
        # The last cell is the last whose centre lies in the image.
        centre = (jnp.clip(cell, 0, jnp.floor(side * zoom - 0.5)) + 0.5) / zoom - 0.5
        return jnp.clip(jnp.round(centre).astype(jnp.int32), 0, side - 1)

    def along(values):
        return values.reshape((-1,) + (1,) * (image.ndim - 2 - axis))

    return (
        (along(voxel(below)), along(1 - part)),
        (along(voxel(below + 1)), along(part)),
    )


def colour_jitter(
    *,
    gain: tuple[float, float] = (0.9, 1.1),
    offset: float = 0.05,
    probability: Number = 1.0,
) -> Augment:
    """Vary each channel on its own: stain, white balance and illumination of colour images.

    Gain works about the mean of the channel, `offset` is in its standard deviations.
    """
    check_range("colour gain", gain, least=0.0)

    def change(key: jax.Array, image: Image) -> Image:
        multiply, add = jax.random.split(key)
        mean = reduce_spatial(jnp.mean, image)
        shift = offset * _draw(add, image, -1.0, 1.0, True) * _spread(image)
        return (image - mean) * _draw_factor(multiply, image, gain, True) + mean + shift

    return _on_image(change, probability)


def cutout(*, size: float = 0.25, holes: int = 1, probability: Number = 1.0) -> Augment:
    """Paint boxes with the mean of the image (DeVries and Taylor, arXiv:1708.04552).

    Labels stay as they are: the network has to conclude from what is around.

    Args:
        size: side of a hole as a fraction of the image's side.
        holes: how many; they may overlap or hang over the border.
        probability: of an example being changed.
    """

    def change(key: jax.Array, image: Image) -> Image:
        mean = reduce_spatial(jnp.mean, image)
        centres = jax.random.uniform(key, (holes, image.ndim - 1))
        for centre in centres:
            hole = jnp.ones((1,) * image.ndim, bool)
            for axis in _spatial(image):
                place = (jnp.arange(image.shape[axis]) + 0.5) / image.shape[axis]
                near = jnp.abs(place - centre[axis]) < size / 2
                hole = hole & near.reshape((-1,) + (1,) * (image.ndim - 1 - axis))
            image = jnp.where(hole, mean, image)
        return image

    return _on_image(change, probability)


def _on_image(change: Callable[[jax.Array, Image], Image], probability: Number) -> Augment:
    """An augmentation of the image alone, from a function (key, image) -> image."""
    return random_apply(
        lambda key, example: {**example, "image": change(key, example["image"])},
        probability=probability,
    )


def _spatial(image: Image) -> tuple[int, ...]:
    return tuple(range(image.ndim - 1))


def _spread(image: Image) -> Float[Array, " channels"]:
    """Standard deviation of each channel; all of it in rows, which is 4 to 8 times as fast."""
    rows = _rows(image)
    squares = jnp.square(rows - reduce_spatial(jnp.mean, image)[:, None])
    return jnp.sqrt(jax.lax.reduce_precision(squares.mean(-1), 8, 23))


def _draw(
    key: jax.Array, image: Image, low: float, high: float, per_channel: bool
) -> Float[Array, " _"]:
    """Uniform numbers that broadcast against the image: one a channel, or one in all."""
    count = image.shape[-1] if per_channel else 1
    return jax.random.uniform(key, (count,), minval=low, maxval=high)


def _draw_factor(
    key: jax.Array, image: Image, bounds: tuple[float, float], per_channel: bool
) -> Float[Array, " _"]:
    low, high = bounds
    return jnp.exp(_draw(key, image, math.log(low), math.log(high), per_channel))
