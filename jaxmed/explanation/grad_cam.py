"""Grad-CAM, Grad-CAM++ and HiResCAM of any layer, in 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LayerScore = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""What is added to a layer (1, *grid, features) -> the score (), and the layer's output."""


def grad_cam(
    score: LayerScore, layer: tuple[Sequence[int], Any], *, shape: Sequence[int]
) -> Float[Array, "*spatial"]:
    """Features of a layer weighted by their mean gradient, its positive part.

    Source: Selvaraju et al. 2016 (arXiv 1610.02391), equations 1 and 2.

    Args:
        score: of one image, see `jaxmed.explanation.layers.apply_and_add`.
        layer: shape (1, *grid, features) and type of its output.
        shape: spatial shape of the image, to which the map is interpolated linearly.
    """
    slopes, features = _slopes(score, layer)
    weights = slopes.mean(tuple(range(slopes.ndim - 1)))
    return _map(features, weights, shape)


def grad_cam_plus(
    score: LayerScore, layer: tuple[Sequence[int], Any], *, shape: Sequence[int]
) -> Float[Array, "*spatial"]:
    """Grad-CAM++: positive gradients, weighted so that each of several objects counts.

    Source: Chattopadhyay et al. 2017 (arXiv 1710.11063), equations 10 and 19.

    Args:
        score: as of `grad_cam`, as are the others.
        layer: shape and type of its output.
        shape: spatial shape of the image.
    """
    slopes, features = _slopes(score, layer)
    grid = tuple(range(slopes.ndim - 1))
    denominator = 2 * slopes**2 + features.sum(grid, keepdims=True) * slopes**3
    share = slopes**2 / jnp.where(denominator != 0, denominator, 1)
    weights = (share * jax.nn.relu(slopes)).sum(grid)
    return _map(features, weights, shape)


def hires_cam(
    score: LayerScore, layer: tuple[Sequence[int], Any], *, shape: Sequence[int]
) -> Float[Array, "*spatial"]:
    """HiResCAM: features times their own gradients, place by place, the positive part.

    It equals Grad-CAM where the features are averaged and classified. Where the score is that of
    one place, as of a box, a mean gradient would weigh alike what is far from it. Source: Draelos &
    Carin 2020 (arXiv 2011.08891), equation 8; for boxes Zhao & Chan 2023 (ODAM, ICLR).

    Args:
        score: as of `grad_cam`, as are the others.
        layer: shape and type of its output.
        shape: spatial shape of the image.
    """
    slopes, features = _slopes(score, layer)
    return _map(features, slopes, shape)


def _slopes(score: LayerScore, layer: tuple[Sequence[int], Any]) -> tuple[jax.Array, jax.Array]:
    """Gradient of the score with respect to the features, and these, (*grid, features)."""
    zeros = jnp.zeros(tuple(layer[0]), layer[1])
    slopes, features = jax.grad(score, has_aux=True)(zeros)
    return slopes[0].astype(jnp.float32), features[0].astype(jnp.float32)


def _map(features: jax.Array, weights: jax.Array, shape: Sequence[int]) -> jax.Array:
    found = jax.nn.relu((features * weights).sum(-1))
    return jax.image.resize(found, tuple(shape), "linear")
