"""TIFF pictures and volumes, plain, OME and ImageJ, through tifffile."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from jaxmed.data.formats import common
from jaxmed.data.formats.common import Image
from jaxmed.data.formats.grid import Grid
from jaxmed.data.formats.tiff_region import has_low_segments, read_series
from jaxmed.types import Region, UserError

_MILLIMETRES = {"nm": 1e-6, "µm": 1e-3, "um": 1e-3, "micron": 1e-3, "microns": 1e-3, "mm": 1.0}
_MILLIMETRES |= {"cm": 10.0, "m": 1e3, "inch": 25.4, "μm": 1e-3, "\\u00B5m": 1e-3, "pixel": 1.0}
_MILLIMETRES |= {"Å": 1e-7, "pm": 1e-9, "in": 25.4, "ft": 304.8}
_OPACITY = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_DEPTH = "ZQI"  # letters of axes that tifffile gives to a pile of pages
_CHANNEL = "CS"
_TILE = 256


def _axes(path: Path, series: Any) -> tuple[list[int], bool]:
    """The order in which the axes of a series become (y, x) or (x, y, z), then one channel axis.

    Returns:
        Indices of axes, and whether the last of them is the channels.

    Raises:
        UserError: an axis is neither space nor channels, such as time.
    """
    letters = series.axes
    depth = [i for i, letter in enumerate(letters) if letter in _DEPTH]
    channel = [i for i, letter in enumerate(letters) if letter in _CHANNEL]
    known = len(depth) + len(channel) + letters.count("Y") + letters.count("X")
    if (
        known != len(letters)
        or len(depth) > 1
        or len(channel) > 1
        or "".join(letter for letter in letters if letter in "YX") != "YX"
    ):
        raise UserError(
            f"{path}: axes {letters} of shape {series.shape}; expected rows and columns with at "
            "most one depth and one channel axis, so save one image a file"
        )
    y, x = letters.index("Y"), letters.index("X")
    space = [x, y, depth[0]] if depth else [y, x]
    return space + channel, bool(channel)


def _is_palette(page: Any) -> bool:
    return page.photometric == tifffile.PHOTOMETRIC.PALETTE


def _has_alpha(page: Any, channels: int) -> bool:
    """Whether the last channel is said to be opacity; of unspecified meaning, it is data."""
    colours = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
    said = page.extrasamples and page.extrasamples[-1] in _OPACITY
    return bool(page.samplesperpixel == channels == colours + 1 and said)


def _stored_shape(path: Path, series: Any) -> tuple[int, ...]:
    order, has_channels = _axes(path, series)
    found = tuple(int(series.shape[i]) for i in order)
    return found if has_channels else (*found, 1)


def _series(path: Path, tif: Any) -> Any:
    """The first series, which must lie in the file itself: OME's metadata may name any other."""
    series = tif.series[0]
    if series.is_multifile:
        raise UserError(f"{path}: its pages lie in several files; save it as one file")
    return series


def grid(path: Path) -> Grid:
    """Of (rows, cols, channels) or (x, y, z, channels), from the header alone."""
    with tifffile.TiffFile(path) as tif:
        series = _series(path, tif)
        *space, channels = _stored_shape(path, series)
        if _is_palette(series.keyframe):
            channels = 3
        channels -= bool(_has_alpha(series.keyframe, channels))
        return Grid((*space, channels), _spacing(tif, len(space))[0])


def _check_whole(path: Path, series: Any) -> None:
    """Refuse a file that is cut short, which tifffile may fill with zeros."""
    size = path.stat().st_size
    for page in series.pages:
        if page is None:
            continue
        ends = (o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends, default=0) > size:
            raise UserError(f"{path}: the file is cut short; copy or export it again")


