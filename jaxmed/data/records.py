"""A case as records of bytes: all that is small in the first, large arrays in blocks."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxmed.types import Example, Region, UserError

BLOCK_BYTES = 2**18
"""Of a block, at most: a patch reads little beside itself, and each record costs some 20 us."""

_LENGTH = struct.Struct("<I")  # of the header
_DTYPES = ("uint8", "int16", "int32", "int64", "float32", "float64", "bool")


def encode(example: Example, *, name: str) -> list[bytes]:
    """A case as the bytes of its records.

    Args:
        example: arrays of the types that a source gives.
        name: of the case.

    Raises:
        UserError: for an array of another type.
    """
    arrays = {key: np.asarray(value) for key, value in example.items()}
    odd = [
        f"{key} is {array.dtype}"
        for key, array in arrays.items()
        if str(array.dtype) not in _DTYPES
    ]
    if odd:
        raise UserError(f"case {name}: {', '.join(odd)}; expected one of {', '.join(_DTYPES)}")
    table, small, large = [], [], []
    for key, array in arrays.items():
        stored = _narrow(array)
        block = block_shape(stored.shape, stored.itemsize)
        table.append([key, str(array.dtype), str(stored.dtype), array.shape, block])
        if block == stored.shape:
            small.append(stored.tobytes())
        else:
            large += [stored[region].tobytes() for region in _blocks(stored.shape, block)]
    header = json.dumps({"id": name, "arrays": table}).encode()
    return [b"".join([_LENGTH.pack(len(header)), header, *small]), *large]


def block_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The longest side halved until a block has no more than `BLOCK_BYTES`.

    >>> block_shape((192, 192, 128, 1), 4)
    (24, 48, 32, 1)
    """
    block = list(shape)
    while math.prod(block) * itemsize > BLOCK_BYTES:
        longest = block.index(max(block))
        block[longest] = -(-block[longest] // 2)
    return tuple(block)


def _blocks(shape: Sequence[int], block: Sequence[int]) -> Iterator[Region]:
    """The region of each block, in order."""
    counts = [-(-side // part) for side, part in zip(shape, block, strict=True)]
    for place in np.ndindex(*counts):
        yield tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, block, strict=True))


def _narrow(array: np.ndarray) -> np.ndarray:
    """Numbers such as a mask's in as few bytes as hold them, since reading is what takes time."""
    if array.dtype.kind != "i" or not array.size:
        return array
    low, high = array.min(), array.max()
    for name in ("uint8", "int16"):
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return array.astype(name)
    return array


def decode(record: bytes, read: Callable[[Sequence[int]], Sequence[bytes]]) -> Example:
    """The case that `encode` wrote; its small arrays may be read-only views of the record.

    Args:
        record: the first one of the case.
        read: numbers of other records of the case, from 1 -> these.

    Raises:
        ValueError: where the bytes are no such record.
    """
    [length] = _LENGTH.unpack_from(record)
    start = _LENGTH.size + length
    header = json.loads(record[_LENGTH.size : start])
    example: Example = {}
    first = 1
    for key, dtype, stored, shape, block in header["arrays"]:
        if dtype not in _DTYPES or stored not in _DTYPES:
            raise ValueError(f"{key} is of type {dtype}, stored as {stored}")
        if block == shape:
            array = np.frombuffer(record, stored, math.prod(shape), start).reshape(shape)
            example[key] = array.astype(dtype, copy=False)
            start += array.nbytes
        else:
            blocks = BlockedArray(shape, dtype, stored, block, first, read)
            example[key] = blocks
            first += blocks.count
    return example


class BlockedArray:
    """An array on disk, of which the blocks that are asked for are read.

    `np.asarray` reads all of it.

    Args:
        shape: of the array.
        dtype: of its numbers.
        stored: the type that they are stored in.
        block: shape of a block.
        first: number of the record of its first block.
        read: numbers of records -> records.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: str,
        stored: str,
        block: Sequence[int],
        first: int,
        read: Callable[[Sequence[int]], Sequence[bytes]],
    ):
        self.shape = tuple(shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._stored, self._block = stored, tuple(block)
        self._first, self._read = first, read
        self._counts = [-(-side // part) for side, part in zip(shape, block, strict=True)]
        self.count = math.prod(self._counts)

    def __getitem__(self, region: tuple[slice, ...] | slice) -> np.ndarray:
        """A region of the array: a slice without steps for each of its first axes."""
        given = (region,) if isinstance(region, slice) else region
        given = (*given, *(slice(None) for _ in range(self.ndim - len(given))))
        bounds = [part.indices(side) for part, side in zip(given, self.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"region {region} has steps")
        found = np.empty([max(0, stop - start) for start, stop, _ in bounds], self.dtype)
        if not found.size:
            return found
        ranges = [
            range(start // side, -(-stop // side))
            for (start, stop, _), side in zip(bounds, self._block, strict=True)
        ]
        places = list(itertools.product(*ranges))
        numbers = [self._first + int(np.ravel_multi_index(p, self._counts)) for p in places]
        for place, record in zip(places, self._read(numbers), strict=True):
            low = [i * side for i, side in zip(place, self._block, strict=True)]
            high = [
                min(at + side, end)
                for at, side, end in zip(low, self._block, self.shape, strict=True)
            ]
            block = np.frombuffer(record, self._stored).reshape(np.subtract(high, low))
            target, part = [], []
            for at, end, (start, stop, _) in zip(low, high, bounds, strict=True):
                first, last = max(at, start), min(end, stop)
                target.append(slice(first - start, last - start))
                part.append(slice(first - at, last - at))
            found[tuple(target)] = block[tuple(part)]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        del copy  # it is always one
        return self[()].astype(dtype or self.dtype, copy=False)
