"""An abdomen as computed tomography shows it, drawn in millimetres with its exact truth.

A section or a volume of a fixed field of view, whatever the number of voxels: fat, muscle, ribs,
spine, a liver-like organ with vessels and lesions, and spleen, kidneys, stomach, bowel and aorta,
which are neither. Lesions and vessels are darker than the liver by about as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from jaxmed.data.sources.phantom_scene import Scene, smooth_field, visible_objects

LESIONS = ("cyst", "tumour")
FIELD_OF_VIEW = (320.0, 320.0, 200.0)  # mm: right-left, front-back, top-bottom


@dataclasses.dataclass(frozen=True)
class _Space:
    """Positions in mm of every voxel: to the right, to the front and upwards of the middle."""

    shape: tuple[int, ...]
    right: np.ndarray
    front: np.ndarray
    up: np.ndarray
    spacing: np.ndarray

    def ellipsoid(
        self, centre: Sequence[int | float] | np.ndarray, radii: Sequence[int | float] | np.ndarray
    ) -> np.ndarray:
        """Relative distance from the centre: 1 on the surface."""
        axes = (self.right, self.front, self.up)
        parts = [((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)]
        return np.sqrt(parts[0] + parts[1] + parts[2])

    def tube(self, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
        """Where the distance to the line between two points is below the radius."""
        axis = end - start
        away = [x - s for x, s in zip((self.right, self.front, self.up), start, strict=True)]
        along = sum(d * a for d, a in zip(away, axis, strict=True)) / (axis @ axis)
        along = np.clip(along, 0, 1)
        square = sum((d - along * a) ** 2 for d, a in zip(away, axis, strict=True))
        return square < radius**2


@dataclasses.dataclass(frozen=True)
class Patient:
    """What the images of one patient have in common.

    Attributes:
        seed: of the anatomy.
        ill: whether images of this patient mostly show lesions.
    """

    seed: tuple[int, ...]
    ill: bool

    @classmethod
    def draw(cls, *seed: int) -> Patient:
        """The patient of these numbers."""
        return cls(seed, bool(np.random.default_rng([*seed, 1]).uniform() < 0.5))


def draw_body(rng: np.random.Generator, shape: tuple[int, ...], *, patient: Patient) -> Scene:
    """Draw one image of a patient.

    Args:
        rng: of the image: level of a section, lesions, noise. The scene is a function of it and
            of the patient alone.
        shape: (rows, cols) of a section seen from below, front up, or (x, y, z) of a volume in
            RAS order.
        patient: whose anatomy it is.

    Returns:
        The scene: image int16 in Hounsfield units, objects numbered by lesion, the liver as organ
        (lesions and vessels within it included).
    """
    anatomy = np.random.default_rng(patient.seed)
    space = _make_space(anatomy, shape, level=rng.uniform(-45, 45))
    value, liver, level = _draw_anatomy(anatomy, space)
    _draw_vessels(rng, space, value, liver, level)
    objects = np.zeros(shape, np.int32)
    kinds = _draw_lesions(rng, space, value, objects, liver, level, ill=patient.ill)
    objects, kinds = visible_objects(objects, kinds)
    image = _scan(rng, space, value)
    return Scene(image, objects, kinds, space.spacing, organ=liver < 1)


def _make_space(anatomy: np.random.Generator, shape: tuple[int, ...], *, level: float) -> _Space:
    """Coordinates, gently warped so that no organ is an ellipse; `level` is a section's height."""
    size = anatomy.uniform(0.94, 1.06)
    steps = [fov * size / n for fov, n in zip(FIELD_OF_VIEW, _as_axes(shape), strict=False)]
    places = [(np.arange(n) + 0.5 - n / 2) * d for n, d in zip(_as_axes(shape), steps, strict=True)]
    if len(shape) == 2:
        # Rows run from front to back, columns from the patient's right to the left.
        right, front = np.broadcast_arrays(-places[0][None, :], -places[1][:, None])
        up, spacing = np.asarray(level), [steps[1], steps[0]]
    else:
        # np.meshgrid gives equal shapes; RAS order: every axis grows with its coordinate.
        right, front, up = np.meshgrid(*places, indexing="ij")
        spacing = steps
    warp = [smooth_field(anatomy, shape, waves=5.0, decay=1.0) for _ in range(2)]
    return _Space(
        shape, right + 3.5 * warp[0], front + 3.5 * warp[1], up, np.asarray(spacing, np.float32)
    )


