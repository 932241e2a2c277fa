"""A dense, anchor-free detector: backbone, feature pyramid and one head for all levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.boxes import decode_distances, grid_points
from jaxmed.models.blocks import Conv, ConvNorm, Dropout
from jaxmed.models.resnet import ResNetBackbone
from jaxmed.types import Number


def level_points(
    shape: Sequence[int], grids: Sequence[Sequence[int]]
) -> tuple[Float[Array, "points ndim"], Float[Array, "points ndim"]]:
    """Centres of all cells of a feature pyramid, and the cells' sides, in voxels of the image.

    Args:
        shape: spatial shape of the image.
        grids: spatial shape of each level's features.
    """
    points, sides = [], []
    for grid in grids:
        side = [size / cells for size, cells in zip(shape, grid, strict=True)]
        points.append(grid_points(grid, stride=side))
        sides.append(jnp.broadcast_to(jnp.asarray(side, jnp.float32), points[-1].shape))
    return jnp.concatenate(points), jnp.concatenate(sides)


class Detector(nn.Module):
    """Scores and boxes at every cell of a feature pyramid.

    The layout is that of FCOS (Tian et al. 2019, arXiv 1904.01355) on a feature pyramid (Lin et al.
    2016, arXiv 1612.03144); which cells learn which object is the task's affair.

    Attributes:
        classes: number of kinds of object.
        backbone: its stages are the pyramid's input.
        levels: which of the stages to use, finest first.
        features: channels of pyramid and head.
        convolutions: of each of the head's two branches.
        dropout: share of the pyramid's features that are zeroed in training.
        dtype: of the computation; outputs are float32.
    """

    classes: int
    backbone: ResNetBackbone
    levels: Sequence[int] = (1, 2, 3)
    features: int = 96
    convolutions: int = 2
    dropout: Number = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch *spatial channels"], train: bool = False
    ) -> dict[str, jax.Array]:
        """Predict densely.

        Returns:
            logits (batch, points, classes); boxes (batch, points, 2 * ndim) in voxels of the image;
            points (points, ndim) and sides (points, ndim) of the cells.
        """
        pyramid = self._pyramid(self.backbone(images, train), train)
        points, sides = level_points(images.shape[1:-1], [x.shape[1:-1] for x in pyramid])
        logits, distances = zip(*self._heads(pyramid, train), strict=True)
        reach = jnp.concatenate(distances, axis=1) * jnp.concatenate([sides, sides], axis=-1)
        return {
            "logits": jnp.concatenate(logits, axis=1),
            "boxes": jax.vmap(decode_distances, (None, 0))(points, reach),
            "points": points,
            "sides": sides,
        }

    def _pyramid(self, stages: list[Array], train: bool) -> list[Array]:
        """Top-down pathway: each level adds the coarser one, enlarged by repetition."""
        coarser: Array | None = None
        levels: list[Array] = []
        for i in reversed(self.levels):
            lateral = Conv(self.features, 1, use_bias=True, dtype=self.dtype, name=f"lateral{i}")
            x = lateral(stages[i])
            if coarser is not None:
                x = x + _repeat_to(coarser, x.shape[1:-1])
            coarser = x
            x = ConvNorm(self.features, 3, norm="group", dtype=self.dtype, name=f"smooth{i}")(
                x, train
            )
            levels.insert(0, Dropout(self.dropout, name=f"dropout{i}")(x, train))
        return levels

    def _heads(self, pyramid: list[Array], train: bool) -> list[tuple[Array, Array]]:
        """Logits and distances to the box sides, in cells, at every level; weights are shared."""
        ndim = pyramid[0].ndim - 2
        class_branch, box_branch = (
            [
                ConvNorm(self.features, 3, norm="group", dtype=self.dtype, name=f"{branch}{i}")
                for i in range(self.convolutions)
            ]
            for branch in ("class", "box")
        )
        # A prior of .01 keeps the many empty cells from drowning the first steps (Lin et al. 2017,
        # arXiv 1708.02002).
        prior = nn.initializers.constant(-math.log(99.0))
        small = nn.initializers.normal(0.01)
        class_head = Conv(
            self.classes, 3, use_bias=True, bias_init=prior, kernel_init=small, name="class_head"
        )
        box_head = Conv(2 * ndim, 3, use_bias=True, kernel_init=small, name="box_head")
        outputs = []
        for i, x in enumerate(pyramid):
            y = z = x
            for class_conv, box_conv in zip(class_branch, box_branch, strict=True):
                y, z = class_conv(y, train), box_conv(z, train)
            # An exponent turns equal steps of the output into equal ratios of size; it starts at
            # boxes of some six cells.
            scale = self.param(f"scale{i}", nn.initializers.ones, (), jnp.float32)
            reach = box_head(z.astype(jnp.float32)) * scale + 1.0
            distances = jnp.exp(jnp.clip(reach, -6.0, 6.0))
            logits = class_head(y.astype(jnp.float32))
            flat = (x.shape[0], -1)
            outputs.append(
                (logits.reshape(*flat, self.classes), distances.reshape(*flat, 2 * ndim))
            )
        return outputs


def _repeat_to(x: Float[Array, "batch *coarse c"], shape: Sequence[int]) -> Array:
    """Enlarge by repetition and cut to `shape` (an odd side leaves one voxel too many)."""
    for axis, size in enumerate(shape, start=1):
        x = jnp.repeat(x, -(-size // x.shape[axis]), axis=axis)
        x = jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return x
