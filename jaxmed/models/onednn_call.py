"""oneDNN's convolutions inside XLA programs, through JAX's foreign function interface.

The handler is written in ctypes, so no compiler is needed:
  * A call carries its whole geometry as attributes of the XLA call and the shapes of its buffers,
    never a number of this process, so compiled programs may be kept in a cache on disk.
  * Scratch memory is a second result of the XLA call, so that XLA counts and reuses it.
  * The structures below are XLA's C interface (xla/ffi/api/c_api.h, seen as 0.3 to 0.5). Each
    carries its size. Where one is not as expected the call is refused, and a trial run before the
    first use turns that into one warning and XLA's own convolution.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models import onednn
from jaxmed.models.onednn import KINDS, Problem
from jaxmed.models.onednn_library import OneDNNError, Shape, warn

TARGET = "jaxmed_onednn_convolution"
_Int64 = ctypes.c_int64
_Pointer = ctypes.c_void_p
_Size = ctypes.c_size_t


def _structure(name: str, *fields: tuple[str, Any]) -> Any:
    """Make a structure that begins, as XLA's do, with its size and a list of extensions."""
    head = [("size", _Size), ("extensions", _Pointer)]
    return type(name, (ctypes.Structure,), {"_fields_": [*head, *fields]})


_ApiVersion = _structure("_ApiVersion", ("major", ctypes.c_int), ("minor", ctypes.c_int))
_Buffer = _structure(
    "_Buffer",
    *(("dtype", ctypes.c_int), ("data", _Pointer)),
    *(("rank", _Int64), ("dims", ctypes.POINTER(_Int64))),
)
_Buffers = _structure(
    "_Buffers",
    *(("count", _Int64), ("types", ctypes.POINTER(ctypes.c_int))),
    ("items", ctypes.POINTER(ctypes.POINTER(_Buffer))),
)
_ErrorArguments = _structure(
    "_ErrorArguments", ("message", ctypes.c_char_p), ("code", ctypes.c_int)
)
_CreateError = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_ErrorArguments))
_Api = _structure(
    "_Api", ("version", _ApiVersion), ("internal", _Pointer), ("create_error", _CreateError)
)


class _Array(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("count", _Size), ("data", ctypes.POINTER(_Int64))]


_Attributes = _structure(
    "_Attributes",
    *(("count", _Int64), ("types", ctypes.POINTER(ctypes.c_int)), ("names", _Pointer)),
    ("items", ctypes.POINTER(ctypes.POINTER(_Array))),
)
_Frame = _structure(
    "_Frame",
    *(("api", ctypes.POINTER(_Api)), ("context", _Pointer), ("stage", ctypes.c_int)),
    *(("operands", _Buffers), ("results", _Buffers), ("attributes", _Attributes)),
)