def _as_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels to the right, to the front and, of a volume, upwards."""
    return (shape[1], shape[0]) if len(shape) == 2 else shape


def _draw_anatomy(rng: np.random.Generator, space: _Space) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw all but the liver's contents.

    Returns:
        Hounsfield units, the relative distance from the liver's middle (1 on its surface), and
        the Hounsfield units of healthy liver.
    """

    def near(place: int | float) -> float:
        return place + rng.uniform(-5, 5)

    def tone(hounsfield: int | float) -> float:
        return hounsfield + rng.uniform(-12, 12)

    value = np.full(space.shape, -1000.0)
    wall = space.ellipsoid((0, 0, 0), (near(146), near(112), 1e4))
    inner = space.ellipsoid((0, 0, 0), (near(122), near(92), 1e4))
    value[wall < 1] = tone(-100)
    value[inner < 1] = tone(52)
    angle = np.arctan2(space.front, space.right)
    ribs = (np.abs(inner - 0.93) < 0.05) & (np.cos(11 * angle + space.up / 14) > 0.75)
    value[ribs] = 330
    fat = -80 + 14 * smooth_field(rng, space.shape, waves=14.0)
    cavity = inner < 0.86
    value[cavity] = fat[cavity]
    for side in (-1, 1):
        value[space.ellipsoid((side * near(30), -72, 0), (22, 17, 1e4)) < 1] = 50
    _draw_bowel(rng, space, value, cavity)
    level = tone(62)
    spleen = space.ellipsoid((near(-84), near(-14), 15), (26, 38, 62)) < 1
    value[spleen & cavity] = level + rng.uniform(-12, 12)
    for side in (-1, 1):
        kidney = space.ellipsoid((side * near(56), near(-46), -25), (23, 19, 62))
        value[kidney < 1] = level + rng.uniform(-25, 15)
        value[kidney < 0.42] = -70
    value[space.ellipsoid((-10, -38, 0), (11, 11, 1e4)) < 1] = tone(75)
    spine = space.ellipsoid((0, near(-64), 0), (19, 17, 1e4))
    value[spine < 1] = 420
    value[spine < 0.8] = 190
    value[space.ellipsoid((0, -91, 0), (8, 8, 1e4)) < 1] = 25
    right_lobe = space.ellipsoid((near(54), near(20), 10), (near(62), near(52), 95))
    left_lobe = space.ellipsoid((near(2), near(46), 15), (near(48), near(24), 70))
    liver = np.minimum(right_lobe, left_lobe)
    liver = np.where(inner < 0.84, liver, np.maximum(liver, 1))
    value[liver < 1] = level
    return value, liver, level


def _draw_bowel(
    rng: np.random.Generator, space: _Space, value: np.ndarray, cavity: np.ndarray
) -> None:
    """Stomach and loops of bowel: a wall, contents as dark as lesions, gas in front.

    There is much or little of them, so that the amount of dark tissue does not betray lesions.
    """
    fill = rng.uniform(0.45, 1.25)
    loops = [((-52.0, 42.0, 25.0), (36 * fill, 27 * fill, 60.0))]
    for _ in range(rng.integers(2, 7)):
        centre = (rng.uniform(-80, 75), rng.uniform(-25, 62), rng.uniform(-90, 30))
        loops.append((centre, (rng.uniform(11, 21), rng.uniform(11, 21), 40.0)))
    for centre, radii in loops:
        depth = space.ellipsoid(centre, radii)
        value[(depth < 1) & cavity] = 48 + rng.uniform(-12, 12)
        contents = (depth < 0.82) & cavity
        value[contents] = rng.uniform(-5, 40)
        if rng.uniform() < 0.6:
            surface = centre[1] + rng.uniform(0.1, 0.8) * radii[1]
            value[contents & (space.front > surface)] = -850


