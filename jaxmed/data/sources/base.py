"""What the layouts share: a case, and a source of cases that lie in files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.formats.common import window_of
from jaxmed.data.formats.grid import distance
from jaxmed.data.images import (
    Image,
    image_files,
    image_shape,
    image_stem,
    patient_digest,
    read_region,
)
from jaxmed.data.sources.findings import PARTS
from jaxmed.types import DatasetInfo, Example, Region, UserError, check_example

FAR_APART = 0.1
"""Of a voxel, from which an image and its mask are on different grids."""
LOOKED_AT = 25
"""Cases that tell of what kind the images of a set are."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One case that lies in files.

    Attributes:
        id: unique in its set.
        images: files whose channels follow one another; nearly always one.
        mask: file of class or instance numbers.
        label: class number.
        boxes: (boxes, 2 * ndim) float32 as in an Example, unpadded.
        box_label: (boxes,) int32.
        part: "train", "val", "test", or "" where none is given.
        patient: group that must not be split, or "" where unknown.
    """

    id: str
    images: tuple[Path, ...]
    mask: Path | None = None
    label: int | None = None
    boxes: np.ndarray | None = None
    box_label: np.ndarray | None = None
    part: str = ""
    patient: str = ""


class FileSource:
    """A source of cases that lie in files, read when asked for; fulfils `jaxmed.types.Source`.

    No file stays open, so that threads and processes may read at the same time.

    Args:
        info: what is known of the set.
        cases: in the order of the rows.
        notes: what was odd.
        channels: convert images to this many channels; None keeps the files' own.
        read_mask: `(path, image, region) -> mask`, where the cases have masks.
    """

    def __init__(
        self,
        info: DatasetInfo,
        cases: Sequence[Case],
        *,
        notes: Iterable[str] = (),
        channels: int | None = None,
        read_mask: Callable[[Path, Image, Region | None], np.ndarray] | None = None,
    ):
        self.info = info
        self.ids: Sequence[str] = [case.id for case in cases]
        said = list(notes)
        self.notes: Sequence[str] = said
        self.parts: Mapping[str, Sequence[int]] = part_rows([case.part for case in cases])
        patients = [case.patient for case in cases]
        if not all(patients):
            stated = stated_patients([case.images[0] for case in cases], notes=said)
            patients = merged_patients(patients, stated)
        self.patients: Sequence[str] | None = known_patients(self.ids, patients, notes=said)
        labels = [case.label for case in cases]
        self.labels: Sequence[Any] | None = labels if labels and None not in labels else None
        self.cases = tuple(cases)
        self._channels = channels
        self._read_mask = read_mask

    def stamp(self) -> str:
        """A SHA-256 that changes with any file or label of any case, without reading the files."""
        stamps = (self.case_stamp(row) for row in range(len(self)))
        return hashlib.sha256("".join(stamps).encode()).hexdigest()

    def case_stamp(self, row: int) -> str:
        """A SHA-256 that changes with any file or label of this case, without reading the files."""
        case = self.cases[row]
        content = hashlib.sha256(repr((self.info, self._channels)).encode())
        places = [*case.images, *([] if case.mask is None else [case.mask])]
        # Of a series of slices each: a folder's time does not change with what is in its files.
        try:
            files = [(path.name, path.stat()) for place in places for path in image_files(place)]
            told = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
        except OSError:
            told = []  # gone, or a link to nowhere, as reading it will tell
        content.update(repr((case.id, told, case.label)).encode())
        for array in (case.boxes, case.box_label):
            content.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Example:
        return self.read(index)

    def read(self, index: int, region: Region | None = None) -> Example:
        """Read one case, or a region of it; see `jaxmed.types.Source`.

        Of formats that allow it, only the region is read and checked.

        Raises:
            UserError: if the files do not hold what the set promises.
            IndexError: if there is no such row.
            ValueError: if the region is empty, has steps or another number of axes.
        """
        return self.read_noted(index, region)[0]

    def read_noted(
        self, index: int, region: Region | None = None
    ) -> tuple[Example, tuple[str, ...]]:
        """What `read` gives, and what the readers of its image noted (`Image.notes`)."""
        row = row_number(index, len(self))
        case = self.cases[row]
        shape = None if region is None else _common_shape(case)
        image = read_channels(case.images, channels=self._channels, region=region)
        example = make_example(image.array, index=row, spacing=image.spacing)
        if case.label is not None:
            example["label"] = np.asarray(case.label, np.int32)
        if case.boxes is not None and case.box_label is not None:
            example["boxes"] = case.boxes.copy()
            example["box_label"] = case.box_label.copy()
        if case.mask is not None and self._read_mask is not None:
            example["mask"] = self._read_mask(case.mask, image, region)
        check_example(example, self.info, where=str(case.images[0]))
        if shape is not None and region is not None:
            example = _place(example, region, shape)
        return example, image.notes


def read_noted(source: Any, row: int) -> tuple[Example, tuple[str, ...]]:
    """One case of any data set, and what readers noted, which only those of files have."""
    if isinstance(source, FileSource):
        return source.read_noted(row)
    return source[row], ()


def make_example(image: np.ndarray, *, index: int, spacing: np.ndarray | None = None) -> Example:
    """The keys that every example has, of an image (*spatial, channels) in its file's own grid."""
    ndim = image.ndim - 1
    spacing = np.ones(ndim, np.float32) if spacing is None else spacing
    return {
        "image": image,
        "spacing": np.asarray(spacing, np.float32),
        "valid": np.asarray(1, np.float32),
        "index": np.asarray(index, np.int32),
        "shape": np.asarray(image.shape[:-1], np.int32),
        "scale": np.ones(ndim, np.float32),
        "offset": np.zeros(ndim, np.float32),
    }


