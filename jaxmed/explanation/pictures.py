"""Pictures of what a network looked at, and of how cases lie in the space of its features."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxmed.evaluation.pictures import CLASS_COLOURS, clip, save_figure
from jaxmed.evaluation.views import View, choose_view, window

FOR, AGAINST = "#D55E00", "#0072B2"
"""Colours of what speaks for the target and against it (Okabe and Ito, 2008)."""

_OPAQUE = 0.85


def draw_attributions(
    path: str | Path,
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    title: str,
    notes: Mapping[str, str],
    region: np.ndarray | None = None,
    spacing: np.ndarray | None = None,
) -> Path:
    """Draw an image, and beside it the map of each method over it; returns the path.

    What speaks for the target is orange, what speaks against it blue, the stronger the more opaque,
    up to the largest thousandth of a map. Of a volume it is the slice with most of the region, or
    else of all maps.

    Args:
        path: of the PNG to write.
        image: (*spatial, channels) in the file's own grid.
        maps: of each method, (*spatial) on the same grid.
        title: of the whole; says what the target is.
        notes: a line below the name of a method, such as what it fails.
        region: (*spatial) bool, outlined: what is explained.
        spacing: (ndim,) mm a voxel.
    """
    view = _view(image.shape[:-1], maps, region)
    shown = window(view.cut(image))
    columns = len(maps) + 1
    aspect = view.aspect(spacing) * shown.shape[0] / shown.shape[1]
    figure = Figure(figsize=(3.1 * columns, 3.1 * min(max(aspect, 0.4), 2.5) + 1.1))
    figure.set_layout_engine("constrained")
    axes = np.ravel(figure.subplots(1, columns, squeeze=False))
    for axis in axes:
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, aspect=view.aspect(spacing))
        if region is not None:
            _outline(axis, view.cut(region))
        axis.set_axis_off()
    where = "" if view.slice is None else f"slice {view.slice}"
    axes[0].set_title(f"image {where}".strip(), fontsize=7)
    for axis, (method, found) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(_colours(found, view), aspect=view.aspect(spacing), interpolation="nearest")
        told = textwrap.wrap(notes.get(method, ""), 44, max_lines=4, placeholder=" …")
        axis.set_title("\n".join([method, *told]), fontsize=7, parse_math=False)
    figure.suptitle(clip(title, 60 * columns), fontsize=9, parse_math=False)
    return save_figure(figure, path)


def blend_attribution(
    image: np.ndarray, found: np.ndarray, region: np.ndarray | None = None
) -> tuple[np.ndarray, View]:
    """An image with a map over it, as pixels; of a volume the slice that `draw_attributions` shows.

    Args:
        image: (*spatial, channels).
        found: (*spatial) the map.
        region: (*spatial) bool: what is explained.

    Returns:
        (rows, columns, 3) uint8, and which slice it is.
    """
    view = _view(image.shape[:-1], {"": found}, region)
    shown = window(view.cut(image))
    shown = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=-1)
    colours = _colours(found, view)
    opaque = colours[..., 3:]
    blended = (1 - opaque) * shown + opaque * colours[..., :3]
    return (255 * blended).round().astype(np.uint8), view


def _view(
    shape: tuple[int, ...], maps: Mapping[str, np.ndarray], region: np.ndarray | None
) -> View:
    if len(shape) == 2 or (region is not None and region.any()):
        return choose_view(shape, (region,), ())
    positive = [np.maximum(found, 0) / max(float(found.max()), 1e-12) for found in maps.values()]
    return View(shape, int(sum(x.sum((0, 1)) for x in positive).argmax()))


def _colours(found: np.ndarray, view: View) -> np.ndarray:
    """A map as (rows, columns, 4): a colour for its sign, opaque by its size in the whole map."""
    most = max(float(np.quantile(np.abs(found), 0.999)), float(np.abs(found).max()) / 10, 1e-12)
    seen = view.cut(found)
    colours = np.where((seen >= 0)[..., None], to_rgb(FOR), to_rgb(AGAINST))
    return np.concatenate(
        [colours, _OPAQUE * np.clip(np.abs(seen) / most, 0, 1)[..., None]], axis=-1
    )


def _outline(axis: Axes, region: np.ndarray) -> None:
    if not region.any():
        return
    padded = np.pad(region, 1).astype(float)
    rows, columns = (np.arange(n) - 1 for n in padded.shape)
    axis.contour(columns, rows, padded, levels=[0.5], colors=["#F0E442"], linewidths=1.0)
    axis.set(xlim=(-0.5, region.shape[1] - 0.5), ylim=(region.shape[0] - 0.5, -0.5))


def draw_places(
    path: str | Path,
    places: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[int]],
    *,
    class_names: Sequence[str],
    variance: np.ndarray,
) -> Path:
    """Draw cases on two principal components of their features; returns the path.

    Args:
        path: of the PNG to write.
        places: (cases, 2) of each part; the first is drawn as dots, the others as crosses.
        labels: class of each case of each part; empty where there are none.
        class_names: a colour each.
        variance: share of each component.
    """
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axis = figure.subplots()
    for (part, found), marker in zip(places.items(), ("o", "x", "+"), strict=False):
        given = np.asarray(labels.get(part, ()))
        for number, name in enumerate(class_names if len(given) else [""]):
            own = found[given == number] if len(given) else found
            if len(own):
                axis.scatter(
                    own[:, 0],
                    own[:, 1] if own.shape[1] > 1 else np.zeros(len(own)),
                    s=14,
                    marker=marker,
                    alpha=0.7,
                    color=CLASS_COLOURS[number % len(CLASS_COLOURS)],
                    label=clip(f"{part} {name}".strip(), 30).replace("$", r"\$"),
                )
    told = [f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(variance)]
    axis.set(xlabel=told[0], ylabel=told[1] if len(told) > 1 else "")
    axis.legend(fontsize=8)
    return save_figure(figure, path)


def draw_importance(
    path: str | Path,
    alone: Mapping[str, Mapping[str, Any]],
    fall: Mapping[str, Mapping[str, Any]],
    *,
    column: str,
    most: int = 20,
) -> Path:
    """Draw what `measurement_importance` found; returns the path.

    Args:
        path: of the PNG to write.
        alone: accuracy of each measurement alone, in the order to draw them in.
        fall: in accuracy where it is shuffled.
        column: what is told.
        most: measurements that are drawn.
    """
    names = list(alone)[:most]
    figure = Figure(figsize=(10, 1.2 + 0.28 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, entries in ((left, alone), (right, fall)):
        for place, entry in enumerate(entries[name] for name in names):
            axis.barh(place, entry["value"], color="#56B4E9")
            if entry["low"] is not None:
                axis.plot([entry["low"], entry["high"]], [place, place], color="black", lw=1)
        axis.axvline(0, color="gray", linewidth=1)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    shown = [clip(name, 40).replace("$", r"\$") for name in names]
    left.set_yticks(range(len(names)), shown, fontsize=8)
    left.set_ylim(len(names) - 0.5, -0.5)
    told = clip(column, 30).replace("$", r"\$")
    left.set(title=f"accuracy of telling {told} by it alone", xlabel="value, 95 % interval")
    right.set(title="fall of all together where it is shuffled", xlabel="value, 95 % interval")
    return save_figure(figure, path)


def draw_neighbours(
    path: str | Path, rows: Sequence[Sequence[tuple[np.ndarray, str]]], *, width: int
) -> Path:
    """Draw each case with the cases most like it beside it; returns the path.

    Args:
        path: of the PNG to write.
        rows: for each case pairs of image (*spatial, channels) and title, itself first.
        width: pictures a row.
    """
    figure = Figure(figsize=(2.3 * width, 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (image, title) in zip(line, row, strict=False):
            view = choose_view(image.shape[:-1], (), ())
            axis.imshow(window(view.cut(image)), cmap="gray", vmin=0, vmax=1)
            axis.set_title(clip(title, 34), fontsize=7, parse_math=False)
    return save_figure(figure, path)
