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

import contextlib
import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np

from jaxmed.models.onednn_library import (
    BFLOAT16,
    DISTRIBUTION,
    FLOAT32,
    LIBRARY,
    Library,
    OneDNNError,
    Shape,
    int64s,
    library,
)

KINDS = ("forward", "input", "kernel")
"""The convolution, and its gradients with respect to its input and to its kernel."""

_Pointer = ctypes.c_void_p


class Problem(NamedTuple):
    """One convolution, or one of its gradients, of fixed shapes.

    Attributes:
        kind: one of KINDS.
        x: shape of the input, (batch, *spatial, cin).
        w: shape of the kernel, (*window, cin, cout).
        y: shape of the output, (batch, *spatial, cout).
        strides: one a spatial axis.
        padding: (low, high) of each spatial axis.
        bfloat16: both operands are of that type; sums and the result are float32.
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
_TRAINING, _DIRECT = 64, 1
_USER_SCRATCHPAD = 1
_QUERY_IMPLEMENTATION, _QUERY_WEIGHTS, _QUERY_DIFF_WEIGHTS, _QUERY_SCRATCHPAD = 8, 131, 132, 136
_FROM, _TO, _SRC, _DST, _WEIGHTS = 1, 17, 1, 17, 33
_SCRATCHPAD, _DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 80, 129, 145, 161
_ALIGNMENT = 64
# Fewer multiplications than this are done before other threads have woken up.
_WORTH_THREADS = 8_000_000


class _Argument(ctypes.Structure):
    _fields_ = [("name", ctypes.c_int), ("memory", _Pointer)]


class Operation:
    """oneDNN's primitives for one problem: the convolution, and a reordering of its kernel.

    Images stay channels-last as JAX has them. The kernel's layout inside is oneDNN's choice.
    """

    def __init__(self, problem: Problem):
        found = library()
        if found is None:
            raise OneDNNError(f"{LIBRARY} is not there; pip install {DISTRIBUTION}")
        self.library, self.problem = found, problem
        self.single = int(np.prod(problem.y)) * int(np.prod(problem.w[:-1])) < _WORTH_THREADS
        with found.threads(self.single):
            self._plan()

    def _plan(self) -> None:
        found, problem = self.library, self.problem
        rank = len(problem.x)
        images, kernels = (0, rank - 1, *range(1, rank - 1)), (rank - 1, rank - 2, *range(rank - 2))
        operand = BFLOAT16 if problem.bfloat16 else FLOAT32
        result = FLOAT32
        of_x, of_w, of_y = in_order(problem.kind, operand, operand, result)
        self.x = found.layout(problem.x, images, of_x)
        self.y = found.layout(problem.y, images, of_y)
        self.w = found.layout(problem.w, kernels, of_w)
        self.attributes = found.create("dnnl_primitive_attr_create")
        found.call("dnnl_primitive_attr_set_scratchpad_mode", self.attributes, _USER_SCRATCHPAD)
        # Of a gradient oneDNN wants to see the forward product, all of the operands' type.
        hint = [found.layout(shape, images, operand) for shape in (problem.x, problem.y)]
        free = [found.free_layout(problem.w, kernels, dtype) for dtype in (of_w, operand)]
        self.description = self._describe(free[0], (hint[0], free[1], hint[1]))
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

    def _describe(self, w: _Pointer, hint: tuple[_Pointer, _Pointer, _Pointer]) -> _Pointer:
        library, problem = self.library, self.problem
        low, high = zip(*problem.padding, strict=True)
        no_dilation = [0] * len(low)
        window = [int64s(values) for values in (problem.strides, no_dilation, low, high)]
        create, engine = library.create, library.engine
        is_forward = problem.kind == "forward"
        x, kernel, y = (self.x, w, self.y) if is_forward else hint
        forward = create(
            "dnnl_convolution_forward_primitive_desc_create",
            *(engine, _TRAINING, _DIRECT, x, kernel, None, y, *window, self.attributes),
        )
        if is_forward:
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
        with self.library.threads(self.single):
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
        inner = -(-scratch // _ALIGNMENT) * _ALIGNMENT
        rest = inner + self.inner_bytes
        x, w, y = in_order(kind, a, b, out)
        places = zip(
            (self.x, self.w, self.y, self.inner, *self.scratchpads),
            (x, w, y, inner, rest, rest),
            strict=True,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(library.threads(self.single))
            stream = library.create("dnnl_stream_create", library.engine, 0)
            stack.callback(library.functions.dnnl_stream_destroy, stream)
            memories = []
            for layout, address in places:
                memory = library.create(
                    "dnnl_memory_create", layout, library.engine, _Pointer(address)
                )
                stack.callback(library.functions.dnnl_memory_destroy, memory)
                memories.append(memory)
            self._execute(stream, memories)

    def _execute(self, stream: _Pointer, memories: list[_Pointer]) -> None:
        x, w, y, inner, pad, reorder_pad = memories
        convolve, reorder = self.primitives
        run = functools.partial(_execute, self.library, stream)
        if self.problem.kind == "kernel":
            run(convolve, (_SRC, x), (_DIFF_DST, y), (_DIFF_WEIGHTS, inner), (_SCRATCHPAD, pad))
            run(reorder, (_FROM, inner), (_TO, w), (_SCRATCHPAD, reorder_pad))
            return
        run(reorder, (_FROM, w), (_TO, inner), (_SCRATCHPAD, reorder_pad))
        ends = ((_SRC, x), (_DST, y))
        if self.problem.kind == "input":
            ends = ((_DIFF_SRC, x), (_DIFF_DST, y))
        run(convolve, *ends, (_WEIGHTS, inner), (_SCRATCHPAD, pad))


def _execute(library: Library, stream: _Pointer, primitive: _Pointer, *arguments: Any) -> None:
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
    if set(problem.w[:-2]) == {1} and set(problem.strides) != {1}:
        # With AVX2 it writes beyond the scratch memory that it asks for (seen with 3.2).
        return False
    try:
        name = operation(problem).implementation
    except OneDNNError:
        return False
    # Without instructions for bfloat16 it would be emulated.
    is_emulated = problem.bfloat16 and "bf16" not in name and "amx" not in name
    return not name.startswith("ref") and not is_emulated