def crop_example(example: Example, region: Region | None) -> Example:
    """Cut a region, one slice a spatial axis, out of an example in its file's own grid.

    Boxes are cut at the region's border and left out where nothing of them remains.

    Raises:
        ValueError: if the region has steps, or another number of axes, or is empty.
    """
    if region is None:
        return example
    shape = example["image"].shape[:-1]
    window = window_of(shape, region)
    cropped = {**example, "image": np.ascontiguousarray(example["image"][window])}
    if "mask" in example:
        cropped["mask"] = np.ascontiguousarray(example["mask"][window])
    return _place(cropped, window, shape)


def _common_shape(case: Case) -> tuple[int, ...]:
    """The spatial shape of all files of a case, from their headers; UserError if they differ."""
    first, *others = [*case.images, *([case.mask] if case.mask else [])]
    shape = image_shape(first)[:-1]
    for path in others:
        other = image_shape(path)[:-1]
        if other != shape:
            raise UserError(
                f"{path} has shape {other} and {first} has {shape}; they must be on the same grid"
            )
    return shape


def _place(example: Example, region: Region, shape: Sequence[int]) -> Example:
    """Shape, offset and boxes of an example whose image is a region of one of `shape`."""
    window = window_of(shape, region)
    low = np.array([part.start for part in window], np.float32)
    high = np.array([part.stop for part in window], np.float32)
    cropped = {**example, "shape": np.asarray(shape, np.int32)}
    cropped["offset"] = (example["offset"] - low).astype(np.float32)
    if "boxes" in example:
        corners = example["boxes"].reshape(-1, 2, len(shape))
        corners = np.clip(corners, low, high) - low
        kept = (corners[:, 1] > corners[:, 0]).all(axis=1)
        cropped["boxes"] = corners[kept].reshape(-1, 2 * len(shape)).astype(np.float32)
        cropped["box_label"] = example["box_label"][kept]
    return cropped


def read_channels(
    paths: Sequence[Path], *, channels: int | None, region: Region | None = None
) -> Image:
    """Read an image, or a region of it, whose channels may lie in several files on one grid.

    Raises:
        UserError: if a file cannot be read, or two are not on one grid.
    """
    only = channels if len(paths) == 1 else None
    images = [read_region(path, region, channels=only) for path in paths]
    first = images[0]
    if len(images) == 1:
        return first
    for path, image in zip(paths[1:], images[1:], strict=True):
        check_same_grid(path, image, paths[0], first)
    array = np.concatenate([image.array for image in images], axis=-1)
    notes = tuple(dict.fromkeys(note for image in images for note in image.notes))
    return dataclasses.replace(first, array=array, notes=notes)


