"""The pieces that networks are made of: convolution, normalisation, up-sampling."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmed.models.convolution import convolution
from jaxmed.types import Number

NORMS = ("batch", "instance", "group", "none")


def per_axis(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """A number for every spatial axis: `3` -> `(3, 3)`; a sequence is checked and kept."""
    axes = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(axes) != ndim:
        raise ValueError(f"{value} has {len(axes)} entries; expected one, or one for {ndim} axes")
    return axes


class Conv(nn.Module):
    """Convolution over all spatial axes, channels last, "SAME" padding.

    Attributes:
        features: output channels.
        window: voxels along each axis, one number or one an axis.
        strides: likewise.
        use_bias: whether to add a learned constant a channel.
        dtype: of the computation; parameters stay float32.
    """

    features: int
    window: int | Sequence[int] = 3
    strides: int | Sequence[int] = 1
    use_bias: bool = False
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *spatial cin"]) -> Float[Array, "batch *out cout"]:
        """Convolve `x`."""
        ndim = x.ndim - 2
        shape = (*per_axis(self.window, ndim), x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = convolution(
            x.astype(self.dtype), kernel.astype(self.dtype), strides=per_axis(self.strides, ndim)
        )
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return y


class InstanceNorm(nn.Module):
    """Normalise each channel of each example (Ulyanov et al. 2016, arXiv 1607.08022).

    The variance is that of the centred values: the usual shortcut through the mean of squares
    loses all precision where a channel's mean is far above its spread.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial channels"]
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalise `x` over its spatial axes, then scale and shift."""
        axes = tuple(range(1, x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axes, keepdims=True)
        variance = jnp.square(centred).mean(axes, keepdims=True)
        y = centred * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return y.astype(self.dtype)


class Norm(nn.Module):
    """One of the normalisations, by name.

    Attributes:
        kind: "batch", "instance", "group" (of 8 groups, or fewer where channels are few), "none".
        axis_name: the mapped axis over which batch statistics are shared (under `pmap`). Under
            `jit` it is None, and the statistics are of the global batch already.
        dtype: of the result; statistics are float32.
    """

    kind: str = "batch"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], train: bool
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalise `x`."""
        if self.kind == "batch":
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                axis_name=self.axis_name if train else None,
                dtype=self.dtype,
                name="batch",
            )(x)
        if self.kind == "instance":
            return InstanceNorm(dtype=self.dtype, name="instance")(x)
        if self.kind == "group":
            groups = max(g for g in (8, 4, 2, 1) if x.shape[-1] % g == 0)
            return nn.GroupNorm(groups, use_fast_variance=False, dtype=self.dtype, name="group")(x)
        if self.kind == "none":
            return x
        raise ValueError(f"norm is {self.kind!r}; expected one of {', '.join(NORMS)}")


class ConvNorm(nn.Module):
    """Convolution, normalisation and, unless it is None, an activation."""

    features: int
    window: int | Sequence[int] = 3
    strides: int | Sequence[int] = 1
    norm: str = "batch"
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial cin"], train: bool
    ) -> Float[Array, "batch *out cout"]:
        """Apply the three in turn."""
        x = Conv(self.features, self.window, self.strides, dtype=self.dtype, name="conv")(x)
        x = Norm(self.norm, self.axis_name, self.dtype, name="norm")(x, train)
        return x if self.activation is None else self.activation(x)


class Dropout(nn.Module):
    """Zero a share of the features in training, and enlarge the rest to keep their mean.

    Unlike Flax's own it takes a rate that is traced, so that models trained together can differ.
    Source: Srivastava et al. 2014 (JMLR 15).

    Attributes:
        rate: share, from 0 to below 1.
    """

    rate: Number = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], train: bool) -> Float[Array, "*shape"]:
        """Drop out of `x`; outside training, or at a rate that is plainly 0, nothing."""
        is_off = not isinstance(self.rate, jax.Array) and self.rate == 0
        if not train or is_off:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)


@contextlib.contextmanager
def dropout_by(key: jax.Array, rate: Number) -> Iterator[None]:
    """Drop out features outside training too, so that another key samples another network.

    All images of a batch lose the same features: what is predicted of one does not depend on the
    others. Source: Gal & Ghahramani 2016 (arXiv 1506.02142).

    Args:
        key: of the sample.
        rate: share of the features that are dropped.
    """
    used = itertools.count()

    def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, Dropout) or context.method_name != "__call__":
            return following(*args, **kwargs)
        x = args[0]
        own = jax.random.fold_in(key, next(used))
        kept = jax.random.bernoulli(own, 1.0 - rate, (1, *x.shape[1:]))
        return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)

    with nn.intercept_methods(intercept):
        yield


def depth_to_space(
    x: Float[Array, "batch *spatial packed"], factors: Sequence[int]
) -> Float[Array, "batch *out channels"]:
    """Move groups of channels to positions: (..., n, ..., prod(f) * c) -> (..., n * f, ..., c).

    With a 1-voxel convolution before it this is a transposed convolution whose window equals its
    stride, as one matrix product (Shi et al. 2016, arXiv 1609.05158).
    """
    batch, *spatial, packed = x.shape
    ndim = len(spatial)
    y = x.reshape(batch, *spatial, *factors, packed // math.prod(factors))
    # (batch, n1, n2, f1, f2, c) -> (batch, n1, f1, n2, f2, c)
    order = [0, *(axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)), 2 * ndim + 1]
    shape = [n * f for n, f in zip(spatial, factors, strict=True)]
    return y.transpose(order).reshape(batch, *shape, y.shape[-1])


def max_pool(x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *out channels"]:
    """The maximum of 3 voxels along each axis, at every second one.

    One axis after another, by slices: the gradient of XLA's own pooling is several times slower on
    the CPU (182 against 48 ms for a batch of 8 at 128 x 128 x 64).
    """
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        out = -(-size // 2)
        missing = 2 * (out - 1) + 3 - size
        widths = [(0, 0)] * x.ndim
        widths[axis] = (missing // 2, missing - missing // 2)
        padded = jnp.pad(x, widths, constant_values=-jnp.inf)
        first, second, third = (
            jax.lax.slice_in_dim(padded, i, i + 2 * out - 1, stride=2, axis=axis) for i in range(3)
        )
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


class Upsample(nn.Module):
    """Enlarge by whole factors, each fine position with weights of its own (`depth_to_space`)."""

    features: int
    factors: int | Sequence[int] = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *spatial cin"]) -> Float[Array, "batch *out cout"]:
        """Enlarge `x`."""
        factors = per_axis(self.factors, x.ndim - 2)
        packed = Conv(self.features * math.prod(factors), 1, dtype=self.dtype, name="conv")(x)
        return depth_to_space(packed, factors)