def _draw_vessels(
    rng: np.random.Generator, space: _Space, value: np.ndarray, liver: np.ndarray, level: float
) -> None:
    """Darker vessels through the liver; cut across, they look like small cysts."""
    contrast = rng.uniform(28, 48)
    root = np.array([rng.uniform(25, 45), rng.uniform(5, 25), 0.0])
    for _ in range(rng.integers(4, 9)):
        end = np.array([rng.uniform(-20, 105), rng.uniform(-25, 65), rng.uniform(-90, 90)])
        start = root + rng.uniform(-12, 12, 3)
        inside = space.tube(start, end, rng.uniform(3.5, 6.5)) & (liver < 0.95)
        value[inside] = level - contrast


def _draw_lesions(
    rng: np.random.Generator,
    space: _Space,
    value: np.ndarray,
    objects: np.ndarray,
    liver: np.ndarray,
    level: float,
    *,
    ill: bool,
) -> np.ndarray:
    """Draw lesions into the liver, or the like elsewhere, which are none; the lesions' kinds.

    Were there no bodies elsewhere, the mere amount of dark tissue would tell who is ill.
    """
    ill = rng.uniform() < (0.9 if ill else 0.1) and bool((liver < 1).any())
    count = int(rng.integers(1, 5))
    within = rng.uniform(size=count) < (0.85 if ill else 0)
    within[0] = ill
    kinds = rng.integers(len(LESIONS), size=count).astype(np.int32)
    # Two and a half voxels across at least, lest a lesion fall between voxels.
    smallest = max(13.0, 1.3 * float(space.spacing.max()))
    texture = smooth_field(rng, space.shape, waves=max(6.0, min(space.shape) / 4))
    axes = [np.broadcast_to(x, space.shape) for x in (space.right, space.front, space.up)]
    free = np.where(liver < 0.8, 1, 0)  # 1 where there is room in the liver, 2 elsewhere
    deep = space.ellipsoid((0, 0, 0), (104, 80, 1e4)) < 1
    free[deep & (liver > 1.25) & (value > 20) & (value < 100)] = 2
    for number, (kind, inner) in enumerate(zip(kinds, within, strict=True), start=1):
        room = np.flatnonzero(free == (1 if inner else 2))
        if not len(room):
            room = np.flatnonzero(liver < 1 if inner else liver > 1.25)
        place = rng.choice(room)
        centre = [float(x.flat[place]) for x in axes]
        radius = smallest * rng.uniform(1.0, 1.9) * (1.15 if LESIONS[kind] == "tumour" else 1.0)
        depth = space.ellipsoid(centre, radius * rng.uniform(0.85, 1.15, 3))
        host = liver < 1 if inner else (liver > 1.05) & (value > -150) & (value < 150)
        inside = (depth < 1) & host
        if LESIONS[kind] == "cyst":
            look = np.full(space.shape, level - rng.uniform(28, 48))
        else:
            core = level - rng.uniform(42, 62) + 10 * texture
            look = np.where(depth > 0.68, level + rng.uniform(10, 25), core)
        value[inside] = look[inside]
        objects[inside] = number if inner else 0
        free[depth < 1.8] = 0  # the next one may touch this one, or overlap a little
    return kinds


def _scan(rng: np.random.Generator, space: _Space, value: np.ndarray) -> np.ndarray:
    """Blur, a smooth shading artefact, noise with the grain of a reconstruction; int16."""
    value = ndimage.gaussian_filter(value, 0.45, truncate=3.0)
    value = value + rng.uniform(4, 12) * smooth_field(rng, space.shape, waves=4.0)
    grain = ndimage.gaussian_filter(rng.standard_normal(space.shape), 0.5, truncate=3.0)
    value += rng.uniform(8, 12) / grain.std() * grain
    return np.clip(np.rint(value), -1024, 3071).astype(np.int16)
