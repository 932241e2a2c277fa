"""The shared library of oneDNN: found, loaded and called, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = "libdnnl.so.3"
DISTRIBUTION = "onednn-cpu-gomp"

Shape = tuple[int, ...]
_Pointer = ctypes.c_void_p

# Constants of oneDNN 3 (dnnl_types.h).
_CPU, _ANY_LAYOUT = 1, 1
BFLOAT16, FLOAT32 = 2, 3
_STATUS = {1: "out of memory", 2: "invalid arguments", 3: "unimplemented"}


class OneDNNError(RuntimeError):
    """oneDNN, or the interface to it, refused a call."""


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int)]


def int64s(values: Sequence[int]) -> Any:
    """An array of C's int64."""
    return (ctypes.c_int64 * len(values))(*values)


def _load(path: Path) -> ctypes.CDLL:
    # OpenMP's threads would spin for a while after each call, on cores that XLA's next operation
    # wants. OpenMP reads how to wait when it is loaded; a choice of the user's own stands.
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return ctypes.CDLL(str(path))
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        return ctypes.CDLL(str(path))
    finally:
        del os.environ["OMP_WAIT_POLICY"]


class Library:
    """The shared library and its engine; raises OneDNNError where a call fails."""

    def __init__(self, path: Path):
        self.functions = _load(path)
        self.functions.dnnl_version.restype = ctypes.POINTER(_Version)
        version = self.functions.dnnl_version().contents
        if version.major != 3:
            raise OneDNNError(f"{path} is version {version.major}; expected 3")
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self.functions.dnnl_primitive_desc_query_md.restype = _Pointer
        self.functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        self.engine = self.create("dnnl_engine_create", _CPU, ctypes.c_size_t(0))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that answers with a status."""
        status = getattr(self.functions, name)(*arguments)
        if status:
            raise OneDNNError(f"{name}: {_STATUS.get(status, f'status {status}')}")

    def create(self, name: str, *arguments: Any) -> _Pointer:
        """Call a function whose first argument receives what it makes."""
        made = _Pointer()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    @contextlib.contextmanager
    def threads(self, single: bool) -> Iterator[None]:
        """Keep what OpenMP does in this thread, for a while, to one thread."""
        if not single:
            yield
            return
        before = self.functions.omp_get_max_threads()
        self.functions.omp_set_num_threads(1)
        try:
            yield
        finally:
            self.functions.omp_set_num_threads(before)

    def query(self, description: _Pointer, what: int) -> _Pointer:
        """A layout that a description of a primitive asks for."""
        return _Pointer(self.functions.dnnl_primitive_desc_query_md(description, what, 0))

    def size(self, memory: _Pointer) -> int:
        """Bytes of a layout."""
        return self.functions.dnnl_memory_desc_get_size(memory)

    def layout(self, shape: Shape, order: Sequence[int], dtype: int) -> _Pointer:
        """Describe a row-major array whose axes oneDNN wants to see in another order."""
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        return self.create(
            "dnnl_memory_desc_create_with_strides",
            *(len(shape), int64s([shape[axis] for axis in order]), dtype),
            int64s([strides[axis] for axis in order]),
        )

    def free_layout(self, shape: Shape, order: Sequence[int], dtype: int) -> _Pointer:
        """Describe an array whose layout is oneDNN's choice."""
        dims = int64s([shape[axis] for axis in order])
        return self.create("dnnl_memory_desc_create_with_tag", len(shape), dims, dtype, _ANY_LAYOUT)


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
def library() -> Library | None:
    """Load the library; None, with a warning where one was found, if that cannot be done."""
    path = _find_library()
    if path is None:
        return None
    try:
        return Library(path)
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
