"""Importance of parts of an image: channels, or regions such as superpixels.

The parts are players: an array as large as the image says which player every value belongs to.
Channels and regions, 2-D and 3-D, then are one code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from skimage.segmentation import slic

Score = Callable[[jax.Array], jax.Array]


def channel_players(shape: Sequence[int]) -> np.ndarray:
    """The channels of an image of (*spatial, channels) as players."""
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), tuple(shape))


def region_players(
    image: np.ndarray, *, regions: int = 40, spacing: Sequence[float] | None = None
) -> np.ndarray:
    """Superpixels of an image as players, numbered from 0 without a gap.

    Source: SLIC (Achanta et al. 2012, doi 10.1109/TPAMI.2012.120).

    Args:
        image: (*spatial, channels).
        regions: about that many.
        spacing: mm a voxel, for volumes.

    Returns:
        (*spatial, channels) int32.
    """
    low, high = float(image.min()), float(image.max())
    unit = (image.astype(np.float64) - low) / max(high - low, 1e-12)
    with warnings.catch_warnings():
        # Of a constant image all superpixels are one, which it warns of.
        warnings.simplefilter("ignore")
        labels = slic(
            unit,
            n_segments=regions,
            compactness=0.1,
            channel_axis=-1,
            start_label=0,
            spacing=None if spacing is None else np.asarray(spacing, np.float64),
        )
    _, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(labels.shape).astype(np.int32)
    return np.broadcast_to(numbers[..., None], image.shape)


def shapley_values(
    score: Score,
    image: Float[Array, "*spatial channels"],
    baseline: Float[Array, "*spatial channels"],
    players: Int[Array, "*spatial channels"],
    key: Array,
    *,
    count: int,
    permutations: int = 16,
    batch_size: int = 16,
) -> Float[Array, " {count}"]:
    """Shapley values by sampling permutations, each also in reverse; jittable.

    They sum up to the difference of the scores of image and baseline (efficiency) whatever the
    number of permutations, since every one does. Source: Štrumbelj & Kononenko 2014
    (doi 10.1007/s10115-013-0679-x); antithetic pairs as in Mitchell et al. 2022 (arXiv 2104.12199).

    Args:
        score: of one image.
        image: as the network sees it.
        baseline: what is seen in the place of absent players.
        players: number of the player of every value, from 0.
        key: of the permutations.
        count: players.
        permutations: even; half are drawn, the others are their reverse.
        batch_size: images at a time.
    """
    if permutations < 2 or permutations % 2:
        raise ValueError(f"permutations is {permutations}; expected an even number")
    draw = jax.vmap(lambda key: jax.random.permutation(key, count))
    drawn = draw(jax.random.split(key, permutations // 2))
    orders = jnp.concatenate([drawn, drawn[:, ::-1]])
    places = jnp.argsort(orders, axis=1)  # when each player joins

    def one(number: jax.Array) -> jax.Array:
        order, joined = jnp.divmod(number, count + 1)
        present = places[order] < joined
        return score(jnp.where(present[players], image, baseline))

    numbers = jnp.arange(permutations * (count + 1))
    scores = jax.lax.map(one, numbers, batch_size=batch_size).reshape(permutations, count + 1)
    gains = scores[:, 1:] - scores[:, :-1]
    return jnp.take_along_axis(gains, places, axis=1).mean(0)


def permutation_importance(
    score: Score,
    image: Float[Array, "*spatial channels"],
    others: Float[Array, " others *spatial channels"],
    players: Int[Array, "*spatial channels"],
    *,
    count: int,
    batch_size: int = 16,
) -> Float[Array, " {count}"]:
    """How far the score falls when a player's values come from other images; jittable.

    The mean over all other images, so there is nothing to draw. Source: Fisher et al. 2019
    (arXiv 1801.01489), equation 5, for one case.

    Args:
        score: of one image.
        image: as the network sees it.
        others: images of the same set.
        players: number of the player of every value, from 0.
        count: players.
        batch_size: images at a time.
    """
    donors = others.shape[0]

    def one(number: jax.Array) -> jax.Array:
        player, donor = jnp.divmod(number, donors)
        return score(jnp.where(players == player, others[donor], image))

    scores = jax.lax.map(one, jnp.arange(count * donors), batch_size=batch_size)
    return score(image) - scores.reshape(count, donors).mean(1)
