"""oneDNN's convolutions on the CPU, through ctypes.

XLA's own convolutions are slow on the CPU: in 3-D throughout, in 2-D for the kernel's gradient.
oneDNN (https://uxlfoundation.github.io/oneDNN) is what PyTorch uses there. Its wheel holds a shared
library and nothing else, so it is called with ctypes alone and no compiler is needed.

Primitives are made once a shape, hold no data and may run in several threads at once: buffers,
stream and scratch memory belong to one call.

`jaxmed.models.onednn_call` puts this inside XLA programs; `jaxmed.models.convolution` is what
people use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIBRARY = "libdnnl.so.3"
DISTRIBUTION = "onednn-cpu-gomp"
KINDS = ("forward", "input", "kernel")
"""The convolution, and its gradients with respect to its input and to its kernel."""

Shape = tuple[int, ...]
_Int64 = ctypes.c_int64
_Pointer = ctypes.c_void_p
_Size = ctypes.c_size_t


class OneDNNError(RuntimeError):
    """oneDNN, or the interface to it, refused a call."""


class Problem(NamedTuple):
    """One convolution, or one of its gradients, of fixed shapes.

    Attributes:
        kind: one of KINDS.
        x: shape of the input, (batch, *spatial, cin).
        w: shape of the kernel, (*window, cin, cout).
        y: shape of the output, (batch, *spatial, cout).
        strides: one a spatial axis.
        padding: (low, high) of each spatial axis.
        bfloat16: products of operands rounded to bfloat16, with float32 sums.
    """

    kind: str
    x: Shape
    w: Shape
    y: Shape
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    bfloat16: bool


def result_shape(problem: Problem) -> Shape:
    """Shape of what a problem computes."""
    return {"forward": problem.y, "input": problem.x, "kernel": problem.w}[problem.kind]


def in_order(kind: str, a: Any, b: Any, out: Any) -> tuple[Any, Any, Any]:
    """Sort what belongs to two operands and the result of a kind into (input, kernel, output)."""
    if kind == "forward":
        return a, b, out
    return (out, b, a) if kind == "input" else (a, out, b)


# Constants of oneDNN 3 (dnnl_types.h).
_CPU, _FLOAT32, _ANY_LAYOUT, _TRAINING, _DIRECT = 1, 3, 1, 64, 1
_USER_SCRATCHPAD, _FPMATH_BFLOAT16 = 1, 1
_QUERY_IMPLEMENTATION, _QUERY_WEIGHTS, _QUERY_DIFF_WEIGHTS, _QUERY_SCRATCHPAD = 8, 131, 132, 136
_FROM, _TO, _SRC, _DST, _WEIGHTS = 1, 17, 1, 17, 33
_SCRATCHPAD, _DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 80, 129, 145, 161
_STATUS = {1: "out of memory", 2: "invalid arguments", 3: "unimplemented"}
_ALIGNMENT = 64


class _Argument(ctypes.Structure):
    _fields_ = [("name", ctypes.c_int), ("memory", _Pointer)]


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int)]


def _int64s(values: Sequence[int]) -> Any:
    return (_Int64 * len(values))(*values)


class _Library:
    """The shared library and its engine; raises OneDNNError where a call fails."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.dnnl_version.restype = ctypes.POINTER(_Version)
        version = self.functions.dnnl_version().contents
        if version.major != 3:
            raise OneDNNError(f"{path} is version {version.major}; expected 3")
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self.functions.dnnl_primitive_desc_query_md.restype = _Pointer
        self.functions.dnnl_memory_desc_get_size.restype = _Size
        self.engine = self.create("dnnl_engine_create", _CPU, _Size(0))

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.functions, name)(*arguments)
        if status:
            raise OneDNNError(f"{name}: {_STATUS.get(status, f'status {status}')}")

    def create(self, name: str, *arguments: Any) -> _Pointer:
        """Call a function whose first argument receives what it makes."""
        made = _Pointer()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def query(self, description: _Pointer, what: int) -> _Pointer:
        return _Pointer(self.functions.dnnl_primitive_desc_query_md(description, what, 0))

    def size(self, memory: _Pointer) -> int:
        return self.functions.dnnl_memory_desc_get_size(memory)

    def layout(self, shape: Shape, order: Sequence[int]) -> _Pointer:
        """Describe a row-major array whose axes oneDNN wants to see in another order."""
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        return self.create(
            "dnnl_memory_desc_create_with_strides",
            *(len(shape), _int64s([shape[axis] for axis in order]), _FLOAT32),
            _int64s([strides[axis] for axis in order]),
        )

    def free_layout(self, shape: Shape, order: Sequence[int]) -> _Pointer:
        """Describe an array whose layout is oneDNN's choice."""
        dims = _int64s([shape[axis] for axis in order])
        return self.create(
            "dnnl_memory_desc_create_with_tag", len(shape), dims, _FLOAT32, _ANY_LAYOUT
        )


