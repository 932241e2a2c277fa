"""What the headers of a data set's files tell: geometry, names of patients, burnt-in text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxmed.data.examination import Finding
from jaxmed.data.formats.grid import distance
from jaxmed.data.images import image_grid, privacy
from jaxmed.data.quality import THREADS
from jaxmed.data.sources.base import FAR_APART, Case
from jaxmed.types import UserError, count_of

SLIGHTLY_APART = 1e-3
"""Of a voxel, from which the geometries of two files differ by more than rounding."""


def examine_files(source: Any, rows: Iterable[int]) -> list[Finding]:
    """Read the headers of each case's files once, in parallel, and list what stands out.

    Files that cannot be read are passed over: reading their case tells so.

    Args:
        source: with `cases`, each of files; of another source nothing is told.
        rows: the cases to look at.

    Returns:
        Findings; of tags and texts never the values, only how many files have them.
    """
    cases: Sequence[Case] | None = getattr(source, "cases", None)
    if cases is None:
        return []
    chosen = [cases[row] for row in rows]
    with ThreadPoolExecutor(THREADS) as pool:
        apart = [told for told in pool.map(_apart, chosen) if told]
        files = [path for case in chosen for path in case.images]
        seen = list(pool.map(_privacy, files))
    return [*_geometry(apart), *_private(files, seen)]


def _apart(case: Case) -> str:
    """How a case's files lie slightly apart; "" where they do not, or so far that it is refused."""
    others = [*case.images[1:], *([case.mask] if case.mask is not None else [])]
    for other in others:
        try:
            grid, beside = image_grid(case.images[0]), image_grid(other)
        except UserError:
            return ""
        if grid.shape[:-1] != beside.shape[:-1]:
            return ""
        voxels, words = distance(grid, beside)
        if SLIGHTLY_APART < voxels <= FAR_APART:
            return f"{case.id}: {other.name} by {voxels:.2g} voxels ({words})"
    return ""


def _geometry(apart: Sequence[str]) -> Iterator[Finding]:
    if apart:
        advice = "find out which header is right: the files were taken to be on one grid"
        yield Finding("warning", "files slightly apart in space", advice, tuple(apart))


def _privacy(path: Path) -> tuple[Counter[str], bool]:
    try:
        return privacy(path)
    except UserError:
        return Counter(), False


def _private(files: Sequence[Path], seen: Sequence[tuple[Counter[str], bool]]) -> Iterator[Finding]:
    tags: Counter[str] = Counter()
    for found, _ in seen:
        tags += found
    if tags:
        advice = "de-identify the files, or make sure that these are pseudonyms, before sharing"
        told = (f"{tag} in {count_of(number, 'file')}" for tag, number in tags.most_common())
        yield Finding("note", "identifying DICOM tags", advice, tuple(told))
    burnt = tuple(path.name for path, (_, text) in zip(files, seen, strict=True) if text)
    if burnt:
        advice = "remove it from the pixels: it may be a name, and a network may learn from it"
        yield Finding("warning", "text burnt into the pixels", advice, burnt)
