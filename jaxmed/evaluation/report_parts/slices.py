"""Slices of a volume as one strip of pictures to go through, truth and prediction outlined.

Drawn with arrays, since figures of hundreds of slices would take minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import imageio.v3 as imageio
import numpy as np
from scipy import ndimage
from skimage.transform import resize

from jaxmed.evaluation.pictures import CLASS_COLOURS, PREDICTION_COLOUR, TRUTH_COLOUR
from jaxmed.evaluation.report_parts.blocks import Picture, Slices
from jaxmed.evaluation.views import View, choose_view, window

COLOUR_NAMES = ("orange", "light blue", "yellow", "pink", "green", "red", "dark blue")
"""Of `CLASS_COLOURS`."""
_SIZES = ((256, 48), (192, 48), (128, 48), (96, 32), (80, 20), (64, 8))
"""Pixels of the longer side of a slice, and slices at most; the first that fits is taken."""
_DASH = 5  # pixels


def make_slices(
    image: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
    true_mask: np.ndarray | None = None,
    true_boxes: np.ndarray | None = None,
    spacing: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    alt: str = "",
    limit: int = 600_000,
    **_: Any,
) -> Slices:
    """Slices along the last axis of a volume: the image, and beside it the image with outlines.

    Args:
        image: (x, y, z, channels).
        mask: (x, y, z) predicted classes or instances.
        boxes: (boxes, 6) predicted.
        true_mask: as `mask`; -1 is ignored.
        true_boxes: as `boxes`.
        spacing: (3,) mm a voxel.
        class_names: with more than two, outlines have the colour of their class.
        alt: what is seen, for those who cannot see it.
        limit: bytes that the strip may have; slices are made smaller and fewer until it fits.

    Returns:
        A strip that shows first what `choose_view` chooses.
    """
    depth = image.shape[2]
    first = choose_view(image.shape[:-1], (true_mask, mask), (true_boxes, boxes)).slice or 0
    drawn = _Outlines(mask, true_mask, boxes, true_boxes, by_class=len(class_names) > 2)
    for longest, most in _SIZES:
        step = -(-depth // most)
        places = list(range(first % step, depth, step))
        frames = [_frame(image, drawn, View(image.shape[:-1], z), spacing, longest) for z in places]
        # Brightness is of the volume as a whole, so that slices can be compared.
        shown = window(np.stack([plain for plain, _ in frames]))
        panels = [_panels(p, own) for p, (_, own) in zip(shown, frames, strict=True)]
        strip = _jpeg(np.concatenate(panels))
        if len(strip) <= limit:
            break
    skipped = f" (one in {step} is here)" if step > 1 else ""
    caption = f"of the third axis{skipped}{drawn.legend(class_names)}"
    size = (panels[0].shape[0], panels[0].shape[1])
    return Slices(alt, caption, strip, places, places.index(first), depth, size)


def plain_picture(
    image: np.ndarray, *, alt: str, limit: int, aspect: float | None = None
) -> Picture:
    """A flat image (rows, columns, channels) as it is, to be seen beside its outlines.

    Args:
        image: to be shown.
        alt: what is seen.
        limit: bytes that it may have.
        aspect: height of a pixel over its width, where `image` are pixels (uint8) already.
    """
    spacing = np.array([1.0 if aspect is None else aspect, 1.0])
    for longest, _ in _SIZES:
        shown = _resized(image, View(image.shape[:-1], None), spacing, 2 * longest)
        data = _jpeg(_panels(window(shown)) if aspect is None else shown)
        if len(data) <= limit:
            break
    return Picture(alt, "image", data)


def shrink_picture(data: bytes, limit: int) -> bytes:
    """A PNG or JPEG, where it is larger than `limit` bytes as a smaller JPEG."""
    if len(data) <= limit:
        return data
    image = imageio.imread(data)
    image = image[..., :3] if image.ndim == 3 else np.repeat(image[..., None], 3, -1)
    for side in (900, 640, 450, 320, 220, 160, 100):
        scale = min(1.0, side / max(image.shape[:2]))
        shape = [max(1, round(scale * n)) for n in image.shape[:2]]
        small = resize(image, (*shape, 3), order=1, anti_aliasing=scale < 1)
        shrunk = _jpeg((255 * small).round().astype(np.uint8))
        if len(shrunk) <= limit:
            break
    return shrunk


def _jpeg(pixels: np.ndarray) -> bytes:
    # Colours at full resolution: outlines are two pixels wide.
    return imageio.imwrite("<bytes>", pixels, extension=".jpeg", quality=80, subsampling=0)


def _target(view: View, spacing: np.ndarray | None, longest: int) -> tuple[int, int]:
    """Height and width of a slice in pixels, in its proportions in space."""
    rows, columns = (
        view.shape
        if view.slice is None
        else (view.shape[1], view.shape[0])  # as `View.cut` turns it
    )
    height, width = rows * view.aspect(spacing), float(columns)
    scale = longest / max(height, width)
    return max(1, round(scale * height)), max(1, round(scale * width))


def _resized(image: np.ndarray, view: View, spacing: np.ndarray | None, longest: int) -> np.ndarray:
    """A slice (rows, columns, 1 or 3) at its size in the picture, its values as they were."""
    shown = view.cut(image)
    shown = shown if shown.shape[-1] == 3 else shown[..., :1]
    shape = (*_target(view, spacing, longest), shown.shape[-1])
    smaller = shape[0] < shown.shape[0] or shape[1] < shown.shape[1]
    values = np.nan_to_num(shown.astype(np.float32))
    result = resize(values, shape, order=1, anti_aliasing=smaller, preserve_range=True)
    return result.round().astype(np.uint8) if shown.dtype == np.uint8 else result


class _Outlines:
    """What is drawn over the slices of a case."""

    def __init__(self, mask: Any, true_mask: Any, boxes: Any, true_boxes: Any, *, by_class: bool):
        self.by_class = by_class and (mask is not None or true_mask is not None)
        self.layers = [
            (true_mask, true_boxes, TRUTH_COLOUR, True),
            (mask, boxes, PREDICTION_COLOUR, False),
        ]
        self.any = any(found is not None for layer in self.layers for found in layer[:2])

    def of(self, view: View, shape: tuple[int, int]) -> list[tuple[np.ndarray, str]]:
        """Pixels (*shape) and colour of each outline on a slice."""
        drawn = []
        for mask, boxes, colour, dashed in self.layers:
            parts: list[tuple[np.ndarray, str]] = []
            if mask is not None:
                parts += [
                    (edge, CLASS_COLOURS[number] if self.by_class else colour)
                    for number, edge in _edges(_nearest(view.cut(mask), shape))
                ]
            if boxes is not None:
                parts.append((_box_edges(boxes, view, shape), colour))
            for edge, own in parts:
                stripes = np.add.outer(*map(np.arange, shape)) // _DASH % 2 == 0
                drawn.append((edge & stripes if dashed else edge, own))
        return drawn

    def legend(self, class_names: Sequence[str]) -> str:
        """The colours and lines in words."""
        if not self.any:
            return ""
        if not self.by_class:
            return "; truth dashed, light blue; prediction solid, orange"
        pairs = zip(class_names[1:], COLOUR_NAMES, strict=False)
        return f"; truth dashed, prediction solid; {', '.join(f'{n} {c}' for n, c in pairs)}"


def _frame(
    image: np.ndarray, drawn: _Outlines, view: View, spacing: np.ndarray | None, longest: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, str]] | None]:
    plain = _resized(image, view, spacing, longest)
    return plain, drawn.of(view, plain.shape[:2]) if drawn.any else None


def _panels(
    shown: np.ndarray, outlines: Sequence[tuple[np.ndarray, str]] | None = None
) -> np.ndarray:
    """Gray or colours from 0 to 1 as 8-bit colours; beside them the same with any outlines."""
    gray = (255 * shown).round().astype(np.uint8)
    gray = gray if gray.ndim == 3 else np.repeat(gray[..., None], 3, axis=-1)
    if outlines is None:
        return gray
    coloured = gray.copy()
    for edge, colour in outlines:
        coloured[edge] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.concatenate([gray, coloured], axis=1)


def _nearest(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def _edges(mask: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Two pixels about the border of each class; instances share colours, as in pictures."""
    found = []
    for number in range(len(CLASS_COLOURS)):
        inside = (mask > 0) & ((mask - 1) % len(CLASS_COLOURS) == number)
        if inside.any():
            grown = ndimage.binary_dilation(inside)
            found.append((number, grown & ~ndimage.binary_erosion(inside)))
    return found


def _box_edges(boxes: np.ndarray, view: View, shape: tuple[int, int]) -> np.ndarray:
    edge = np.zeros(shape, bool)
    scale = np.array(shape) / (view.shape[1], view.shape[0])
    for box in boxes:
        place = view.rectangle(box)
        if place is None or not np.isfinite(place).all():
            continue
        corner, size = np.array(place[:2]), np.array(place[2:])
        low = np.maximum(np.round(corner * scale).astype(int), 0)
        high = np.minimum(np.round((corner + size) * scale).astype(int), shape)
        inside = np.zeros(shape, bool)
        inside[low[0] : high[0], low[1] : high[1]] = True
        edge |= inside & ~ndimage.binary_erosion(inside, iterations=2)
    return edge
