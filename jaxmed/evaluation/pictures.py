"""Pictures of cases with masks and boxes, the truth and the prediction told apart.

Truth is dashed, prediction solid. With one class truth is blue and prediction orange (colours of
Okabe and Ito, 2008, which people with any kind of colour vision tell apart); of masks of several
classes, and where there is nothing to compare with, each class has a colour. Figures are made
without pyplot, whose global state leaks between threads.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from jaxmed.evaluation.views import View, choose_view, window
from jaxmed.types import UserError

TRUTH_COLOUR = "#56B4E9"
PREDICTION_COLOUR = "#E69F00"
CLASS_COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
WARNING_COLOUR = "#D55E00"
IGNORED_COLOUR = "#8C6BFF"
"""Of hatches, which must show on a dark surround, as that of padding, and on white alike."""

_TINT = 0.25
_TITLE_LETTERS = 40
_LABEL_LETTERS = 16
_MOST_BOXES = 60


def draw_case(
    axis: Axes,
    image: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    true_mask: np.ndarray | None = None,
    true_boxes: np.ndarray | None = None,
    true_labels: np.ndarray | None = None,
    spacing: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    title: str = "",
    at: int | None = None,
) -> None:
    """Draw one case; of a volume one slice of the last axis, by default that with the most to see.

    A volume in RAS order is shown as radiologists look at it: front up, the right side on the left.

    Args:
        axis: to draw into.
        image: (*spatial, channels) of any type and range; three channels are colours, of any other
            number the first is drawn. Windowed between its 1st and 99th percentile.
        mask: (*spatial) predicted classes or instances, or of either origin if it comes alone.
        boxes: (boxes, 2 * ndim) in voxels, likewise.
        labels: (boxes,) class of each; -1 is padding and not drawn.
        scores: (boxes,) score of each; of very many boxes only the best are drawn.
        true_mask: (*spatial) classes or instances; -1 is ignored and hatched.
        true_boxes: (boxes, 2 * ndim).
        true_labels: (boxes,); -1 is padding.
        spacing: (ndim,) mm a voxel, for the proportions of the picture.
        class_names: names of box labels.
        title: clipped; shown as it stands, never read as a formula.
        at: number of the slice of a volume, from 0.

    Raises:
        UserError: where the image has no such slice.
    """
    view = choose_view(image.shape[:-1], (true_mask, mask), (true_boxes, boxes))
    if at is not None:
        if view.slice is None or not 0 <= at < view.shape[2]:
            raise UserError(f"at is {at}; an image of shape {view.shape} has no such slice")
        view = dataclasses.replace(view, slice=at)
    shown = window(view.cut(image))
    axis.imshow(
        shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect=view.aspect(spacing)
    )
    # Boxes have their class written beside them; outlines of masks can only be coloured by it.
    by_class = true_boxes is None and (true_mask is None or len(class_names) > 2)
    colour = None if by_class else PREDICTION_COLOUR
    if true_mask is not None:
        true_colour = None if by_class else TRUTH_COLOUR
        _draw_mask(axis, view.cut(true_mask), colour=true_colour, style="dashed")
    if mask is not None:
        _draw_mask(axis, view.cut(mask), colour=colour, style="solid")
    if true_boxes is not None:
        found = _Boxes(true_boxes, true_labels, None, class_names)
        found.draw(axis, view, colour=TRUTH_COLOUR, style="dashed")
    if boxes is not None:
        _Boxes(boxes, labels, scores, class_names).draw(axis, view, colour=colour, style="solid")
    axis.set(xlim=(-0.5, shown.shape[1] - 0.5), ylim=(shown.shape[0] - 0.5, -0.5))
    axis.set_axis_off()
    if scores is not None and not len(scores) and not title:
        title = "no box above the threshold"
    title = clip(title)
    if view.slice is not None:
        which = f"[slice {view.slice + 1} of {view.shape[2]}, third axis]"
        title = f"{title} {which}".strip()
    axis.set_title(title, fontsize=8, parse_math=False)


def draw_batch(
    batch: Mapping[str, Any],
    class_names: Sequence[str],
    path: str | Path,
    *,
    max_examples: int = 16,
) -> Path:
    """Draw the first examples of a batch as the network gets them, with their labels.

    Args:
        batch: keys of an Example with a leading batch axis; padding (valid 0) is left out.
        class_names: as in DatasetInfo.
        path: of the PNG to write.
        max_examples: at most.

    Returns:
        The path.
    """
    arrays = {key: np.asarray(value) for key, value in batch.items()}
    valid = arrays.get("valid", np.ones(len(arrays["image"])))
    rows = np.flatnonzero(valid > 0)[:max_examples]
    return draw_examples(
        [{key: value[row] for key, value in arrays.items()} for row in rows], class_names, path
    )


def draw_examples(
    examples: Sequence[Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    titles: Sequence[str] = (),
) -> Path:
    """Draw examples with their labels, side by side.

    Args:
        examples: of a source, or as the network gets them.
        class_names: as in DatasetInfo.
        path: of the PNG to write.
        titles: one each; by default the label.

    Returns:
        The path.
    """
    columns = max(1, min(4, int(np.ceil(np.sqrt(max(1, len(examples)))))))
    lines = max(1, int(np.ceil(len(examples) / columns)))
    figure = Figure(figsize=(3 * columns, 3.2 * lines + 0.3), layout="constrained")
    axes = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for axis in axes:
        axis.set_axis_off()
    titles = titles or [_label_text(example, class_names) for example in examples]
    for axis, example, title in zip(axes, examples, titles, strict=False):
        draw_case(
            axis,
            example["image"],
            mask=example.get("mask"),
            boxes=example.get("boxes"),
            labels=example.get("box_label"),
            spacing=example.get("spacing"),
            class_names=class_names,
            title=title,
        )
    masks = [example["mask"] for example in examples if "mask" in example]
    if masks and max(int(mask.max()) for mask in masks) < len(class_names):
        _add_legend(figure, class_names[1:])
    return save_figure(figure, path)


def draw_overlay(
    path: str | Path,
    image: np.ndarray,
    *,
    class_names: Sequence[str] = (),
    title: str = "",
    warning: str = "",
    **what: Any,
) -> Path:
    """Write one picture of an image with what was predicted in it; returns the path.

    Args:
        path: of the PNG to write.
        image: (*spatial, channels).
        class_names: as in DatasetInfo.
        title: clipped.
        warning: what whoever looks at it must know, above the picture.
        **what: mask, boxes, labels, scores, spacing and truth, of `draw_case`.
    """
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    draw_case(axis, image, class_names=class_names, title=title, **what)
    figure.set_size_inches(_figure_size(axis))
    if warning:
        figure.suptitle(warning, fontsize=9, fontweight="bold", color=WARNING_COLOUR)
    masks = [mask for mask in (what.get("mask"), what.get("true_mask")) if mask is not None]
    numbered = max((int(mask.max()) for mask in masks), default=0)
    by_class = bool(masks) and numbered < len(class_names)
    compared = what.get("true_mask") is not None or what.get("true_boxes") is not None
    if by_class and (not compared or len(class_names) > 2):
        _add_legend(figure, class_names[1:], note="dashed: truth" if compared else "")
    elif compared:
        _add_legend(figure, ("prediction", "truth"), styles=("solid", "dashed"))
    return save_figure(figure, path)


def _figure_size(axis: Axes) -> tuple[float, float]:
    """Inches, in the proportions of the picture, with room for a title and a legend."""
    columns, rows = (abs(high - low) for low, high in (axis.get_xlim(), axis.get_ylim()))
    aspect = axis.get_aspect()
    height = rows * (1.0 if isinstance(aspect, str) else float(aspect))
    longest = max(columns, height)
    return max(3.0, 6 * columns / longest), max(2.0, 6 * height / longest) + 0.5


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, making its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)
    return path


def figure_to_png(figure: Figure, *, dpi: int = 80) -> bytes:
    """The content of a PNG of a figure, for a page that needs no other file."""
    memory = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(memory, format="png", dpi=dpi)
    return memory.getvalue()


def clip(text: str, letters: int = _TITLE_LETTERS) -> str:
    """The text on one line, cut in its middle where it is too long."""
    text = " ".join(text.split())
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"


def _draw_mask(axis: Axes, mask: np.ndarray, *, colour: str | None, style: str) -> None:
    """Outline classes or instances; instances share colours, so that a field takes few contours.

    Solid ones are filled faintly too, as outlines of many islands do not show what lies inside.
    """
    # One voxel of frame, so that an outline closes at the border of the image.
    mask = np.pad(mask, 1)
    rows, columns = (np.arange(n) - 1 for n in mask.shape)
    for number, own in enumerate(CLASS_COLOURS):
        group = (mask > 0) & ((mask - 1) % len(CLASS_COLOURS) == number)
        if group.any():
            if style == "solid":
                tint = np.zeros((*group.shape, 4), np.float32)
                tint[group] = to_rgba(colour or own, _TINT)
                extent = (columns[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5, rows[0] - 0.5)
                axis.imshow(tint, extent=extent, interpolation="nearest", aspect=axis.get_aspect())
            axis.contour(
                columns,
                rows,
                group.astype(float),
                levels=[0.5],
                colors=[colour or own],
                linestyles=[style],
                linewidths=1.2,
            )
    ignored = mask == -1
    if ignored.any():
        hatches = axis.contourf(
            columns,
            rows,
            ignored.astype(float),
            levels=[0.5, 1.5],
            colors="none",
            hatches=["////"],
        )
        hatches.set_edgecolor(IGNORED_COLOUR)
        hatches.set_linewidth(0)


@dataclasses.dataclass(frozen=True)
class _Boxes:
    """Boxes of one origin."""

    boxes: np.ndarray
    labels: np.ndarray | None
    scores: np.ndarray | None
    class_names: Sequence[str]

    def draw(self, axis: Axes, view: View, *, colour: str | None, style: str) -> None:
        """Draw those on the view, the best first where there are too many."""
        count = len(self.boxes)
        order = np.arange(count) if self.scores is None else np.argsort(-self.scores, kind="stable")
        real = np.ones(count, bool) if self.labels is None else self.labels >= 0
        for i in [int(i) for i in order if real[i]][:_MOST_BOXES]:
            place = view.rectangle(self.boxes[i])
            if place is None or not np.isfinite(place).all():
                continue
            label = -1 if self.labels is None else int(self.labels[i])
            own = colour or CLASS_COLOURS[max(label, 0) % len(CLASS_COLOURS)]
            # Boxes are half-open and count from a voxel's edge; pictures from its middle.
            row, column, height, width = place[0] - 0.5, place[1] - 0.5, place[2], place[3]
            axis.add_patch(
                Rectangle(
                    (column, row), width, height, fill=False, edgecolor=own, linestyle=style, lw=1.2
                )
            )
            self._write(axis, i, label, (column, row, height), own, below=style == "dashed")

    def _write(
        self,
        axis: Axes,
        i: int,
        label: int,
        corner: tuple[float, float, float],
        colour: str,
        *,
        below: bool,
    ) -> None:
        """Label and score, at the upper border, or at the lower one to leave room for another."""
        named = 0 <= label < len(self.class_names)
        words = [clip(self.class_names[label], _LABEL_LETTERS)] if named else []
        if self.scores is not None:
            words.append(f"{float(self.scores[i]):.2f}")
        column, row, height = corner
        # What is at the upper border has its label inside, where it is not cut off.
        at_top = not below and row < 0.04 * axis.images[0].get_size()[0]
        axis.text(
            column,
            row + height if below else row,
            " ".join(words),
            color=colour,
            fontsize=7,
            va="top" if below or at_top else "bottom",
            clip_on=True,
            parse_math=False,
            bbox={"facecolor": "black", "alpha": 0.55, "pad": 0.6, "linewidth": 0},
        )


def _label_text(example: Mapping[str, np.ndarray], class_names: Sequence[str]) -> str:
    """The class, or the classes, of an example."""
    label = example.get("label")
    if label is None:
        return ""
    if label.ndim == 0:
        return class_names[int(label)] if np.issubdtype(label.dtype, np.integer) else f"{label:.3g}"
    if np.issubdtype(label.dtype, np.integer):
        chosen = [name for name, given in zip(class_names, label, strict=True) if given > 0]
        return ", ".join(chosen) or "none"
    # Labels that were mixed: the shares.
    best = np.argsort(-label)[:2]
    return ", ".join(f"{class_names[i]} {label[i]:.2f}" for i in best if label[i] > 0)


def _add_legend(
    figure: Figure, names: Sequence[str], *, styles: Sequence[Any] = (), note: str = ""
) -> None:
    """Name the colours below the picture; `note` names a style."""
    styles = styles or ["solid"] * len(CLASS_COLOURS)
    pairs = list(zip(CLASS_COLOURS, styles, strict=False))[: len(names)]
    lines = [Line2D([], [], color=colour, linestyle=style) for colour, style in pairs]
    shown = [clip(name, 24).replace("$", r"\$") for name in names[: len(lines)]]
    if note:
        lines.append(Line2D([], [], color="gray", linestyle="dashed"))
        shown.append(note)
    if lines:
        figure.legend(lines, shown, loc="outside lower center", ncols=4, fontsize=8)