def _colours(series: Any, values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Undo a palette, white-is-zero and opacity; values are (*space, channels)."""
    page = series.keyframe
    if _is_palette(page):
        table = np.asarray(page.colormap)  # (3, entries) of 16 bits
        return (table.T[values[..., 0]] >> 8).astype(np.uint8), ()
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind in "bu":
        top = True if values.dtype == bool else values.dtype.type(2**page.bitspersample - 1)
        return values ^ top, ("white was stored as zero and has been inverted",)
    if _has_alpha(page, values.shape[-1]):
        return common.drop_alpha(values)
    return values, ()


def _unit(name: str | None) -> float:
    """Millimetres; not a number where the unit is not one of length."""
    return _MILLIMETRES.get(html.unescape(name or "µm"), math.nan)


def _spacing(tif: Any, ndim: int) -> tuple[np.ndarray, bool]:
    """Millimetres a voxel in the order of the array, from OME or ImageJ, and whether all are given.

    It is 1 where it is not.

    The plain resolution tags are those of a printer, so they are not used.
    """
    sizes: dict[str, float] = {}
    if tif.is_ome:
        pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", tif.ome_metadata or "")
        fields = dict(re.findall(r'(\w+)="([^"]*)"', pixels[0])) if pixels else {}
        for axis in "XYZ":
            if f"PhysicalSize{axis}" in fields:
                unit = _unit(fields.get(f"PhysicalSize{axis}Unit"))
                sizes[axis] = float(fields[f"PhysicalSize{axis}"]) * unit
    elif tif.is_imagej and (tif.imagej_metadata or {}).get("unit", "pixel") in _MILLIMETRES:
        metadata, tags = tif.imagej_metadata or {}, tif.pages[0].tags
        if metadata.get("unit", "pixel") not in ("pixel", "inch"):
            unit = _unit(metadata["unit"])
            if "spacing" in metadata:
                sizes["Z"] = float(metadata["spacing"]) * unit
            for axis in "XY":
                if f"{axis}Resolution" in tags and tags[f"{axis}Resolution"].value[0]:
                    count, length = tags[f"{axis}Resolution"].value
                    sizes[axis] = length / count * unit
    given = [sizes.get(axis, 0.0) for axis in ("XYZ" if ndim == 3 else "YX")]
    is_side = [0 < side < math.inf for side in given]
    sides = [side if known else 1.0 for side, known in zip(given, is_side, strict=True)]
    return np.array(sides, np.float32), all(is_side)


def read(path: Path, *, max_voxels: int, indices: bool, region: Region | None = None) -> Image:
    """Read the first series; a pile of pages is a volume, turned from (z, y, x) to (x, y, z).

    Of a region only the tiles or strips are decoded that it touches; of a pyramid it is of the
    finest level.
    """
    with tifffile.TiffFile(path) as tif:
        series = _series(path, tif)
        full = _stored_shape(path, series)
        window = common.window_of(full[:-1], region)
        full = (*common.region_shape(window), full[-1])
        common.check_size(path, full, max_voxels)
        _check_whole(path, series)
        order, _ = _axes(path, series)
        if region is None:
            values = series.asarray()
        else:
            cut = dict(zip(order, window, strict=False))  # the rest is the channels
            whole = common.window_of(series.shape, None)
            part = tuple(cut.get(axis, whole[axis]) for axis in range(series.ndim))
            values = read_series(path, tif, part, max_voxels=max_voxels)
        values = values.transpose(order).reshape(full)
        notes: tuple[str, ...] = ()
        if len(tif.series) > 1:
            notes = (f"holds {len(tif.series)} pictures; the first is used",)
        if series.keyframe.tags.valueof("Orientation", default=1) != 1:
            notes += ("asks to be turned (orientation tag); taken as stored, as annotations are",)
        if not (indices and _is_palette(series.keyframe)):
            values, more = _colours(series, values)
            notes += more
        spacing, sized = _spacing(tif, len(full) - 1)
        if len(full) == 4 and not sized:
            notes += (common.UNSIZED,)
    array, rounded = common.as_supported(values, path)
    return Image(np.ascontiguousarray(array), spacing, None, "tiff", None, path, notes + rounded)


def reads_regions(path: Path) -> bool:
    """Whether few rows are read at the cost of few rows: in low tiles or strips, or mapped."""
    with tifffile.TiffFile(path) as tif:
        return has_low_segments(tif.series[0])


def mask_suffix(like: Image) -> str:
    """TIFF, whatever metadata it had."""
    del like
    return ".tif"


def write_mask(path: Path, mask: np.ndarray, like: Image, names: Sequence[str]) -> None:
    """Write a mask as compressed TIFF; a volume as pages (z, y, x)."""
    del names
    values = common.smallest_unsigned(mask)
    is_volume = values.ndim == 3
    values, axes = (values.T, "ZYX") if is_volume else (values, "YX")
    tifffile.imwrite(path, values, ome=True, **_options(axes, like.spacing))


def write_image(path: Path, array: np.ndarray, like: Image) -> None:
    """Write float32 as pages, one a channel; of a volume one a depth and channel."""
    is_volume = array.ndim == 4
    values = array.transpose(2, 3, 1, 0) if is_volume else array.transpose(2, 0, 1)
    axes = "ZCYX" if is_volume else "CYX"
    tifffile.imwrite(path, values, ome=True, **_options(axes, like.spacing))


def _options(axes: str, spacing: np.ndarray) -> dict[str, Any]:
    """How arrays are stored, with the spacing in OME's metadata."""
    metadata: dict[str, Any] = {"axes": axes}
    if (spacing != 1).any():
        for axis, length in zip("XYZ" if "Z" in axes else "YX", spacing, strict=True):
            micrometres = float(length) * 1000
            metadata |= {f"PhysicalSize{axis}": micrometres, f"PhysicalSize{axis}Unit": "µm"}
    return {"photometric": "minisblack", "compression": "zlib", "metadata": metadata}


def write_mask_rows(
    path: Path,
    rows: Iterable[np.ndarray],
    like: Image,
    *,
    shape: tuple[int, ...],
    dtype: type[np.unsignedinteger[Any]],
) -> None:
    """Write the mask of a picture in tiles as its rows come, (rows, columns) at a time."""
    # Offsets beyond 4 GiB; what compression will save is not known yet.
    big = shape[0] * shape[1] * np.dtype(dtype).itemsize > 2**31
    with tifffile.TiffWriter(path, ome=True, bigtiff=big) as writer:
        writer.write(
            _tiles(rows, shape, dtype),
            shape=shape,
            dtype=dtype,
            tile=(_TILE, _TILE),
            **_options("YX", like.spacing),
        )


def _tiles(
    rows: Iterable[np.ndarray], shape: tuple[int, ...], dtype: type[np.unsignedinteger[Any]]
) -> Iterator[np.ndarray]:
    """Square tiles of a mask row by row of tiles; those at the border are filled up with 0."""
    across = -(-shape[1] // _TILE)
    canvas = np.zeros((_TILE, across * _TILE), dtype)
    filled = done = 0
    for band in rows:
        while len(band):
            part, band = band[: _TILE - filled], band[_TILE - filled :]
            canvas[filled : filled + len(part), : shape[1]] = part
            filled, done = filled + len(part), done + len(part)
            if filled == _TILE or done == shape[0]:
                canvas[filled:] = 0
                yield from (t.copy() for t in np.split(canvas, across, axis=1))
                filled = 0
