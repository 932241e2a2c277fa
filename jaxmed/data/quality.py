"""What is wrong with a data set, found before it is trained on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmed.types import UserError, count_of

THREADS = 4


def look_through(
    source: Any,
    rows: Sequence[int],
    *,
    check: Callable[[np.ndarray, str], None] | None = None,
) -> tuple[dict[int, str], dict[int, str]]:
    """Read each case once.

    Args:
        source: whose `source[row]` raises a UserError for a file that is cut short, a mask of
            another shape than its image, labels outside the class list and the like.
        rows: to read.
        check: of an image and its id; raises a UserError where it cannot be used.

    Returns:
        By row: what is wrong with those that cannot be used, and digests of the pixels of those
        that can.
    """

    def read(row: int) -> tuple[str, str]:
        try:
            image = source[row]["image"]
            if check is not None:
                check(image, source.ids[row])
        except UserError as error:
            return str(error), ""
        return "", hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()

    pool = ThreadPoolExecutor(THREADS)
    try:
        found = dict(zip(rows, pool.map(read, rows), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    broken = {row: problem for row, (problem, _) in found.items() if problem}
    return broken, {row: digest for row, (_, digest) in found.items() if digest}


def duplicate_notes(
    digests: Mapping[int, str],
    split: Mapping[str, Sequence[int]],
    labels: Sequence[Any] | np.ndarray | None = None,
) -> list[str]:
    """How many images are the same to the last pixel, within a part, in several, and by labels.

    Args:
        digests: by row, of the pixels.
        split: rows of each part.
        labels: of each row, where they are known without reading.
    """
    places: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for part, rows in split.items():
        for row in rows:
            if row in digests:
                places[digests[row]][part] += 1
    notes = []
    for part in split:
        extra = sum(counts[part] - 1 for counts in places.values() if counts.get(part, 0) > 1)
        if extra:
            repeat = "repeats another" if extra == 1 else "repeat others"
            notes.append(f"{count_of(extra, 'image')} of {part} {repeat} of it")
    parts = list(split)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            both = sum(one in counts and other in counts for counts in places.values())
            if both:
                notes.append(
                    f"{count_of(both, 'image')} of {one} also in {other}, whose scores come out "
                    "too good for that: leave them out of one of the two"
                )
    if labels is not None:
        told: dict[str, set[str]] = defaultdict(set)
        for row in {row for rows in split.values() for row in rows} & digests.keys():
            told[digests[row]].add(str(np.asarray(labels[row]).tolist()))
        unlike = sum(len(found) > 1 for found in told.values())
        if unlike:
            notes.append(
                f"{count_of(unlike, 'image')} there several times with different labels: plan.py "
                "names them"
            )
    return notes
