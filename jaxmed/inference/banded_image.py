"""An image too big to hold, of which a few rows are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxmed.types import Region


class BandedImage:
    """A picture whose rows are read when a region is asked for, and held while they may be needed.

    Regions should come with their first rows in order: rows before the last region's are forgotten.

    Args:
        read: rows -> (rows, columns, channels), ready for the network.
        shape: (rows, columns, channels) of the whole.
    """

    def __init__(self, read: Callable[[slice], np.ndarray], shape: Sequence[int]):
        self.shape = tuple(shape)
        self._read = read
        self._first = 0
        self._held: np.ndarray | None = None

    def __getitem__(self, region: Region) -> np.ndarray:
        rows, columns = region
        stop = min(rows.stop, self.shape[0])
        if self._held is None or not self._first <= rows.start <= self._first + len(self._held):
            self._held, self._first = self._read(slice(rows.start, stop)), rows.start
        last = self._first + len(self._held)
        if stop > last:
            kept = self._held[rows.start - self._first :]
            self._held = np.concatenate([kept, self._read(slice(last, stop))])
            self._first = rows.start
        return self._held[rows.start - self._first : stop - self._first, columns]
