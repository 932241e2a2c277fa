"""Where the voxels of an image lie, and how far two images are apart."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the header of a file says of its voxels.

    Attributes:
        shape: (*spatial, channels) as `jaxmed.data.images.read_image` gives it.
        spacing: (ndim,) float32, mm a voxel; 1 where unknown.
        affine: (4, 4) float64 from voxel indices to RAS+ millimetres, or None.
    """

    shape: tuple[int, ...]
    spacing: np.ndarray
    affine: np.ndarray | None = None


def distance(one: Grid, other: Grid) -> tuple[float, str]:
    """How far two grids of one spatial shape are apart, where both files state it.

    Returns:
        The longest way along an axis from a corner to the same corner of the other grid, in
        voxels, and in what they differ, in words; 0 and "" where one states nothing.
    """
    last = np.array(one.shape[:-1], np.float64) - 1
    if one.affine is not None and other.affine is not None:
        corners = np.array([(*c, 1.0) for c in itertools.product(*((0.0, n) for n in last))])
        ways = corners @ (np.linalg.inv(one.affine) @ other.affine).T - corners
        far = np.abs(ways).max()
    elif (one.spacing != 1).any() and (other.spacing != 1).any():
        far = np.abs((other.spacing / one.spacing - 1) * last).max()
    else:
        return 0.0, ""
    return float(far), _difference(one, other)


def _difference(one: Grid, other: Grid) -> str:
    """What differs by more than the rounding of a header."""
    said = []
    if not np.allclose(one.spacing, other.spacing, rtol=1e-5):
        texts = (" x ".join(f"{side:.6g}" for side in grid.spacing) for grid in (one, other))
        said.append(f"spacing {' and '.join(texts)} mm")
    if one.affine is not None and other.affine is not None:
        ways = one.affine[:3, :3] / one.spacing, other.affine[:3, :3] / other.spacing
        if not np.allclose(*ways, atol=1e-5):
            cosines = np.clip((ways[0] * ways[1]).sum(0), -1, 1)
            said.append(f"direction by {np.degrees(np.arccos(cosines.min())):.3g} degrees")
        moved = float(np.linalg.norm(one.affine[:3, 3] - other.affine[:3, 3]))
        if moved > 1e-5 * float(one.spacing.min()):
            said.append(f"origin by {moved:.4g} mm")
    return ", ".join(said) or "rounding"