class _Metadata(ctypes.Structure):
    _fields_ = [("size", _Size), ("version", _ApiVersion), ("traits", ctypes.c_uint32)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [
        *(("size", _Size), ("type", ctypes.c_int), ("next", _Pointer)),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


_MAJOR, _METADATA, _EXECUTE, _INTERNAL_ERROR = 0, 1, 3, 13
_IS_BUFFER, _IS_ARRAY, _IS_FLOAT32, _IS_BFLOAT16, _IS_INT64 = 1, 1, 11, 16, 5
_METADATA_BYTES = 36  # without the padding that ctypes counts


def _expect(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise OneDNNError(f"XLA's interface has changed: {what} is {found}; expected {expected}")


def _expect_size(structure: Any) -> None:
    _expect(f"the size of {type(structure).__name__}", structure.size, ctypes.sizeof(structure))


def _answer_metadata(frame: Any) -> None:
    """Tell XLA which interface this handler is written for."""
    extension = ctypes.cast(frame.extensions, ctypes.POINTER(_MetadataExtension)).contents
    _expect_size(extension)
    _expect("the extension's type", extension.type, _METADATA)
    metadata = extension.metadata.contents
    _expect("the size of the metadata", metadata.size, _METADATA_BYTES)
    _expect_size(metadata.version)
    api = frame.api.contents
    if api.size < ctypes.sizeof(api):
        raise OneDNNError(f"XLA's interface has changed: its table has {api.size} bytes")
    version = api.version
    _expect("the major version", version.major, _MAJOR)
    # The sizes of the structures say more than the minor version: it is taken as it is.
    metadata.version.major, metadata.version.minor = _MAJOR, version.minor
    metadata.traits = 0


def _read_buffer(buffers: Any, index: int) -> tuple[int, Shape, int]:
    _expect("the kind of an operand", buffers.types[index], _IS_BUFFER)
    buffer = buffers.items[index].contents
    _expect_size(buffer)
    return buffer.data or 0, tuple(buffer.dims[: buffer.rank]), buffer.dtype


def _run(frame: Any) -> None:
    """Execute one call."""
    _expect("the stage", frame.stage, _EXECUTE)
    for part in (frame.operands, frame.results, frame.attributes):
        _expect_size(part)
    _expect("the number of operands", frame.operands.count, 2)
    _expect("the number of results", frame.results.count, 2)
    _expect("the number of attributes", frame.attributes.count, 1)
    _expect("the kind of the attribute", frame.attributes.types[0], _IS_ARRAY)
    array = frame.attributes.items[0].contents
    _expect("the type of the attribute", array.dtype, _IS_INT64)
    a, b = (_read_buffer(frame.operands, index) for index in range(2))
    out, scratch = (_read_buffer(frame.results, index) for index in range(2))
    problem = _decode(array.data[: array.count], a[1], b[1], out[1])
    for _, _, dtype in (a, b):
        expected = _IS_BFLOAT16 if problem.bfloat16 else _IS_FLOAT32
        _expect("the type of an operand", dtype, expected)
    _expect("the type of the result", out[2], _IS_FLOAT32)
    operation = onednn.operation(problem)
    address, (room,), _ = scratch
    if room < operation.scratch_bytes:
        # A program from a cache, compiled where oneDNN had fewer threads.
        spare = np.empty(operation.scratch_bytes, np.uint8)
        address = spare.ctypes.data
    operation(a[0], b[0], out[0], address)


def _encode(problem: Problem) -> np.ndarray:
    low, high = zip(*problem.padding, strict=True)
    numbers = [KINDS.index(problem.kind), problem.bfloat16, *problem.strides, *low, *high]
    return np.array(numbers, np.int64)


def _decode(numbers: list[int], a: Shape, b: Shape, out: Shape) -> Problem:
    ndim = len(a) - 2
    _expect("the length of the attribute", len(numbers), 2 + 3 * ndim)
    kind, strides = KINDS[numbers[0]], tuple(numbers[2 : 2 + ndim])
    padding = tuple(zip(numbers[2 + ndim : 2 + 2 * ndim], numbers[2 + 2 * ndim :], strict=True))
    x, w, y = onednn.in_order(kind, a, b, out)
    return Problem(kind, x, w, y, strides, padding, bool(numbers[1]))


@ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_Frame))
def _handler(pointer):
    """Answer XLA. An exception would be swallowed here, so it goes back as XLA's own error."""
    frame = pointer.contents
    try:
        _expect_size(frame)
        if frame.extensions:
            _answer_metadata(frame)
        else:
            _run(frame)
    except BaseException as error:
        message = f"oneDNN convolution: {error}".encode()
        arguments = _ErrorArguments(message=message, code=_INTERNAL_ERROR)
        arguments.size = ctypes.sizeof(arguments)
        return frame.api.contents.create_error(ctypes.byref(arguments))
    return None


def call(problem: Problem, a: jax.Array, b: jax.Array) -> jax.Array:
    """Put a product into the program that is being traced; runs on the CPU only."""
    scratch = onednn.operation(problem).scratch_bytes
    shape = onednn.result_shape(problem)
    results = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct((scratch,), np.uint8)
    if problem.bfloat16:
        # Here, so that XLA joins the rounding to whatever computes the operands.
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.ffi.ffi_call(TARGET, results)(a, b, geometry=_encode(problem))[0]


_ready: bool | None = None
_lock = threading.Lock()


def is_ready() -> bool:
    """Whether calls work; the first time, they are tried out. Needs JAX's CPU backend."""
    global _ready
    with _lock:
        if _ready is None:
            reasons: list[str] = []
            # A thread of its own: nothing of the trace or the settings under way reaches in there.
            thread = threading.Thread(target=_try_out, args=(reasons,))
            thread.start()
            thread.join()
            _ready = not reasons
            if reasons:
                warn(reasons[0])
        return _ready


def _try_out(reasons: list[str]) -> None:
    """Register the handler and run it once, appending what goes wrong."""
    try:
        # With the backend started, a handler that it does not accept does no harm to it.
        cpu = jax.local_devices(backend="cpu")[0]
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_handler), platform="cpu")
        x = np.arange(32, dtype=np.float32).reshape(1, 2, 2, 8)
        w = 2 * np.eye(8, dtype=np.float32)[None, None]
        problem = Problem("forward", x.shape, w.shape, x.shape, (1, 1), ((0, 0), (0, 0)), False)
        with jax.default_device(cpu):
            found = jax.jit(lambda a, b: call(problem, a, b))(x, w)
            if not np.array_equal(found, 2 * x):
                reasons.append("a trial gave wrong numbers")
    except Exception as error:
        reasons.append(str(error).splitlines()[0])
