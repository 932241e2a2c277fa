"""A part of a TIFF picture: only the tiles or strips that it touches are read and decoded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.formats import common
from jaxmed.types import Region

_LOW = 1024
"""Rows of tiles or strips up to which a region of few rows is worth decoding by itself."""


def read_series(path: Path, tif: Any, part: Region, *, max_voxels: int) -> np.ndarray:
    """A part of the first series of an open file, the same as a cut of its `asarray()`.

    Args:
        path: of the file.
        tif: tifffile.TiffFile.
        part: a slice with start and stop for each axis of the series.
        max_voxels: of a series that can only be read whole, such as one spread over files.

    Raises:
        UserError: the series must be read whole and is too big for it.
    """
    series = tif.series[0]
    if series.dataoffset is not None and not series.is_multifile:
        # Uncompressed and in one piece.
        dtype = np.dtype(tif.byteorder + series.dtype.char)
        mapped = np.memmap(
            path, dtype, mode="r", offset=series.dataoffset, shape=tuple(series.shape)
        )
        return np.array(mapped[part]).astype(dtype.newbyteorder("="), copy=False)
    if not _is_plain(series):
        common.check_size(path, series.shape, max_voxels)
        return series.asarray()[part]
    page = series.keyframe
    ahead = len(series.shape) - len(page.shape)  # axes over pages
    rows = part[ahead + page.axes.index("Y")]
    columns = part[ahead + page.axes.index("X")]
    sizes = common.region_shape(part)
    result = np.empty(sizes, series.dtype)
    for place in np.ndindex(sizes[:ahead]):
        number = [axis.start + i for axis, i in zip(part, place, strict=False)]
        flat = int(np.ravel_multi_index(number, series.shape[:ahead])) if ahead else 0
        decoded = _read_page(series.pages[flat], page, rows, columns)
        result[place] = decoded.reshape(sizes[ahead:])
    return result


def has_low_segments(series: Any) -> bool:
    """Whether a few rows can be had without decoding much more than these."""
    if series.dataoffset is not None:
        return not series.is_multifile
    page = series.keyframe
    return _is_plain(series) and (page.tilelength if page.is_tiled else page.rowsperstrip) <= _LOW


def _is_plain(series: Any) -> bool:
    """Whether every page is one plane of the series, stored as tiles or strips."""
    page = series.keyframe
    ahead = len(series.shape) - len(page.shape)
    return (
        ahead >= 0
        and series.transform is None
        and not series.is_multifile
        and tuple(series.shape[ahead:]) == tuple(page.shape)
        and math.prod(series.shape[:ahead]) == len(series.pages)
        and {"Y", "X"} <= set(page.axes)
        and page.imagedepth == 1
        and page.jpegheader is None  # NDPI: one JPEG with restart marks
    )


def _read_page(page: Any, keyframe: Any, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of one page, (separate samples, rows, columns, samples together).

    Args:
        page: None, or the page; it may lack what it has in common with the `keyframe`.
        keyframe: the first page of its series.
        rows: with start and stop.
        columns: likewise.
    """
    separate, _, length, width, together = keyframe.shaped
    height = rows.stop - rows.start
    result = np.full(
        (separate, height, columns.stop - columns.start, together), keyframe.nodata, keyframe.dtype
    )
    if page is None:
        return result
    size = (
        (keyframe.tilelength, keyframe.tilewidth)
        if keyframe.is_tiled
        else (min(keyframe.rowsperstrip, length), width)
    )
    down, across = math.ceil(length / size[0]), math.ceil(width / size[1])
    numbers = [
        (plane * down + i) * across + j
        for plane in range(separate)
        for i in range(rows.start // size[0], math.ceil(rows.stop / size[0]))
        for j in range(columns.start // size[1], math.ceil(columns.stop / size[1]))
    ]
    options = {}
    if keyframe.compression in (6, 7, 34892, 33007):  # JPEG
        options = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}
    segments = page.parent.filehandle.read_segments(
        [page.dataoffsets[number] for number in numbers],
        [page.databytecounts[number] for number in numbers],
        indices=numbers,
    )
    for data, number in segments:
        values, (plane, _, top, left, _), _ = keyframe.decode(data, number, **options)
        if values is not None:
            # Tiles reach beyond the image; what they hold there is left out by the slices.
            _paste(result[plane], values[0], top - rows.start, left - columns.start)
    return result


def _paste(canvas: np.ndarray, values: np.ndarray, top: int, left: int) -> None:
    """Copy (rows, columns, samples) to where they belong, as far as they lie on the canvas."""
    low = (max(0, top), max(0, left))
    high = (
        min(canvas.shape[0], top + values.shape[0]),
        min(canvas.shape[1], left + values.shape[1]),
    )
    canvas[low[0] : high[0], low[1] : high[1]] = values[
        low[0] - top : high[0] - top, low[1] - left : high[1] - left
    ]
