"""The convolution that every network is built from.

On GPU and TPU it is XLA's own. On the CPU, where XLA's is slow, it is oneDNN's wherever that can do
the work: float32, no groups, no dilation, library installed. The choice is made when a program is
lowered for a platform, so one traced function serves all of them, and exported programs hold plain
XLA only.

Derivatives of any order and mode work, and so do `vmap`, `pmap`, `shard_map` and `jit` over a mesh
(split along the batch); see `jaxmed.models.convolution_primitive`.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxmed.models import onednn_library
from jaxmed.models.convolution_primitive import Geometry, convolve, xla_convolution

Padding = str | Sequence[tuple[int, int]]


def _from_environment(name: str, default: str) -> bool:
    return os.environ.get(name, default).lower() not in ("0", "false", "off", "")


_ENABLED, _BFLOAT16 = (
    _from_environment("JAXMED_ONEDNN", "1"),
    _from_environment("JAXMED_ONEDNN_BFLOAT16", "0"),
)
_enabled = contextvars.ContextVar("enabled", default=_ENABLED)
_bfloat16 = contextvars.ContextVar("bfloat16", default=_BFLOAT16)


@contextlib.contextmanager
def use_onednn(enabled: bool = True, *, bfloat16: bool | None = None) -> Iterator[None]:
    """Choose how convolutions traced inside the block run on the CPU.

    The choice is read when a function is traced: one that `jax.jit` has compiled before keeps what
    it was compiled with. The environment variables JAXMED_ONEDNN (default 1) and
    JAXMED_ONEDNN_BFLOAT16 (default 0), read when this module is imported, set what holds outside
    of any block. What reads jaxprs, such as a converter to ONNX, wants `use_onednn(False)`.

    Args:
        enabled: oneDNN where it can do the work; else XLA's convolution.
        bfloat16: round operands to bfloat16 (sums and results stay float32), as TPUs do and, with
            TF32, GPUs: nearly twice as fast where the CPU has AVX512-BF16 or AMX; nothing changes
            where it has neither. None leaves it as it is.
    """
    wanted = _bfloat16.get() if bfloat16 is None else bfloat16
    tokens = _enabled.set(enabled), _bfloat16.set(wanted)
    try:
        yield
    finally:
        _enabled.reset(tokens[0])
        _bfloat16.reset(tokens[1])


def convolution(
    x: Float[Array, "batch *spatial cin"],
    kernel: Float[Array, "*window cin_per_group cout"],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: Any = None,
) -> Float[Array, "batch *out cout"]:
    """Convolve images or volumes, channels last; as many spatial axes as `x` has.

    Args:
        x: images of the same dtype as `kernel`.
        kernel: its axes before the last two are the window.
        strides: one for all or one a spatial axis.
        padding: "SAME" (output is ceil(input / stride)), "VALID", or (low, high) a spatial axis.
        dilation: distance of the kernel's taps, one for all or one a spatial axis.
        groups: channels are convolved in so many separate groups.
        precision: of XLA's products, see `jax.lax.Precision`; oneDNN's are float32.

    Raises:
        ValueError: ranks of `x` and `kernel` differ, or strides, dilation or padding do not fit.
        TypeError: dtypes differ, or channels do not fit.
    """
    ndim = x.ndim - 2
    if ndim < 1 or kernel.ndim != x.ndim:
        raise ValueError(
            f"x has shape {x.shape} and kernel {kernel.shape}; expected (batch, *spatial, cin) and "
            "(*window, cin, cout) with as many spatial axes"
        )
    strides, dilation = _per_axis("strides", strides, ndim), _per_axis("dilation", dilation, ndim)
    if isinstance(padding, str):
        window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:-2], strict=True)]
        padding = lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    if len(pads) != ndim:
        raise ValueError(f"padding is {padding}; expected a pair for each of {ndim} spatial axes")
    if _takes_primitive(x, kernel, dilation, groups, pads):
        if set(kernel.shape[:-2]) == {1} and not any(map(any, pads)):
            # What the strides pass over is never looked at, and `onednn.supports` no such thing.
            x = x[:, *(slice(None, None, stride) for stride in strides)]
            strides = (1,) * ndim
        geometry = Geometry(
            *(x.shape[1:-1], kernel.shape[:-2], strides, pads, precision, _bfloat16.get())
        )
        return convolve(x, kernel, geometry)
    return xla_convolution(
        x,
        kernel,
        strides=strides,
        padding=pads,
        dilation=dilation,
        groups=groups,
        precision=precision,
    )


def _per_axis(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    values = (value,) * ndim if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != ndim:
        raise ValueError(f"{name} is {value}; expected one number or {ndim}, one a spatial axis")
    return values


def _takes_primitive(
    x: jax.Array,
    kernel: jax.Array,
    dilation: tuple[int, ...],
    groups: int,
    padding: tuple[tuple[int, int], ...],
) -> bool:
    """Whether oneDNN could do this, were it on a CPU."""
    plain = (
        _enabled.get()
        and x.dtype == kernel.dtype == jnp.float32
        and groups == 1
        and set(dilation) == {1}
        and x.shape[-1] == kernel.shape[-2]
        and min(min(pair) for pair in padding) >= 0
        # Exported programs may have sizes that are symbols.
        and all(isinstance(size, int) and size > 0 for size in (*x.shape, *kernel.shape))
    )
    explicit = _is_explicit(x) or _is_explicit(kernel)
    return plain and not explicit and onednn_library.library() is not None


def _is_explicit(array: jax.Array) -> bool:
    # Shardings that are part of the type are left to XLA's convolution, which has rules for them.
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    return bool(getattr(mesh, "explicit_axes", ()))
