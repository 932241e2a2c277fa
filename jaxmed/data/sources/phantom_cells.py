"""A field of cells as a fluorescence microscope shows it, drawn with its exact truth.

Kinds of cells differ in outline and in the arrangement of their texture, never in brightness:
every cell's mean and contrast are drawn from the same distribution. Debris is as bright as cells.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from jaxmed.data.sources.phantom_scene import Scene, smooth_field, visible_objects


@dataclasses.dataclass(frozen=True)
class CellKind:
    """How one kind of cell looks.

    Attributes:
        name: class name.
        radius: range of the mean radius in voxels of an image 64 wide.
        aspect: range of length over width.
        lobes: range of the number of bulges.
        bulge: how far bulges stand out, as a part of the radius.
        nucleus: radius of the nucleus as a part of the cell's.
        clumps: weight of coarse texture against a plain nucleus, 0 to 1.
    """

    name: str
    radius: tuple[float, float]
    aspect: tuple[float, float]
    lobes: tuple[int, int]
    bulge: float
    nucleus: float
    clumps: float


KINDS = (
    CellKind("round", (5.6, 7.4), (1.0, 1.15), (2, 4), 0.08, 0.5, 0.15),
    CellKind("elongated", (5.7, 7.5), (2.1, 2.8), (2, 4), 0.08, 0.55, 0.15),
    CellKind("atypical", (4.6, 7.2), (1.0, 1.3), (5, 8), 0.85, 0.45, 0.9),
)
COVERAGE = 0.27  # part of the image under cells, on average


def draw_cells(rng: np.random.Generator, shape: tuple[int, ...]) -> Scene:
    """Draw a field of cells of which one kind is in the majority.

    Args:
        rng: random numbers; the scene is a function of them alone.
        shape: (*spatial,), 2 or 3 axes; cells grow with the square root of the shortest one.

    Returns:
        The scene, its image uint8 and its objects numbered by cell.
    """
    scale = float(np.sqrt(max(min(shape), 16) / 64))
    value = 0.30 + 0.03 * smooth_field(rng, shape, waves=6.0, decay=1.0)
    _draw_debris(rng, value, scale)
    kinds = _choose_kinds(rng, shape, scale)
    sizes = np.array([rng.uniform(*KINDS[kind].radius) * scale for kind in kinds])
    centres = _place(rng, shape, sizes)
    texture = smooth_field(rng, shape, waves=min(shape) / (2.2 * scale), decay=0.5)
    objects = np.zeros(shape, np.int32)
    for number, (centre, size, kind) in enumerate(zip(centres, sizes, kinds, strict=True), start=1):
        _draw_cell(rng, value, objects, texture, centre, size, KINDS[kind], number)
    objects, kinds = visible_objects(objects, kinds)
    image = _photograph(rng, value, scale)
    return Scene(image, objects, kinds, np.ones(len(shape), np.float32))


def _choose_kinds(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Kinds of all cells in random order; one kind has three fifths or more of them."""
    radius = 6.5 * scale
    size = np.pi * radius**2 if len(shape) == 2 else 4 / 3 * np.pi * radius**3
    count = max(1, round(float(rng.uniform(0.65, 1.35)) * COVERAGE * np.prod(shape) / size))
    main = rng.integers(len(KINDS))
    kinds = rng.integers(len(KINDS), size=count).astype(np.int32)
    kinds[: int(np.ceil(0.6 * count))] = main
    return rng.permutation(kinds)


def _place(rng: np.random.Generator, shape: tuple[int, ...], sizes: np.ndarray) -> np.ndarray:
    """Centres (cells, ndim) that may touch and overlap somewhat, never hide one another."""
    centres: list[np.ndarray] = []
    limits = np.asarray(shape, float)
    for size in sizes:
        margin = 0.4 * size
        tries = rng.uniform(0, 1, (12, len(shape))) * (limits - 2 * margin) + margin
        if centres:
            gaps = np.linalg.norm(tries[:, None] - np.stack(centres), axis=-1)
            slack = (gaps / (size + sizes[: len(centres)])).min(axis=1)
        else:
            slack = np.ones(len(tries))
        # The first try that overlaps little enough; in a crowd, the roomiest.
        good = slack > 0.8
        centres.append(tries[int(np.argmax(good)) if good.any() else int(np.argmax(slack))])
    return np.stack(centres)


def _directions(rng: np.random.Generator, count: int, ndim: int) -> np.ndarray:
    """Unit vectors (count, ndim), spread out evenly and then shaken a little."""
    if ndim == 2:
        angles = 2 * np.pi * (np.arange(count) + rng.uniform(-0.2, 0.2, count)) / count
        angles = angles + rng.uniform(0, 2 * np.pi)
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    vectors = rng.standard_normal((count, ndim))
    for _ in range(3):  # push close neighbours apart
        away = vectors[:, None] - vectors[None]
        square = (away**2).sum(-1, keepdims=True) + 0.1
        vectors = vectors + 0.5 * (away / square).sum(1)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