def usual_kind(images: Sequence[Sequence[Path]], *, channels: int | None = None) -> tuple[int, int]:
    """Spatial axes and channels of most of some cases, by the headers of `LOOKED_AT` of them.

    Args:
        images: the files of each case, whose channels follow one another.
        channels: as single files will be converted to.

    Raises:
        UserError: of the first case looked at, if none can be read.
    """
    first: UserError | None = None
    seen: Counter[tuple[int, int]] = Counter()
    for paths in images[:: max(1, len(images) // LOOKED_AT)]:
        try:
            shapes = [image_shape(path) for path in paths]
        except UserError as error:
            first = first or error
            continue
        found = sum(shape[-1] for shape in shapes)
        if channels is not None and len(paths) == 1:
            found = channels
        seen[len(shapes[0]) - 1, found] += 1
    if not seen:
        raise first or ValueError("called with no case")
    return seen.most_common(1)[0][0]  # of as many of each, what came first


def check_same_grid(path: Path, image: Image, other_path: Path, other: Image) -> None:
    """Raise a UserError that names both files unless the images have one shape and one geometry.

    Geometries are compared where both files state one, to `FAR_APART` of a voxel.
    """
    shape, other_shape = image.array.shape[:-1], other.array.shape[:-1]
    if shape != other_shape:
        raise UserError(
            f"{path} has shape {shape} and {other_path} has {other_shape}; "
            "they must be on the same grid: resample one to the other"
        )
    voxels, words = distance(image.grid, other.grid)
    if voxels > FAR_APART:
        raise UserError(
            f"{path} and {other_path} have one shape but lie up to {voxels:.4g} voxels apart "
            f"({words}); resample one to the other, or mend its header"
        )


def row_number(index: int, count: int) -> int:
    """An index, possibly negative, as a row number from 0; IndexError if there is no such row."""
    row = int(index)
    if not -count <= row < count:
        raise IndexError(f"row {row} of a set of {count} cases")
    return row % count


def part_rows(parts: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each part, from the part of each row."""
    rows = {part: [row for row, name in enumerate(parts) if name == part] for part in PARTS}
    return {part: numbers for part, numbers in rows.items() if numbers}


def stated_patients(files: Sequence[Path], *, notes: list[str]) -> list[str]:
    """Digests of the patients that DICOM files name; "" for other files, and where all are one.

    Anonymised files often all name the same patient, who would be the whole set.
    """
    patients = [patient_digest(path) for path in files]
    if len(set(patients) - {""}) < 2:
        return [""] * len(files)
    notes.append("Patients are those that the DICOM files name.")
    return patients


def merged_patients(given: Sequence[str], stated: Sequence[str]) -> list[str]:
    """Patients that a manifest gives and, of all other cases, those that the files state.

    A patient whom the manifest names in one case is called so in all cases of the same files'
    patient.
    """
    called = {own: name for name, own in zip(given, stated, strict=True) if name and own}
    return [name or called.get(own, own) for name, own in zip(given, stated, strict=True)]


def known_patients(
    ids: Sequence[str], patients: Sequence[str], *, notes: list[str]
) -> list[str] | None:
    """Patients of a set, each unknown one taken as a patient of its own; None if all are unknown.

    Appends to `notes` how many are unknown.
    """
    if not any(patients):
        return None
    unknown = sum(not patient for patient in patients)
    if unknown:
        notes.append(f"{unknown} cases have no patient; each is taken as a patient of its own.")
    return [patient or case for case, patient in zip(ids, patients, strict=True)]


def make_ids(root: Path, files: Sequence[Path], *, stems: Sequence[str] | None = None) -> list[str]:
    """The stem of each file or, where stems clash, the path from `root`."""
    stems = stems if stems is not None else [image_stem(path) for path in files]
    seen = Counter(stems)
    return [
        stem if seen[stem] == 1 else path.relative_to(root).as_posix()
        for stem, path in zip(stems, files, strict=True)
    ]
