"""Residual networks for images and volumes (He et al. 2015, arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.models.blocks import ConvNorm, Dropout, max_pool
from jaxmed.types import Number

STAGES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
"""Blocks a stage, and whether blocks are bottlenecks."""


class ResidualBlock(nn.Module):
    """Two 3-wide convolutions, or a bottleneck of 1, 3 and 1, beside a shortcut.

    Strides are in the first 3-wide convolution, as in torchvision.
    """

    features: int
    strides: int | Sequence[int] = 1
    bottleneck: bool = False
    norm: str = "batch"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial cin"], train: bool
    ) -> Float[Array, "batch *out cout"]:
        """Apply the block."""
        common: dict[str, Any] = {
            "norm": self.norm,
            "axis_name": self.axis_name,
            "dtype": self.dtype,
        }
        out = self.features * (4 if self.bottleneck else 1)
        y = x
        if self.bottleneck:
            y = ConvNorm(self.features, 1, name="reduce", **common)(y, train)
        y = ConvNorm(self.features, 3, self.strides, name="conv1", **common)(y, train)
        window = 1 if self.bottleneck else 3
        y = ConvNorm(out, window, activation=None, name="conv2", **common)(y, train)
        if x.shape != y.shape:
            x = ConvNorm(out, 1, self.strides, activation=None, name="shortcut", **common)(x, train)
        return nn.relu(x + y)


class ResNetBackbone(nn.Module):
    """The stages of a residual network; returns the features of each.

    Attributes:
        variant: a key of `STAGES`.
        width: channels of the first stage (64 in the paper); each stage doubles them.
        stem_strides: how much the stem shrinks the image: 1 (a 3-wide convolution, for images of
            some 30 pixels, as the paper does for CIFAR), 2 (the same with a stride) or 4 (a 7-wide
            convolution with stride 2 and max pooling, as the paper does for ImageNet).
        norm: kind of normalisation, see `blocks.Norm`.
        axis_name: see `blocks.Norm`.
        remat: recompute blocks in the backward pass instead of keeping their insides.
        dtype: of the computation.
    """

    variant: str = "resnet18"
    width: int = 64
    stem_strides: int = 1
    norm: str = "batch"
    axis_name: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], train: bool = False
    ) -> list[Array]:
        """Features of every stage, finest first; stage i is `stem_strides * 2**i` times smaller."""
        common: dict[str, Any] = {
            "norm": self.norm,
            "axis_name": self.axis_name,
            "dtype": self.dtype,
        }
        sizes, bottleneck = STAGES[self.variant]
        if self.stem_strides not in (1, 2, 4):
            raise ValueError(f"stem_strides is {self.stem_strides}; expected 1, 2 or 4")
        window, strides = (7, 2) if self.stem_strides == 4 else (3, self.stem_strides)
        x = ConvNorm(self.width, window, strides, name="stem", **common)(x, train)
        if self.stem_strides == 4:
            x = max_pool(x)
        # Numbered from 0, counting the module itself: argument 2 is `train`.
        block = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        features = []
        for stage, count in enumerate(sizes):
            for i in range(count):
                x = block(
                    self.width * 2**stage,
                    2 if stage > 0 and i == 0 else 1,
                    bottleneck,
                    name=f"stage{stage}_block{i}",
                    **common,
                )(x, train)
            features.append(x)
        return features


class ResNet(nn.Module):
    """A residual network with a linear classifier on its averaged features.

    Attributes:
        classes: number of outputs.
        backbone: computes the features.
        dropout: share of the averaged features that are zeroed in training.
    """

    classes: int
    backbone: ResNetBackbone
    dropout: Number = 0.0

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch *spatial channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of every class."""
        x = self.backbone(images, train)[-1]
        x = x.mean(tuple(range(1, x.ndim - 1)), dtype=jnp.float32)
        x = Dropout(self.dropout, name="dropout")(x, train)
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)