def _find_library() -> Path | None:
    if not sys.platform.startswith("linux"):
        return None
    paths = [Path(prefix, "lib", LIBRARY) for prefix in (sys.prefix, sys.base_prefix)]
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths += [Path(str(file.locate())) for file in files if file.name == LIBRARY]
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def library() -> _Library | None:
    """Load the library; None, with a warning where one was found, if that cannot be done."""
    path = _find_library()
    if path is None:
        return None
    try:
        return _Library(path)
    except (OSError, AttributeError, OneDNNError) as error:
        warn(f"{path} cannot be used ({error})")
        return None


def warn(reason: str) -> None:
    """Say why a library that is there goes unused."""
    warnings.warn(
        f"oneDNN is left out: {reason}; convolutions on the CPU are XLA's own and slow. "
        "JAXMED_ONEDNN=0 switches it off without this warning",
        RuntimeWarning,
        stacklevel=2,
    )


class Operation:
    """oneDNN's primitives for one problem: the convolution, and a reordering of its kernel.

    Images stay channels-last as JAX has them. The kernel's layout inside is oneDNN's choice.
    """

    def __init__(self, problem: Problem):
        found = library()
        if found is None:
            raise OneDNNError(f"{LIBRARY} is not there; pip install {DISTRIBUTION}")
        self.library, self.problem = found, problem
        rank = len(problem.x)
        images, kernels = (0, rank - 1, *range(1, rank - 1)), (rank - 1, rank - 2, *range(rank - 2))
        self.x, self.y = found.layout(problem.x, images), found.layout(problem.y, images)
        self.w = found.layout(problem.w, kernels)
        self.attributes = found.create("dnnl_primitive_attr_create")
        found.call("dnnl_primitive_attr_set_scratchpad_mode", self.attributes, _USER_SCRATCHPAD)
        if problem.bfloat16:
            found.call("dnnl_primitive_attr_set_fpmath_mode", self.attributes, _FPMATH_BFLOAT16)
        self.description = self._describe(found.free_layout(problem.w, kernels))
        query = _QUERY_DIFF_WEIGHTS if problem.kind == "kernel" else _QUERY_WEIGHTS
        self.inner = found.query(self.description, query)
        ends = (self.inner, self.w) if problem.kind == "kernel" else (self.w, self.inner)
        self.reorder_description = found.create(
            "dnnl_reorder_primitive_desc_create",
            *(ends[0], found.engine, ends[1], found.engine, self.attributes),
        )
        self.inner_bytes = -(-found.size(self.inner) // _ALIGNMENT) * _ALIGNMENT
        self.scratchpads = [
            found.query(description, _QUERY_SCRATCHPAD)
            for description in (self.description, self.reorder_description)
        ]
        self.scratch_bytes = self.inner_bytes + max(map(found.size, self.scratchpads)) + _ALIGNMENT

    def _describe(self, w: _Pointer) -> _Pointer:
        library, problem = self.library, self.problem
        low, high = zip(*problem.padding, strict=True)
        no_dilation = [0] * len(low)
        window = [_int64s(values) for values in (problem.strides, no_dilation, low, high)]
        create, engine = library.create, library.engine
        forward = create(
            "dnnl_convolution_forward_primitive_desc_create",
            *(engine, _TRAINING, _DIRECT, self.x, w, None, self.y, *window, self.attributes),
        )
        if problem.kind == "forward":
            return forward
        hints = (*window, forward, self.attributes)
        if problem.kind == "input":
            return create(
                "dnnl_convolution_backward_data_primitive_desc_create",
                *(engine, _DIRECT, self.x, w, self.y, *hints),
            )
        return create(
            "dnnl_convolution_backward_weights_primitive_desc_create",
            *(engine, _DIRECT, self.x, w, None, self.y, *hints),
        )

    @functools.cached_property
    def primitives(self) -> tuple[_Pointer, _Pointer]:
        """The convolution and the reordering, compiled by oneDNN."""
        create = functools.partial(self.library.create, "dnnl_primitive_create")
        return create(self.description), create(self.reorder_description)

    @functools.cached_property
    def implementation(self) -> str:
        """The name that oneDNN gives to the code it chose."""
        name = ctypes.c_char_p()
        self.library.call(
            "dnnl_primitive_desc_query",
            *(self.description, _QUERY_IMPLEMENTATION, 0, ctypes.byref(name)),
        )
        return (name.value or b"").decode()

    def __call__(self, a: int, b: int, out: int, scratch: int) -> None:
        """Run on buffers given by their addresses; may run in several threads at once."""
        library, kind = self.library, self.problem.kind
        convolve, reorder = self.primitives
        inner = -(-scratch // _ALIGNMENT) * _ALIGNMENT
        x, w, y = in_order(kind, a, b, out)
        made: list[_Pointer] = []

        def memory(layout: _Pointer, address: int) -> _Pointer:
            made.append(
                library.create("dnnl_memory_create", layout, library.engine, _Pointer(address))
            )
            return made[-1]

        stream = library.create("dnnl_stream_create", library.engine, 0)
        execute = functools.partial(_execute, library, stream)
        try:
            mx, mw, my = memory(self.x, x), memory(self.w, w), memory(self.y, y)
            mi = memory(self.inner, inner)
            pad, reorder_pad = (
                (_SCRATCHPAD, memory(layout, inner + self.inner_bytes))
                for layout in self.scratchpads
            )
            if kind == "kernel":
                execute(convolve, (_SRC, mx), (_DIFF_DST, my), (_DIFF_WEIGHTS, mi), pad)
                execute(reorder, (_FROM, mi), (_TO, mw), reorder_pad)
                return
            execute(reorder, (_FROM, mw), (_TO, mi), reorder_pad)
            if kind == "forward":
                execute(convolve, (_SRC, mx), (_WEIGHTS, mi), (_DST, my), pad)
            else:
                execute(convolve, (_DIFF_DST, my), (_WEIGHTS, mi), (_DIFF_SRC, mx), pad)
        finally:
            for item in made:
                library.functions.dnnl_memory_destroy(item)
            library.functions.dnnl_stream_destroy(stream)


def _execute(library: _Library, stream: _Pointer, primitive: _Pointer, *arguments: Any) -> None:
    array = (_Argument * len(arguments))(*[_Argument(name, memory) for name, memory in arguments])
    library.call("dnnl_primitive_execute", primitive, stream, len(arguments), array)
    library.call("dnnl_stream_wait", stream)


@functools.cache
def operation(problem: Problem) -> Operation:
    """Make the operation of a problem, once.

    Raises:
        OneDNNError: oneDNN cannot do it.
    """
    # Never freed: a few kilobytes each, and a program has few shapes.
    return Operation(problem)


def supports(problem: Problem) -> bool:
    """Whether oneDNN has fast code for a problem on this CPU; its reference code is no use."""
    if 0 in (*problem.x, *problem.w, *problem.y):
        return False
    try:
        return not operation(problem).implementation.startswith("ref")
    except OneDNNError:
        return False
