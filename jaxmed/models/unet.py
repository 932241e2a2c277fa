"""U-Net for images and volumes, as nnU-Net lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.models.blocks import Conv, ConvNorm, Dropout, Upsample, per_axis
from jaxmed.types import Number


class ConvStage(nn.Module):
    """Some convolutions with normalisation and leaky ReLU, the first one strided."""

    features: int
    strides: int | Sequence[int] = 1
    convolutions: int = 2
    norm: str = "instance"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial cin"], train: bool
    ) -> Float[Array, "batch *out cout"]:
        """Apply the convolutions in turn."""
        for i in range(self.convolutions):
            x = ConvNorm(
                self.features,
                3,
                self.strides if i == 0 else 1,
                norm=self.norm,
                activation=partial(nn.leaky_relu, negative_slope=0.01),
                axis_name=self.axis_name,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x, train)
        return x


class UNet(nn.Module):
    """Encoder and decoder with skip connections (Ronneberger et al. 2015, arXiv 1505.04597).

    Down-sampling is a strided convolution, normalisation is per instance and activations are leaky,
    after nnU-Net (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).

    Attributes:
        classes: number of output channels.
        features: channels of each level, finest first.
        strides: factor between a level and the next, one number or one an axis, for each of the
            `len(features) - 1` steps; None halves every axis. Anisotropic volumes keep their thick
            axis with entries such as (2, 2, 1).
        convolutions: of each level.
        norm: see `blocks.Norm`.
        dropout: share of the coarsest level's features that are zeroed in training.
        deep_supervision: in training, return logits of the coarser levels too.
        axis_name: see `blocks.Norm`.
        remat: recompute levels in the backward pass instead of keeping their insides.
        dtype: of the computation; logits are float32.
    """

    classes: int
    features: Sequence[int] = (32, 64, 128, 256)
    strides: Sequence[int | Sequence[int]] | None = None
    convolutions: int = 2
    norm: str = "instance"
    dropout: Number = 0.0
    deep_supervision: bool = False
    axis_name: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch *spatial channels"], train: bool = False
    ) -> Array | list[Array]:
        """Logits (batch, *spatial, classes); with deep supervision a list, finest first."""
        ndim = images.ndim - 2
        strides = [per_axis(s, ndim) for s in self.strides or (2,) * (len(self.features) - 1)]
        _check_divisible(images.shape[1:-1], strides)
        # Numbered from 0, counting the module itself: argument 2 is `train`.
        stage = partial(
            nn.remat(ConvStage, static_argnums=(2,)) if self.remat else ConvStage,
            convolutions=self.convolutions,
            norm=self.norm,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        x = stage(self.features[0], name="encoder0")(images, train)
        skips = [x]
        for level, (features, stride) in enumerate(
            zip(self.features[1:], strides, strict=True), start=1
        ):
            x = stage(features, stride, name=f"encoder{level}")(x, train)
            skips.append(x)
        x = Dropout(self.dropout, name="dropout")(x, train)
        outputs: list[Array] = []
        for level in reversed(range(len(strides))):
            up = Upsample(
                self.features[level], strides[level], dtype=self.dtype, name=f"up{level}"
            )(x)
            x = jnp.concatenate([up, skips[level]], axis=-1)
            x = stage(self.features[level], name=f"decoder{level}")(x, train)
            if level == 0 or self.deep_supervision:
                head = Conv(self.classes, 1, use_bias=True, name=f"head{level}")
                outputs.insert(0, head(x.astype(jnp.float32)))
        return outputs if train and self.deep_supervision else outputs[0]


def _check_divisible(spatial: Sequence[Any], strides: Sequence[Sequence[int]]) -> None:
    """Sizes may be symbols, in a program for export."""
    factors = [1] * len(spatial)
    for stride in strides:
        factors = [f * s for f, s in zip(factors, stride, strict=True)]
    if any(size % factor for size, factor in zip(spatial, factors, strict=True)):
        raise ValueError(
            f"a U-Net of {len(strides) + 1} levels needs image sides divisible by "
            f"{tuple(factors)}; got {tuple(spatial)}"
        )
