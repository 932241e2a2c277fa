"""Instances from the probabilities of their insides and borders, whole images or band by band."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import scipy.ndimage
import skimage.segmentation

TALLEST = 1024
"""Rows that are held while an object goes on below them; a taller object is cut there."""

_AT_ONCE = 256
"""New rows that are waited for, since objects that go on are looked at again."""


def separate_instances(probabilities: np.ndarray, *, smallest: int = 10) -> np.ndarray:
    """Instance numbers from probabilities (*spatial, 3) of background, inside and border.

    Seeds are the connected insides; each grows over the foreground around it, from the surest
    voxels outward, until it meets another. Foreground without a seed is an instance of its own.
    """
    return _separate(probabilities, _foreground(probabilities), smallest=smallest)


def separate_bands(
    bands: Iterable[np.ndarray], *, smallest: int = 10, tallest: int = TALLEST
) -> Iterator[np.ndarray]:
    """The same objects from bands of an image, without holding it; their numbers are others.

    What one connected piece of foreground is cut into depends on nothing around it. So pieces that
    end within the rows at hand are separated for good, and rows are held while a piece goes on
    below them.

    Args:
        bands: probabilities (rows, *spatial, 3), from the first rows to the last.
        smallest: voxels; smaller instances are dropped.
        tallest: rows held at most, beside new ones, for a piece that goes on; there it is cut.

    Yields:
        Instance numbers (rows, *spatial) int32, in all as many rows as came in.
    """
    held: list[np.ndarray] = []
    numbers = np.zeros(0, np.int32)
    count = new = 0
    for band in bands:
        held.append(band)
        new += len(band)
        if new >= _AT_ONCE:
            probabilities, new = np.concatenate(held), 0
            numbers, goes_on, count = _finish(
                probabilities, numbers, count, smallest=smallest, tallest=tallest
            )
            yield np.maximum(numbers[:goes_on], 0)
            # Copies, so that what was given out does not stay in memory.
            held, numbers = [probabilities[goes_on:].copy()], numbers[goes_on:].copy()
    if held and sum(map(len, held)):
        numbers, _, _ = _finish(np.concatenate(held), numbers, count, smallest=smallest, tallest=0)
        yield np.maximum(numbers, 0)


def _finish(
    probabilities: np.ndarray, numbers: np.ndarray, count: int, *, smallest: int, tallest: int
) -> tuple[np.ndarray, int, int]:
    """Number the pieces that end within these rows.

    Args:
        probabilities: (rows, *spatial, 3).
        numbers: of the first of these rows, as far as they were numbered before; -1 is foreground
            that was dropped.
        count: of the numbers given.
        smallest: voxels of an instance.
        tallest: rows of a piece that may go on below; 0 where nothing does.

    Returns:
        Numbers of all rows, the first row of a piece that goes on, and the new count.
    """
    known = np.zeros(probabilities.shape[:-1], np.int32)
    known[: len(numbers)] = numbers if len(numbers) else 0
    foreground = _foreground(probabilities) & (known == 0)
    goes_on = len(known)
    if tallest:
        pieces, most = scipy.ndimage.label(foreground)
        spans = scipy.ndimage.find_objects(pieces)
        begin = {n: spans[n - 1][0].start for n in np.unique(pieces[-1]).tolist() if n}
        # A piece that is too tall is cut here; its neighbours wait for their ends.
        waiting = [n for n, row in begin.items() if len(known) - row <= tallest]
        if waiting:
            goes_on = min(begin[n] for n in waiting)
            waits = np.zeros(most + 1, bool)
            waits[waiting] = True
            foreground &= ~waits[pieces]
    found = _separate(probabilities, foreground, smallest=smallest)
    known[foreground] = np.where(found > 0, found + count, -1)[foreground]
    return known, goes_on, count + int(found.max(initial=0))


def _foreground(probabilities: np.ndarray) -> np.ndarray:
    return probabilities[..., 1] + probabilities[..., 2] > 0.5


def _separate(probabilities: np.ndarray, foreground: np.ndarray, *, smallest: int) -> np.ndarray:
    inside = (probabilities[..., 1] > 0.5) & foreground
    seeds, count = scipy.ndimage.label(inside)
    # A seed of a few voxels is noise between real ones, unless it is the whole object.
    sizes = np.bincount(seeds.ravel(), minlength=count + 1)
    seeds[sizes[seeds] < max(3, smallest // 3)] = 0
    grown = skimage.segmentation.watershed(-probabilities[..., 1], seeds, mask=foreground)
    alone, extra = scipy.ndimage.label(foreground & (grown == 0))
    grown = np.where(alone > 0, alone + count, grown)
    sizes = np.bincount(grown.ravel())
    keep = sizes >= smallest
    keep[0] = False
    numbers = np.cumsum(keep) * keep
    return numbers[grown].astype(np.int32)
