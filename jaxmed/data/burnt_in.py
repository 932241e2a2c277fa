"""Text that was drawn into the pixels, as scanners and screenshots have it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

CHARACTERS = 5
"""In a row, from which marks are taken for text; a side marker such as L or R has fewer."""
MOST_PIECES = 250
"""Of a character's size and shape: more of them are the image's own grain."""
STROKE = 9
"""Pixels, from which a bright line is too broad for a character's."""
CONTRAST = 0.25
"""Of the range of values: how far a character stands out from what is around it."""
MOST_PIXELS = 2**24
"""Of an image that is looked at; in larger ones, such as whole slides, nothing is looked for."""
HEIGHT = (5, 64)
"""Pixels of a character."""
FILL = (0.15, 0.9)
"""Share of its box that a character fills."""


def longest_row(image: np.ndarray) -> int:
    """Characters in the longest row of what looks like bright text; 0 where nothing does.

    Thin bright strokes that form pieces of a character's size and shape, which stand on one line,
    are equally high and follow each other closely. Dark text on white paper is not looked for.

    Args:
        image: (rows, columns, channels).
    """
    if image.shape[0] * image.shape[1] > MOST_PIXELS:
        return 0
    gray = image.astype(np.float32).mean(-1)
    thin = gray - ndimage.grey_opening(gray, size=(STROKE, STROKE))
    bright = thin > CONTRAST * max(float(np.ptp(gray)), 1e-6)
    pieces, _ = ndimage.label(bright, np.ones((3, 3)))
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(pieces), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if HEIGHT[0] <= height <= HEIGHT[1] and width <= 1.5 * height:
            fill = (pieces[rows, columns] == number).mean()
            if FILL[0] <= fill <= FILL[1] or width <= height / 3:  # I, l and 1 are full
                boxes.append((rows.start, rows.stop, columns.start, columns.stop))
    if len(boxes) > MOST_PIECES:
        return 0
    return max((_row_from(box, boxes) for box in boxes), default=0)


def _row_from(box: tuple[int, int, int, int], boxes: Sequence[tuple[int, int, int, int]]) -> int:
    """Characters of the row that begins with this one."""
    count = 1
    while True:
        top, bottom, _, right = box
        height = bottom - top
        following = [
            other
            for other in boxes
            if right <= other[2] <= right + height
            and abs(other[1] - bottom) <= 0.15 * height + 1
            and abs(other[1] - other[0] - height) <= 0.3 * height + 1
        ]
        if not following:
            return count
        box = min(following, key=lambda other: other[2])
        count += 1
