"""The convolution as a JAX primitive, which is oneDNN's on the CPU and XLA's elsewhere.

The primitive has three kinds: the product of images and kernel, and its two gradients. Each is
linear in either operand and its transposes are again of these kinds, so derivatives of any order
and mode come from a handful of rules. Which code multiplies is settled when a program is lowered:
XLA's on any platform but the CPU, in programs for export, and where oneDNN has no fast code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxmed.models import onednn, onednn_call


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the shapes of two operands do not say of a convolution or its gradients."""

    spatial: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: Any
    bfloat16: bool

    @property
    def output(self) -> tuple[int, ...]:
        """Spatial shape of the convolution's output."""
        return tuple(
            max(0, (n + low + high - k) // s + 1)
            for n, k, s, (low, high) in zip(
                self.spatial, self.window, self.strides, self.padding, strict=True
            )
        )

    def result_shape(self, kind: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the product of operands of shapes `a` and `b`."""
        if kind == "forward":
            return (a[0], *self.output, b[-1])
        if kind == "input":
            return (a[0], *self.spatial, b[-2])
        return (*self.window, a[-1], b[-1])


def xla_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
    precision: Any,
) -> jax.Array:
    """XLA's own convolution of channels-last images, of any number of spatial axes."""
    spatial = "".join("xyzuvw"[: x.ndim - 2])
    image = f"N{spatial}C"
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(image, f"{spatial}IO", image),
        feature_group_count=groups,
        precision=precision,
    )


# Operands are (x, kernel), (gradient, kernel) and (x, gradient). With `members`, both operands and
# the result have one more leading axis: many convolutions, each of its own kernel.
_product = Primitive("jaxmed_convolution")
_bind = _product.bind


def _abstract(a, b, *, kind, geometry, members):
    m = int(members)
    return a.update(shape=(*a.shape[:m], *geometry.result_shape(kind, a.shape[m:], b.shape[m:])))


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve float32 arrays of the shapes that `geometry` tells."""
    return _bind(*_vary_together(x, kernel), kind="forward", geometry=geometry, members=False)


@functools.cache
def _compiled(**parameters: Any) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(_bind, **parameters))


def _run_now(a, b, **parameters):
    with jax.disable_jit(False):  # under disable_jit, jit would call this again
        return _compiled(**parameters)(a, b)


def _xla_product(a, b, *, kind, geometry, members):
    """XLA's own convolution, and JAX's own derivatives of it."""
    if members:
        one = functools.partial(_xla_product, kind=kind, geometry=geometry, members=False)
        return jax.vmap(one)(a, b)
    g = geometry

    def forward(x, kernel):
        return xla_convolution(
            x,
            kernel,
            strides=g.strides,
            padding=g.padding,
            dilation=(1,) * len(g.strides),
            groups=1,
            precision=g.precision,
        )

    if kind == "forward":
        return forward(a, b)
    result = jax.ShapeDtypeStruct(g.result_shape(kind, a.shape, b.shape), a.dtype)
    if kind == "input":
        return jax.linear_transpose(lambda x: forward(x, b), result)(a)[0]
    return jax.linear_transpose(lambda w: forward(a, w), result)(b)[0]


def _transpose_first(cotangent, a, b, *, kind, **parameters):
    if kind == "forward":
        return _bind(cotangent, b, kind="input", **parameters)
    if kind == "input":
        return _bind(cotangent, b, kind="forward", **parameters)
    return _bind(b, cotangent, kind="input", **parameters)


def _transpose_second(cotangent, a, b, *, kind, **parameters):
    if kind == "forward":
        return _bind(a, cotangent, kind="kernel", **parameters)
    if kind == "input":
        return _bind(cotangent, a, kind="kernel", **parameters)
    return _bind(a, cotangent, kind="forward", **parameters)


def _batch(operands, axes, *, kind, geometry, members):
    """Fold a vmapped axis into the images, or into the members where every one has a kernel."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    same = functools.partial(_bind, kind=kind, geometry=geometry)
    if kind != "kernel" and axes[1] is None and not members:
        a = jnp.moveaxis(operands[0], axes[0], 0)
        out = same(a.reshape(-1, *a.shape[2:]), operands[1], members=False)
        return out.reshape(size, -1, *out.shape[1:]), 0
    a, b = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    if not members:
        return same(a, b, members=True), 0
    out = same(*(x.reshape(-1, *x.shape[2:]) for x in (a, b)), members=True)
    return out.reshape(size, -1, *out.shape[1:]), 0


def _varying_axes(array: jax.Array) -> frozenset[str]:
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)  # `vma` was its name
    return frozenset(manual.varying if manual is not None else getattr(kind, "vma", ()))


