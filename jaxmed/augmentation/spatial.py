"""Augmentations that move voxels: image, mask and boxes by one and the same draw."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int

from jaxmed.augmentation.compose import DeviceExample, check_probability, check_range
from jaxmed.augmentation.intensity import reduce_spatial
from jaxmed.types import Augment, Number, UserError


def flip(*, axes: Sequence[int] | None = None, probability: Number = 0.5) -> Augment:
    """Mirror along spatial axes, each decided apart.

    Args:
        axes: spatial axes that may be mirrored; all of them if None. Leave out an axis where sides
            carry meaning, such as left and right of a chest.
        probability: of mirroring one axis.
    """
    check_probability(probability)

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        example = dict(example)
        image = example["image"]
        chosen_axes = range(image.ndim - 1) if axes is None else axes
        flags = jax.random.bernoulli(key, probability, (image.ndim - 1,))
        for axis in chosen_axes:
            flag = flags[axis]
            for name in ("image", "mask"):
                if name in example:
                    array = example[name]
                    example[name] = jnp.where(flag, jnp.flip(array, axis), array)
            if "boxes" in example:
                mirrored = _mirror_boxes(example["boxes"], axis, image.shape[axis])
                real = (example["box_label"] >= 0)[:, None]
                example["boxes"] = jnp.where(flag & real, mirrored, example["boxes"])
        return example

    return apply


def quarter_turns(*, axes: tuple[int, int] = (0, 1)) -> Augment:
    """Turn by 0, 90, 180 or 270 degrees in one plane, each equally likely, without resampling.

    For images with no up and down, such as microscopy and histology; with `flip` it gives all eight
    symmetries of the square. Both axes must have the same length and spacing.
    """
    first, second = axes

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        example = dict(example)
        shape = example["image"].shape[:-1]
        if shape[first] != shape[second]:
            raise UserError(
                f"augmentation: quarter turns need a square, axes {axes} have {shape[first]} and "
                f"{shape[second]} voxels; set a square patch or use affine"
            )
        turns = jax.random.randint(key, (), 0, 4)
        for name in ("image", "mask"):
            if name in example:
                array = example[name]
                array = jnp.where(turns % 2 == 1, jnp.rot90(array, 1, axes), array)
                example[name] = jnp.where(turns >= 2, jnp.rot90(array, 2, axes), array)
        if "boxes" in example:
            boxes, real = example["boxes"], (example["box_label"] >= 0)[:, None]
            quarter = _turn_boxes(boxes, axes, shape)
            boxes = jnp.where((turns % 2 == 1) & real, quarter, boxes)
            half = _turn_boxes(_turn_boxes(boxes, axes, shape), axes, shape)
            example["boxes"] = jnp.where((turns >= 2) & real, half, boxes)
        return example

    return apply


def affine(
    *,
    rotation: Number | Sequence[float] = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float = 0.0,
    translation: Number = 0.0,
    axes: Sequence[int] | None = None,
    fill: float | str = "minimum",
    min_visible: float = 0.3,
    probability: Number = 1.0,
) -> Augment:
    """Rotate, scale, shear and shift about the middle, in one resampling.

    The image is sampled linearly, the mask at the nearest voxel, so that no label is made up and -1
    stays -1. Rotation and shear happen in millimetres where `spacing` is known: a turn in voxels
    would distort the anatomy of a volume with thick slices.

    A box becomes the box around its *inscribed ellipse* after the map: the half side along axis i
    is sqrt(sum_j (A_ij h_j)^2), where the box around the moved corners has sum_j |A_ij| h_j.
    Organs, cells and lesions are roundish, so the corners of a box are empty, and corners turned by
    45 degrees would make a box 1.4 times too wide. Without rotation and shear the two are equal.

    Args:
        rotation: largest angle in degrees; one number, or one a plane in the order of
            `itertools.combinations(axes, 2)`.
        scale: (low, high) magnification, the same along all axes; log-uniform.
        shear: largest slope.
        translation: largest shift, as a fraction of the side.
        axes: spatial axes taking part; all of them if None. (0, 1) leaves thick slices whole.
        fill: what comes in from outside. "minimum" is the least value of the channel (air, or the
            dark surround), "edge" repeats the border, a number is itself. The mask follows the
            image: the background 0 beside a dark surround, the border's label beside its repeat.
        min_visible: a box with less than this part of its area (volume) inside is dropped.
        probability: of each of rotation, scale, shear and translation, drawn apart as in nnU-Net.
    """
    check_probability(probability)
    check_range("scale", scale, least=0.0)
    if isinstance(fill, str) and fill not in ("minimum", "edge"):
        raise UserError(f"augmentation: fill is {fill!r}; set 'minimum', 'edge' or a number")

    def apply(key: jax.Array, example: DeviceExample) -> DeviceExample:
        image = example["image"]
        shape = image.shape[:-1]
        backward, forward, shift = _draw_affine(
            key,
            shape,
            tuple(range(len(shape))) if axes is None else tuple(axes),
            rotation=rotation,
            scale=scale,
            shear=shear,
            translation=translation,
            probability=probability,
        )
        if "spacing" in example:
            ratio = example["spacing"][None, :] / example["spacing"][:, None]
            backward, forward = backward * ratio, forward * ratio
        positions = _sampling_positions(shape, backward, shift)
        moved = {**example, "image": _sample_image(image, positions)}
        if "mask" in example:
            moved["mask"] = _sample_mask(example["mask"], positions)
        if fill != "edge":
            inside = _inside(shape, positions)
            value = reduce_spatial(jnp.min, image) if fill == "minimum" else float(fill)
            moved["image"] = jnp.where(inside[..., None], moved["image"], value)
            if "mask" in example:
                moved["mask"] = jnp.where(inside, moved["mask"], 0)
        if "boxes" in example:
            moved["boxes"], moved["box_label"] = _move_boxes(
                example["boxes"],
                example["box_label"],
                matrix=forward,
                shift=shift,
                shape=shape,
                min_visible=min_visible,
            )
        return moved

    return apply


def _draw_affine(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    rotation: Number | Sequence[float],
    scale: tuple[float, float],
    shear: float,
    translation: Number,
    probability: Number,
) -> tuple[Float[Array, "ndim ndim"], Float[Array, "ndim ndim"], Float[Array, " ndim"]]:
    """Draw the matrix from output to input, its inverse, and the shift of the output in voxels.

    Both matrices are products of the same elementary ones: no inversion to lose digits in, and the
    identity stays exact.
    """
    ndim, planes = len(shape), list(itertools.combinations(axes, 2))
    # One draw for all: on a CPU, most of the time to compile goes into random number generators.
    drawn = jax.random.uniform(key, (5 + 2 * len(planes) + len(axes),))
    does = jnp.where(drawn[:4] < probability, 1.0, 0.0)
    low, high = math.log(scale[0]), math.log(scale[1])
    magnification = jnp.exp(does[1] * (low + (high - low) * drawn[4]))
    signed = 2 * drawn[5:] - 1
    largest = jnp.deg2rad(jnp.broadcast_to(jnp.asarray(rotation, jnp.float32), (len(planes),)))
    angles = does[0] * largest * signed[: len(planes)]
    slopes = does[2] * shear * signed[len(planes) : 2 * len(planes)]
    shifts = does[3] * translation * signed[2 * len(planes) :]

    unit = np.eye(ndim, dtype=np.float32)
    taking_part = np.isin(np.arange(ndim), axes)
    forward = jnp.diag(jnp.where(taking_part, magnification, 1.0))
    backward = jnp.diag(jnp.where(taking_part, 1 / magnification, 1.0))
    # Full precision: an accelerator's short floats would shift far voxels by whole ones.
    multiply = functools.partial(jnp.matmul, precision="highest")
    for plane, (i, j) in enumerate(planes):
        both = np.outer(unit[i], unit[i]) + np.outer(unit[j], unit[j])
        across = np.outer(unit[j], unit[i]) - np.outer(unit[i], unit[j])
        turn = unit + (jnp.cos(angles[plane]) - 1) * both + jnp.sin(angles[plane]) * across
        slant = slopes[plane] * np.outer(unit[i], unit[j])
        backward = multiply(multiply(backward, turn), unit + slant)
        forward = multiply(multiply(unit - slant, turn.T), forward)
    shift = sum(s * shape[axis] * unit[axis] for s, axis in zip(shifts, axes, strict=True))
    return backward, forward, shift


def _sampling_positions(
    shape: tuple[int, ...], matrix: Float[Array, "ndim ndim"], shift: Float[Array, " ndim"]
) -> list[Float[Array, "*spatial"]]:
    """Where each output voxel is found in the input, one array of indices an axis."""
    middle = [(side - 1) / 2 for side in shape]
    grids = jnp.meshgrid(
        *[jnp.arange(side) - middle[axis] - shift[axis] for axis, side in enumerate(shape)],
        indexing="ij",
        sparse=True,
    )
    # A sum of broadcast products instead of a matrix product: exact for the identity, and fused.
    return [
        sum((matrix[i, j] * grids[j] for j in range(len(shape))), start=jnp.float32(middle[i]))
        for i in range(len(shape))
    ]


def _inside(
    shape: tuple[int, ...], positions: list[Float[Array, "*spatial"]]
) -> Bool[Array, "*spatial"]:
    """Whether a position falls into a voxel of the image; the same for image and mask."""
    inside = [(p >= -0.5) & (p <= side - 0.5) for p, side in zip(positions, shape, strict=True)]
    return functools.reduce(jnp.logical_and, inside)


def _sample_image(
    image: Float[Array, "*spatial channels"], positions: list[Float[Array, "*spatial"]]
) -> Float[Array, "*spatial channels"]:
    """Sample every channel linearly, the border repeated.

    As fast as one gather of all channels with flat indices, or faster (measured on a CPU): the
    gathers of the vmapped channels share their indices.
    """

    def sample(channel):
        return map_coordinates(channel, positions, order=1, mode="nearest")

    return jax.vmap(sample, -1, -1)(image)


def _sample_mask(
    mask: Int[Array, "*spatial"], positions: list[Float[Array, "*spatial"]]
) -> Int[Array, "*spatial"]:
    """The nearest voxel's label, the border repeated.

    One flat index into the mask: half the time of `map_coordinates` on a CPU.
    """
    flat: Any = 0
    for position, side in zip(positions, mask.shape, strict=True):
        nearest = jnp.clip(jnp.floor(position + 0.5), 0, side - 1).astype(jnp.int32)
        flat = flat * side + nearest
    return jnp.take(mask.reshape(-1), flat, mode="clip")


def _move_boxes(
    boxes: Float[Array, "boxes sides"],
    box_label: Int[Array, " boxes"],
    *,
    matrix: Float[Array, "ndim ndim"],
    shift: Float[Array, " ndim"],
    shape: tuple[int, ...],
    min_visible: float,
) -> tuple[Float[Array, "boxes sides"], Int[Array, " boxes"]]:
    """Boxes around the moved ellipses, clipped; zero and labelled -1 where too little is left."""
    ndim = len(shape)
    low, high = boxes[:, :ndim], boxes[:, ndim:]
    middle = jnp.asarray(shape, jnp.float32) / 2
    relative = (low + high) / 2 - middle
    centre = (matrix * relative[:, None, :]).sum(-1) + middle + shift
    half = jnp.sqrt(jnp.square(matrix * ((high - low) / 2)[:, None, :]).sum(-1))
    low, high = centre - half, centre + half
    inside_low = jnp.clip(low, 0, 2 * middle)
    inside_high = jnp.clip(high, 0, 2 * middle)
    visible = (inside_high - inside_low).prod(-1)
    whole = (high - low).prod(-1)
    kept = (box_label >= 0) & (visible > 0) & (visible >= min_visible * whole)
    moved = jnp.concatenate([inside_low, inside_high], -1)
    # Padding stays as it came; what is dropped becomes padding.
    moved = jnp.where(kept[:, None], moved, jnp.where((box_label >= 0)[:, None], 0, boxes))
    return moved, jnp.where(kept, box_label, -1)


def _mirror_boxes(
    boxes: Float[Array, "boxes sides"], axis: int, side: int
) -> Float[Array, "boxes sides"]:
    """Boxes of an image mirrored along one axis."""
    ndim = boxes.shape[-1] // 2
    low, high = boxes[:, axis], boxes[:, ndim + axis]
    return boxes.at[:, axis].set(side - high).at[:, ndim + axis].set(side - low)


def _turn_boxes(
    boxes: Float[Array, "boxes sides"], axes: tuple[int, int], shape: tuple[int, ...]
) -> Float[Array, "boxes sides"]:
    """Boxes after `jnp.rot90(image, 1, axes)`: a transposition, then mirroring the first axis."""
    ndim = boxes.shape[-1] // 2
    order = list(range(ndim))
    order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
    swapped = boxes[:, jnp.asarray(order + [ndim + axis for axis in order])]
    return _mirror_boxes(swapped, axes[0], shape[axes[0]])
