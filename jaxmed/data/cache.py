"""Keep prepared examples in memory: reading and decoding is most of the host's work."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.types import DatasetInfo, Example, Region, Transform


class Cached:
    """A source whose examples went through `transform`, kept until the memory is used up.

    Returned arrays are read-only, since later epochs share them. Threads may share a cache; each
    worker process of a loader fills its own, so divide the memory by their number.

    Attributes:
        used: bytes kept so far.
    """

    def __init__(self, source: Any, *, max_bytes: int, transform: Transform | None = None):
        self._source = source
        self._transform = transform
        self._max_bytes = max_bytes
        self._start()

    def _start(self) -> None:
        self._kept: dict[int, Example] = {}
        self._lock = threading.Lock()
        self.used = 0

    @property
    def info(self) -> DatasetInfo:
        """Of the source beneath."""
        return self._source.info

    @property
    def ids(self) -> Sequence[str]:
        """Of the source beneath."""
        return self._source.ids

    @property
    def patients(self) -> Sequence[str] | None:
        """Of the source beneath."""
        return self._source.patients

    @property
    def labels(self) -> Sequence[Any] | np.ndarray | None:
        """Of the source beneath."""
        return self._source.labels

    @property
    def parts(self) -> Mapping[str, Sequence[int]]:
        """Of the source beneath."""
        return self._source.parts

    @property
    def notes(self) -> Sequence[str]:
        """Of the source beneath."""
        return self._source.notes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        example = self._kept.get(index)
        if example is None:
            example = self._source[index]
            if self._transform is not None:
                example = self._transform(example)
            example = self._keep(index, example)
        return dict(example)

    def read(self, index: int, region: Region | None = None) -> Example:
        """A part of an example as the source beneath reads it: neither transformed nor kept."""
        return self._source.read(index, region)

    def _keep(self, index: int, example: Example) -> Example:
        size = sum(value.nbytes for value in example.values())
        if self.used + size > self._max_bytes:
            return example  # as it is: of what lies on disk, a patch may be all that is read
        example = {key: _owned(value) for key, value in example.items()}
        with self._lock:
            if index not in self._kept and self.used + size <= self._max_bytes:
                for value in example.values():
                    value.flags.writeable = False
                self._kept[index] = example
                self.used += size
        return example

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process starts from: no lock, and nothing kept."""
        return {k: v for k, v in vars(self).items() if k not in ("_kept", "_lock", "used")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()


def _owned(value: Any) -> np.ndarray:
    """The array itself, or a copy of a view, which would keep all of its base in memory."""
    array = np.asarray(value)
    return array if array.base is None else array.copy()