def _vary_together(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Inside shard_map, operands must vary over the same mesh axes.
    axes = [_varying_axes(array) for array in (x, kernel)]
    missing = [tuple((axes[0] | axes[1]) - own) for own in axes]
    x, kernel = (
        lax.pcast(array, names, to="varying") if names else array
        for array, names in zip((x, kernel), missing, strict=True)
    )
    return x, kernel


def _problem(a, b, *, kind, geometry) -> onednn.Problem:
    out = geometry.result_shape(kind, a.shape, b.shape)
    x, w, y = onednn.in_order(kind, a.shape, b.shape, out)
    return onednn.Problem(kind, x, w, y, geometry.strides, geometry.padding, geometry.bfloat16)


def _whole(kind: str, geometry: Geometry) -> Callable[..., jax.Array]:
    return lambda a, b: onednn_call.call(_problem(a, b, kind=kind, geometry=geometry), a, b)


def _split_along_batch(kind: str, geometry: Geometry) -> Callable[..., jax.Array]:
    """The product by oneDNN, which XLA splits over the devices of a mesh along the batch only."""
    run = _whole(kind, geometry)

    def partition(mesh, operands, result):
        axes = _batch_axes(operands[0]) or (_batch_axes(operands[1]) if kind == "kernel" else None)
        shares = int(np.prod([mesh.shape[name] for name in axes or ()]))
        if operands[0].shape[0] % shares:
            axes = None
        images = NamedSharding(mesh, PartitionSpec(axes))
        whole = NamedSharding(mesh, PartitionSpec())
        if kind != "kernel":
            return mesh, run, images, (images, whole)
        total = (lambda a, b: lax.psum(run(a, b), axes)) if axes else run
        return mesh, total, whole, (images, images)

    rule, others = _sharding_rule(kind, len(geometry.strides) + 2)
    split = custom_partitioning(run)
    split.def_partition(
        partition,
        infer_sharding_from_operands=lambda *arguments: partition(*arguments)[2],
        sharding_rule=rule,
        need_replication_factors=others,
        reduction_factors=("n",) if kind == "kernel" else (),
    )
    return split


def _sharding_rule(kind: str, rank: int) -> tuple[str, tuple[str, ...]]:
    """Name the axes of operands and result: "n" is the batch, the others are not to be split."""
    a, b, out = ([f"{array}{axis}" for axis in range(rank)] for array in "abc")
    others = tuple(a[1:] + b[kind == "kernel" :] + out[kind != "kernel" :])
    a[0] = "n"
    (b if kind == "kernel" else out)[0] = "n"
    return f"{' '.join(a)}, {' '.join(b)} -> {' '.join(out)}", others


def _batch_axes(operand: Any) -> tuple[str, ...] | None:
    first = next(iter(getattr(operand.sharding, "spec", ())), None)
    return (first,) if isinstance(first, str) else first


def _onednn_product(a, b, *, kind, geometry, members, split):
    one = (_split_along_batch if split else _whole)(kind, geometry)
    if members:
        return lax.map(lambda operands: one(*operands), (a, b))
    return one(a, b)


def _choose(context, shapes, kind, geometry) -> Callable[..., jax.Array]:
    """Choose what multiplies on the CPU."""
    module = context.module_context
    # An exported program must run where there is no oneDNN.
    if getattr(getattr(module, "lowering_parameters", None), "for_export", True):
        return _xla_product
    if not onednn_call.is_ready():
        return _xla_product
    if not onednn.supports(_problem(*shapes, kind=kind, geometry=geometry)):
        if not geometry.bfloat16:
            return _xla_product
        wide = dataclasses.replace(geometry, bfloat16=False)
        product = _choose(context, shapes, kind, wide)
        return lambda a, b, *, geometry, **rest: product(a, b, geometry=wide, **rest)
    axes = module.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):  # shard_map and pmap: shapes are one device's
        manual = set(axes.manual_axes) == set(axes.mesh.axis_names)
        return functools.partial(_onednn_product, split=False) if manual else _xla_product
    if isinstance(axes, mlir.ShardingContext) and axes.num_devices == 1:
        return functools.partial(_onednn_product, split=False)
    if getattr(axes, "device_assignment", None):
        return functools.partial(_onednn_product, split=True)
    return _xla_product


def _lower_for_cpu(context, a, b, *, kind, geometry, members):
    shapes = [jax.ShapeDtypeStruct(v.shape[members:], v.dtype) for v in context.avals_in]
    product = functools.partial(
        _choose(context, shapes, kind, geometry), kind=kind, geometry=geometry, members=members
    )
    return mlir.lower_fun(product, multiple_results=False)(context, a, b)


def _ask_for_devices() -> None:
    # Splitting needs to know the mesh, which JAX tells only to primitives on a private list. Where
    # a future JAX has none, programs over several devices have XLA's convolution.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import dispatch

        dispatch.prim_requires_devices_during_lowering.add(_product)


_product.def_abstract_eval(_abstract)
_product.def_impl(_run_now)
ad.defbilinear(_product, _transpose_first, _transpose_second)
batching.primitive_batchers[_product] = _batch
mlir.register_lowering(_product, mlir.lower_fun(_xla_product, multiple_results=False))
mlir.register_lowering(_product, _lower_for_cpu, platform="cpu")
_ask_for_devices()
