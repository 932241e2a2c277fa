"""Checks that go with every map: does it tell what the network does, or what the image looks like?

A map fails where it stays much the same when the weights are random, or where deleting what it
ranks first harms the score no more than deleting anything. Both rules are necessary, not
sufficient: a map that passes may still mislead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.stats
from jaxtyping import Array, Float
from skimage.metrics import structural_similarity

Score = Callable[[jax.Array], jax.Array]

ALIKE = 0.5
"""Rank correlation, of either sign, with the map of a random network above which a map fails."""

RANDOM_RANKINGS = 19
"""With 19 random rankings, one that beats them all does so by chance in 1 of 20 cases."""

TILES = {2: 16, 3: 8}
"""Tiles a side that are ranked, by dimensions; single voxels would leave a sieve of the image."""


def compare_maps(found: np.ndarray, random: np.ndarray) -> dict[str, float]:
    """How alike two maps (*spatial) are: that of the network and that of one of random weights.

    After the sanity checks of Adebayo et al. 2018 (arXiv 1810.03292).

    Returns:
        `correlation`, Spearman's of the values, and `ssim` of the maps brought to 0..1; nothing
        where a map is constant, which tells nothing of the other.
    """
    if np.ptp(found) == 0 or np.ptp(random) == 0:
        return {}
    correlation = float(scipy.stats.spearmanr(found.ravel(), random.ravel()).statistic)
    unit = [((x - x.min()) / np.ptp(x)).astype(np.float64) for x in (found, random)]
    side = min(7, min(found.shape) - 1 + min(found.shape) % 2)
    ssim = structural_similarity(*unit, win_size=side, data_range=1.0) if side >= 3 else math.nan
    return {"correlation": correlation, "ssim": float(ssim)}


def rank_tiles(values: np.ndarray, *, tiles: int) -> np.ndarray:
    """The place of each voxel's tile, from 0 for the tile of the largest mean to below 1.

    Args:
        values: a map (*spatial).
        tiles: along each side, at most.

    Returns:
        (*spatial) float32.
    """
    numbers = tile_numbers(values.shape, tiles=tiles)
    means = scipy.ndimage.mean(values, numbers, np.arange(numbers.max() + 1))
    order = np.empty(len(means))
    order[np.argsort(-means, kind="stable")] = np.arange(len(means)) / len(means)
    return order[numbers].astype(np.float32)


def tile_numbers(shape: Sequence[int], *, tiles: int) -> np.ndarray:
    """The number of the tile that each voxel lies in, (*shape) int."""
    counts = [min(tiles, side) for side in shape]
    places = [np.arange(n) * count // n for n, count in zip(shape, counts, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), counts)


def random_ranks(shape: Sequence[int], *, tiles: int, count: int, seed: int) -> np.ndarray:
    """Random places of the same tiles, (count, *shape) float32."""
    numbers = tile_numbers(shape, tiles=tiles)
    size = int(numbers.max()) + 1
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(size) for _ in range(count)]) / size
    return orders[:, numbers].astype(np.float32)


def deletion_curves(
    score: Score,
    image: Float[Array, "*spatial channels"],
    baseline: Float[Array, "*spatial channels"],
    ranks: Float[Array, " rankings *spatial"],
    *,
    steps: int = 10,
    batch_size: int = 16,
) -> Float[Array, " rankings points"]:
    """Scores while what is ranked first turns from image to baseline; jittable.

    With image and baseline in each other's place these are the curves of insertion. Source: Petsiuk
    et al. 2018 (arXiv 1806.07421), with the tiles of Samek et al. 2017
    (doi 10.1109/TNNLS.2016.2599820) in place of pixels.

    Args:
        score: a probability of one image.
        image: as the network sees it.
        baseline: what a deleted voxel becomes.
        ranks: of every voxel from 0 (first) to below 1, see `rank_tiles`.
        steps: of equal shares of the image.
        batch_size: images at a time.

    Returns:
        `steps + 1` points of each ranking, from nothing deleted to all.
    """

    def one(number: jax.Array) -> jax.Array:
        ranking, point = jnp.divmod(number, steps + 1)
        # A little room, since ranks are rounded.
        deleted = (ranks[ranking] < point / steps - 1e-6)[..., None]
        return score(jnp.where(deleted, baseline, image))

    count = ranks.shape[0]
    scores = jax.lax.map(one, jnp.arange(count * (steps + 1)), batch_size=batch_size)
    return scores.reshape(count, steps + 1)


def area_under(curves: Float[np.ndarray, " rankings points"]) -> Float[np.ndarray, " rankings"]:
    """Area under curves over 0..1, by trapezoids."""
    return (curves[:, 1:] + curves[:, :-1]).mean(-1) / 2


def share_on(values: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """How much of a map falls on a region, such as a lesion.

    Args:
        values: a map (*spatial).
        region: (*spatial) bool, perhaps with a margin (`dilate`).

    Returns:
        `share` of the sum of the positive values, `pointing` 1 where the largest value lies in the
        region (Zhang et al. 2016, arXiv 1608.00507), and `region` the region's share of the image,
        which an even map would have.
    """
    positive = np.maximum(values, 0)
    total = float(positive.sum())
    return {
        "share": float(positive[region].sum()) / total if total > 0 else 0.0,
        "pointing": float(total > 0 and region.flat[int(values.argmax())]),
        "region": float(region.mean()),
    }


def dilate(region: np.ndarray, *, margin: float) -> np.ndarray:
    """The region (*spatial) and all within `margin` voxels of it."""
    if not region.any():
        return region.astype(bool)
    return scipy.ndimage.distance_transform_edt(~region.astype(bool)) <= margin


def find_failures(checks: Mapping[str, float]) -> list[str]:
    """What of the checks a map fails, in words.

    Args:
        checks: `correlation` of `compare_maps`, where there is one; `deletion` the area under its
            curve, and `deletion_random` the lowest of those of random rankings; `gap` of integrated
            gradients, where it is known; `empty` whether nothing is positive.
    """
    failures = []
    if checks.get("empty"):
        failures.append("nothing in it is positive")
    # A random network may well weigh what it sees the other way round.
    if abs(checks.get("correlation", 0.0)) > ALIKE:
        failures.append(f"like that of random weights (correlation {checks['correlation']:.3f})")
    if checks["deletion"] >= checks["deletion_random"]:
        failures.append(
            f"deletion no better than random ({checks['deletion']:.2f} >= "
            f"{checks['deletion_random']:.2f}, the best of {RANDOM_RANKINGS} random rankings)"
        )
    if checks.get("gap", 0.0) > 0.01:
        failures.append(f"incomplete (gap {checks['gap']:.1%} > 1 %)")
    return failures
