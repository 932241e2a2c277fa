"""What is wrong with a data set, found before it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxmed.types import UserError

THREADS = 4


def find_broken(source: Any, rows: Sequence[int]) -> dict[int, str]:
    """Read each case once: what is wrong, by row, with those that cannot be used.

    Args:
        source: whose `source[row]` raises a UserError for a file that is cut short, a mask of
            another shape than its image, labels outside the class list and the like.
        rows: to read.
    """

    def problem(row: int) -> str | None:
        try:
            source[row]
        except UserError as error:
            return str(error)
        return None

    pool = ThreadPoolExecutor(THREADS)
    try:
        found = list(pool.map(problem, rows))
    finally:
        pool.shutdown(cancel_futures=True)
    return {row: said for row, said in zip(rows, found, strict=True) if said is not None}