def _window(
    centre: np.ndarray, reach: float, shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """The part of the image within `reach` of a point, and its positions relative to the point."""
    low = np.maximum(0, np.floor(centre - reach)).astype(int)
    high = np.minimum(shape, np.ceil(centre + reach) + 1).astype(int)
    place = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = [np.arange(a, b) + 0.5 - c for a, b, c in zip(low, high, centre, strict=True)]
    return place, np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def _draw_cell(
    rng: np.random.Generator,
    value: np.ndarray,
    objects: np.ndarray,
    texture: np.ndarray,
    centre: np.ndarray,
    radius: float,
    kind: CellKind,
    number: int,
) -> None:
    """Draw one cell into `value` and `objects`, over whatever is there."""
    ndim = value.ndim
    aspect = rng.uniform(*kind.aspect)
    length = radius * aspect ** (1 - 1 / ndim)  # area or volume does not depend on the aspect
    width = radius * aspect ** (-1 / ndim)
    lobes = _directions(rng, int(rng.integers(*kind.lobes)), ndim)
    axis = _directions(rng, 1, ndim)[0]
    place, position = _window(centre, length * (1 + kind.bulge), value.shape)
    distance = np.sqrt((position**2).sum(-1)) + 1e-6
    unit = position / distance[..., None]
    along = (unit @ axis) ** 2
    outline = 1 / np.sqrt(along / length**2 + (1 - along) / width**2)
    # Narrow bumps on the sphere of directions; 0.35 keeps the mean radius.
    bumps = np.exp(9 * ((unit @ lobes.T).max(-1) - 1))
    depth = distance / (outline * (1 + kind.bulge * (bumps - 0.35 - 0.2 * (kind.bulge > 0.5))))
    inside = depth < 1
    if not inside.any():
        return
    nucleus = np.clip((kind.nucleus - depth) * 6 + 0.5, 0, 1)
    rim = np.exp(-(((depth - 0.92) / 0.12) ** 2))
    look = (1 - kind.clumps) * 2 * nucleus + kind.clumps * texture[place] + 0.7 * rim
    look = look - look[inside].mean()
    look *= rng.uniform(0.05, 0.11) / (look[inside].std() + 1e-3)
    level = rng.uniform(0.42, 0.64)
    value[place] = np.where(inside, level + look, value[place])
    objects[place] = np.where(inside, number, objects[place])


def _draw_debris(rng: np.random.Generator, value: np.ndarray, scale: float) -> None:
    """Add what is no cell: unsharp blobs, threads and specks, as bright as cells."""
    crowd = np.prod(value.shape) / (64 * scale) ** value.ndim
    for _ in range(rng.poisson(2.0 * crowd)):
        radius = scale * rng.uniform(3, 7)
        centre = rng.uniform(0, 1, value.ndim) * value.shape
        place, position = _window(centre, 2.5 * radius, value.shape)
        square = (position**2).sum(-1)
        value[place] += rng.uniform(0.12, 0.34) * np.exp(-0.5 * square / (0.8 * radius) ** 2)
    for _ in range(rng.poisson(2.0 * crowd)):
        reach = scale * rng.uniform(6, 16)
        centre = rng.uniform(0, 1, value.ndim) * value.shape
        place, position = _window(centre, reach, value.shape)
        axis, bend = _directions(rng, 2, value.ndim)
        along = position @ axis
        # A parabola seen from its apex: a thread that is gently bent.
        away = position - along[..., None] * axis - 0.6 * along[..., None] ** 2 / reach * bend
        thread = ((away**2).sum(-1) < (0.9 * scale) ** 2) & (np.abs(along) < reach)
        value[place] += rng.uniform(0.12, 0.4) * thread
    count = rng.poisson(5.0 * crowd)
    spots = tuple((rng.uniform(0, 1, count) * n).astype(int) for n in value.shape)
    value[spots] += rng.uniform(0.3, 0.9, count)


def _photograph(rng: np.random.Generator, value: np.ndarray, scale: float) -> np.ndarray:
    """Blur, uneven light, Poisson and Gaussian noise, 8 bits."""
    value = ndimage.gaussian_filter(value, 0.75 * max(scale, 0.7), truncate=3.0)
    light = np.exp(0.20 * np.clip(smooth_field(rng, value.shape, waves=3.0), -2.5, 2.5))
    light *= rng.uniform(0.7, 1.1)
    photons = 700.0
    value = rng.poisson(np.maximum(value * light, 0) * photons) / photons
    value = value + 0.012 * rng.standard_normal(value.shape)
    return np.clip(np.rint(value * 255), 0, 255).astype(np.uint8)
