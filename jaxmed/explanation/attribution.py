"""Attribution: how much each voxel of an image counts for a score.

`score` is a function of one image (*spatial, channels), as the network sees it, to a number (). All
of this works under `jit` and `vmap`, in 2-D and 3-D; what runs the network many times does so in
batches of a fixed number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Score = Callable[[jax.Array], jax.Array]


def gradient(
    score: Score, image: Float[Array, "*spatial channels"]
) -> Float[Array, "*spatial channels"]:
    """The gradient with respect to the image (Simonyan et al. 2013, arXiv 1312.6034)."""
    return jax.grad(score)(image)


def smooth_gradient(
    score: Score,
    image: Float[Array, "*spatial channels"],
    key: Array,
    *,
    noise: float = 0.1,
    samples: int = 32,
    batch_size: int = 8,
) -> Float[Array, "*spatial channels"]:
    """SmoothGrad: the mean gradient over noisy copies (Smilkov et al. 2017, arXiv 1706.03825).

    Args:
        score: of one image.
        image: as the network sees it.
        key: of the noise.
        noise: its standard deviation, as a share of the range of the image.
        samples: copies.
        batch_size: of them at a time.
    """
    spread = noise * (image.max() - image.min())

    def one(key: jax.Array) -> jax.Array:
        return jax.grad(score)(image + spread * jax.random.normal(key, image.shape))

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=batch_size).mean(0)


def integrated_gradients(
    score: Score,
    image: Float[Array, "*spatial channels"],
    baseline: Float[Array, "*spatial channels"],
    *,
    tolerance: float = 0.01,
    steps: int = 16,
    max_steps: int = 512,
    batch_size: int = 8,
) -> tuple[Float[Array, "*spatial channels"], dict[str, jax.Array]]:
    """Integrated gradients along the straight line (Sundararajan et al. 2017, arXiv 1703.01365).

    By the midpoint rule, whose steps are doubled until the attribution sums up to the difference of
    the scores (completeness, their proposition 1).

    Args:
        score: of one image.
        image: as the network sees it.
        baseline: an image without what is to be explained.
        tolerance: gap at which it stops.
        steps: to begin with; a multiple of `batch_size`.
        max_steps: at most.
        batch_size: points at a time.

    Returns:
        the attribution, and `gap` = |sum - difference| / |difference|, `difference` of the scores
        of image and baseline, and `steps`.
    """
    difference = score(image) - score(baseline)
    scale = jnp.maximum(jnp.abs(difference), 1e-6)
    slopes = jax.vmap(jax.grad(score))

    def integrate(steps: jax.Array) -> jax.Array:
        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            place = (number * batch_size + jnp.arange(batch_size) + 0.5) / steps
            place = place.reshape(-1, *(1,) * image.ndim)
            return total + slopes(baseline + place * (image - baseline)).sum(0)

        total = jax.lax.fori_loop(0, steps // batch_size, add, jnp.zeros_like(image))
        return (image - baseline) * total / steps

    def gap(found: jax.Array) -> jax.Array:
        return jnp.abs(found.sum() - difference) / scale

    def more(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        steps, _, missing = state
        return (missing > tolerance) & (steps < max_steps)

    def refine(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        steps = state[0] * 2
        found = integrate(steps)
        return steps, found, gap(found)

    start = (jnp.asarray(steps // 2), jnp.zeros_like(image), jnp.asarray(jnp.inf, image.dtype))
    steps_taken, found, missing = jax.lax.while_loop(more, refine, start)
    return found, {"gap": missing, "difference": difference, "steps": steps_taken}


def occlusion(
    score: Score,
    image: Float[Array, "*spatial channels"],
    baseline: Float[Array, "*spatial channels"],
    *,
    patch: Sequence[int],
    stride: Sequence[int],
    batch_size: int = 16,
) -> Float[Array, "*spatial"]:
    """How far the score falls when a patch is covered (Zeiler & Fergus 2013, arXiv 1311.2901).

    The patch slides over the whole image, its border included; each voxel has the mean of the
    patches that cover it.

    Args:
        score: of one image.
        image: as the network sees it.
        baseline: what is seen in the place of the patch.
        patch: sides in voxels.
        stride: voxels from one position to the next, at most those of the patch.
        batch_size: positions at a time.
    """
    covers = [
        jnp.asarray(_cover(side, p, s))
        for side, p, s in zip(image.shape[:-1], patch, stride, strict=True)
    ]
    counts = [len(cover) for cover in covers]

    def fall(number: jax.Array) -> jax.Array:
        inside = jnp.ones((), image.dtype)
        for place, cover in zip(jnp.unravel_index(number, counts), covers, strict=True):
            inside = inside[..., None] * cover[place]
        inside = inside[..., None]
        return score(image * (1 - inside) + baseline * inside)

    numbers = jnp.arange(int(np.prod(counts)))
    found = score(image) - jax.lax.map(fall, numbers, batch_size=batch_size)
    total = found.reshape(counts)
    for cover in covers:
        # Contracts the first axis and puts the image's last: after ndim rounds all are in order.
        total = jnp.tensordot(total, cover / cover.sum(0), axes=(0, 0))
    return total


def _cover(side: int, patch: int, stride: int) -> np.ndarray:
    """(positions, side) 0 and 1: which voxels of an axis a patch covers at each position."""
    patch = min(patch, side)
    count = -(-(side - patch) // stride) + 1
    starts = np.linspace(0, side - patch, count).round().astype(int)
    voxels = np.arange(side)
    cover = (voxels >= starts[:, None]) & (voxels < starts[:, None] + patch)
    return cover.astype(np.float32)
