"""Where the slices of a DICOM volume lie: order, spacing, and the checks that they make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.types import UserError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNEVEN = 0.05  # of the spacing: positions are rounded when they are written
_OFF = 0.1  # of a voxel, from the place where an affine puts a slice


@dataclasses.dataclass(frozen=True)
class Frame:
    """One slice: its file, its number in the file, and where it lies (LPS millimetres)."""

    path: Path
    number: int
    position: np.ndarray
    directions: np.ndarray
    spacing: tuple[float, float]


def channels_of(header: Any) -> int:
    """Channels that the pixels have once a palette is undone."""
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        return 3
    return int(header.get("SamplesPerPixel", 1))


def frames_of(header: Any) -> int:
    """Frames in a file; most have one."""
    return int(header.get("NumberOfFrames", 1) or 1)


def frame_field(header: Any, number: int, sequence: str, field: str) -> Any:
    """A field of one frame of a multi-frame file, its own or shared by all; None where absent."""
    own = header.get("PerFrameFunctionalGroupsSequence")
    shared = header.get("SharedFunctionalGroupsSequence")
    for group in (own[number] if own else None, shared[0] if shared else None):
        items = group.get(sequence) if group is not None else None
        if items and items[0].get(field) is not None:
            return items[0].get(field)
    return header.get(field)


def frame_of(path: Path, header: Any, number: int) -> Frame:
    """Where one frame lies.

    Raises:
        UserError: the file does not say so.
    """
    position = frame_field(header, number, "PlanePositionSequence", "ImagePositionPatient")
    if position is not None and frames_of(header) > 1 and "ImagePositionPatient" in header:
        position = None  # one position for many frames: a film, or a dose
    directions = frame_field(header, number, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = frame_field(header, number, "PixelMeasuresSequence", "PixelSpacing")
    if position is None or directions is None or spacing is None:
        raise UserError(
            f"{path}: its slices have no position in space, so they make no volume (a film, or "
            "views of an X-ray); save one picture a file, each in the list by itself"
        )
    return Frame(
        path=path,
        number=number,
        position=np.array(position, np.float64),
        directions=np.array(directions, np.float64).reshape(2, 3),
        spacing=(float(spacing[0]), float(spacing[1])),
    )


def check_alike(frames: Sequence[Frame], headers: dict[Path, Any]) -> None:
    """All slices of a volume must have one size, direction and pixel spacing."""
    first, size = frames[0], (headers[frames[0].path].Rows, headers[frames[0].path].Columns)
    for frame in frames:
        header = headers[frame.path]
        for name, same in (
            ("size", (header.Rows, header.Columns) == size),
            ("number of channels", channels_of(header) == channels_of(headers[first.path])),
            ("direction", np.allclose(frame.directions, first.directions, atol=1e-3)),
            ("pixel spacing", np.allclose(frame.spacing, first.spacing, rtol=1e-3)),
        ):
            if not same:
                raise UserError(
                    f"{frame.path}: its {name} differs from that of {first.path.name}; keep only "
                    "the slices of one scan in the folder"
                )


def in_order(frames: list[Frame]) -> list[Frame]:
    """Order slices along the normal of their plane, and check that they are evenly spaced."""
    normal = np.cross(*frames[0].directions)
    frames = sorted(frames, key=lambda frame: float(normal @ frame.position))
    along = np.array([normal @ frame.position for frame in frames])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    for i, gap in enumerate(gaps):
        if gap < 1e-3:
            raise UserError(
                f"{frames[i + 1].path}: lies at the same place as another slice "
                f"({frames[i].path.name}); keep one scan (one time, one echo) in the folder"
            )
        if abs(gap - usual) > _UNEVEN * usual:
            raise UserError(
                f"{frames[i + 1].path}: is {gap:.3f} mm from the slice before it "
                f"({frames[i].path.name}), others are {usual:.3f} mm apart; slices are missing or "
                "unevenly spaced, so complete the series"
            )
    _check_straight(frames)
    return frames


def _check_straight(frames: Sequence[Frame]) -> None:
    """Slices must follow one line in equal steps, as one affine says."""
    first, last = frames[0], frames[-1]
    step = (last.position - first.position) / max(1, len(frames) - 1)
    normal = np.cross(*first.directions)
    for i, frame in enumerate(frames):
        off = frame.position - (first.position + i * step)
        along = normal * (normal @ off)
        if np.linalg.norm(along) > _OFF * abs(normal @ step) or np.linalg.norm(
            off - along
        ) > _OFF * min(first.spacing):
            raise UserError(
                f"{frame.path}: lies {np.linalg.norm(off):.3f} mm from where the other slices say "
                "that it should; they follow no straight line in even steps, so check the series"
            )


def affine_of(frames: Sequence[Frame]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(4, 4) from (column, row, slice) to RAS+ millimetres, and notes."""
    first, last = frames[0], frames[-1]
    rows, columns = first.spacing
    normal = np.cross(*first.directions)
    step = (last.position - first.position) / (len(frames) - 1)
    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * columns  # along a row, as the column number grows
    affine[:3, 1] = first.directions[1] * rows
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    sheared = np.linalg.norm(step - normal * (normal @ step)) > 0.01 * np.linalg.norm(step)
    notes = ("slices are tilted against their row (gantry tilt); voxels are no boxes",)
    return _LPS_TO_RAS @ affine, notes if sheared else ()
