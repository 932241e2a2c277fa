"""MedMNIST: npz files of small images with `{train,val,test}_{images,labels}`."""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmed.data.manifest import Entry, read_entries
from jaxmed.data.sources.base import (
    crop_example,
    known_patients,
    make_example,
    part_rows,
    row_number,
)
from jaxmed.data.sources.download import fetch
from jaxmed.data.sources.findings import PARTS, Findings, some
from jaxmed.data.sources.layouts import guess_layout, wrong_layout
from jaxmed.data.sources.medmnist_sets import CITATION, MEDMNIST_SETS, URL, MedMNISTSet
from jaxmed.types import DatasetInfo, Example, Region, UserError, check_example

_KEYS = "train_images, train_labels and the same for val and test"


class MedMNIST:
    """A set of MedMNIST v2, or one's own npz file with the same keys; fulfils `types.Source`.

    Labels are (N,) or (N, 1) class numbers, or (N, classes) of 0 and 1 for multi-label. Images are
    (N, rows, cols), with a last axis of channels or without; the 3-D sets are (N, D, H, W), whose
    axes stay as they are stored, since the files do not say which way is up. Spacing is 1.

    Args:
        path: the npz file, or the folder that holds `NAME.npz`.
        name: one of the 18 sets, such as "pneumoniamnist"; by default read off the file's name.
            Of any other name, classes are numbered.
        class_names: instead of the set's own.
        download: fetch the file (28 pixels a side) into the folder if it is not there.

    Raises:
        UserError: if there is no such file, or its content is not as described.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        class_names: Sequence[str] | None = None,
        download: bool = False,
    ):
        file = _find_file(Path(path).expanduser(), name, download=download)
        self._file = file
        self._lock = threading.Lock()
        self._arrays: tuple[np.ndarray, ...] | None = None
        known = MEDMNIST_SETS.get(name or re.sub(r"_(28|64|128|224)$", "", file.stem.lower()))
        findings = Findings(file)
        stored = _load(file)
        parts = [part for part in PARTS if f"{part}_images" in stored]
        labels = _checked_labels(stored, parts, findings)
        ndim, channels = _image_layout(stored, parts, known, findings)
        findings.finish()
        self._ndim, self._part_names = ndim, parts
        self.labels, multilabel = _class_labels(labels, known, findings)
        names = _class_names(self.labels, known, class_names, multilabel, file)
        self.info = DatasetInfo(
            name=name or file.stem,
            task="classification",
            ndim=ndim,
            channels=channels,
            class_names=names,
            kind=known.kind if known else "",
            multilabel=multilabel,
            licence=known.licence if known else "",
            citation=CITATION if known else "",
        )
        self._sizes = [len(stored[f"{part}_images"]) for part in parts]
        self._name_rows(findings)
        self._keep(stored)

    def _name_rows(self, findings: Findings) -> None:
        """Set ids, parts and patients; a manifest beside the file may add to them."""
        stored = [
            (number, place) for number, size in enumerate(self._sizes) for place in range(size)
        ]
        ids = [f"{self._part_names[number]}_{place:05d}" for number, place in stored]
        entries = read_entries(
            self._file.parent, files=[()] * len(ids), stems=ids, findings=findings
        ) or [Entry()] * len(ids)
        findings.finish()
        used = [row for row, entry in enumerate(entries) if entry.used]
        self.ids: Sequence[str] = [ids[row] for row in used]
        self.labels = self.labels[used]
        self._places = [stored[row] for row in used]  # number of the array, and where in it
        parts = [entries[row].part or self._part_names[stored[row][0]] for row in used]
        patients = [entries[row].patient for row in used]
        self.notes: Sequence[str] = findings.notes
        self.parts: Mapping[str, Sequence[int]] = part_rows(parts)
        self.patients: Sequence[str] | None = known_patients(
            self.ids, patients, notes=findings.notes
        )

    def _keep(self, stored: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        arrays = tuple(
            _as_images(stored[f"{part}_images"], self._ndim) for part in self._part_names
        )
        self._arrays = arrays
        return arrays

    def __getstate__(self) -> dict:
        # Worker processes read the file themselves instead of being sent all images.
        return {**self.__dict__, "_arrays": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.read(index)

    def read(self, index: int, region: Region | None = None) -> Example:
        """One image and its label, or a region of it; see `jaxmed.types.Source`."""
        row = row_number(index, len(self))
        with self._lock:
            arrays = self._arrays or self._keep(_load(self._file))
        number, place = self._places[row]
        example = make_example(arrays[number][place].copy(), index=row)
        example["label"] = np.array(self.labels[row], np.int32)
        check_example(example, self.info, where=f"{self._file} {self.ids[row]}")
        return crop_example(example, region)


def _find_file(path: Path, name: str | None, *, download: bool) -> Path:
    if name is not None and name not in MEDMNIST_SETS and download:
        raise UserError(f"name is {name!r}; expected one of {', '.join(MEDMNIST_SETS)}")
    if path.suffix.lower() == ".npz":
        name = name or (path.stem if path.stem in MEDMNIST_SETS else None)
        file: Path | None = path
    elif name is not None:
        file = path / f"{name}.npz"
    else:
        found = sorted(path.glob("*.npz")) if path.is_dir() else []
        if len(found) > 1:
            raise UserError(f"{path}: holds {some([f.name for f in found])}; say which one (name)")
        file = found[0] if found else None
    if file is not None and file.is_file():
        return file
    if path.is_dir() and guess_layout(path) not in ("MedMNIST", None):
        raise wrong_layout(path, layout="MedMNIST", expected=f"an npz file with {_KEYS}")
    if file is None or name not in MEDMNIST_SETS:
        raise UserError(
            f"{file or path}: no npz file; give one with the keys {_KEYS}, or the name of a set of "
            f"MedMNIST: {', '.join(MEDMNIST_SETS)}"
        )
    if not download:
        raise UserError(
            f"{file}: no such file; set --config.data.download=true, or put there what "
            f"{URL.format(name=name)} gives"
        )
    return fetch(URL.format(name=name), file, md5=MEDMNIST_SETS[name].md5)


def _load(file: Path) -> dict[str, np.ndarray]:
    """The arrays of the parts that are there."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            keys = {f"{part}_{what}" for part in PARTS for what in ("images", "labels")}
            found = {key: stored[key] for key in keys & set(stored.files)}
            names = sorted(stored.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(
            f"{file}: cannot be read as npz ({error}); the download may have been cut short"
        ) from error
    if "train_images" not in found:
        raise UserError(
            f"{file}: holds the keys {some(names, 8) or 'of nothing'}; expected {_KEYS}"
        )
    return found


def _checked_labels(
    stored: Mapping[str, np.ndarray], parts: Sequence[str], findings: Findings
) -> np.ndarray:
    """The labels of all parts, (N, columns) int64."""
    columns, problems = [], findings.problems
    for part in parts:
        labels, images = stored.get(f"{part}_labels"), stored[f"{part}_images"]
        if labels is None:
            problems.append(f"{part}_labels is missing")
        elif labels.ndim not in (1, 2) or len(labels) != len(images):
            problems.append(
                f"{part}_labels has shape {labels.shape} for {len(images)} images; "
                "expected (N,), (N, 1) or (N, classes)"
            )
        elif labels.dtype.kind not in "biuf" or (labels != np.floor(labels)).any():
            problems.append(f"{part}_labels of type {labels.dtype} are no whole numbers")
        elif len(labels) and labels.min() < 0:
            problems.append(f"{part}_labels holds {labels.min()}; class numbers start at 0")
        else:
            columns.append(labels.reshape(len(labels), -1).astype(np.int64))
    if len({array.shape[1] for array in columns}) > 1:
        problems.append("the labels of the parts have different numbers of columns")
    findings.finish()
    return np.concatenate(columns)


def _image_layout(
    stored: Mapping[str, np.ndarray],
    parts: Sequence[str],
    known: MedMNISTSet | None,
    findings: Findings,
) -> tuple[int, int]:
    """Number of spatial axes and of channels."""
    arrays = [stored[f"{part}_images"] for part in parts]
    shape = arrays[0].shape
    if len(shape) not in (3, 4, 5) or arrays[0].dtype.kind not in "biuf":
        findings.problems.append(
            f"train_images has shape {shape} and type {arrays[0].dtype}; expected numbers "
            "(N, rows, cols), (N, rows, cols, channels) or (N, D, H, W)"
        )
        return 2, 1
    for part, array in zip(parts, arrays, strict=True):
        if array.shape[1:] != shape[1:] or array.dtype != arrays[0].dtype:
            findings.problems.append(
                f"{part}_images has shape {array.shape} and type {array.dtype}, train_images "
                f"{shape} and {arrays[0].dtype}"
            )
    if known is not None:
        ndim = known.ndim
    elif len(shape) == 4:
        ndim = 2 if shape[-1] in (1, 3) else 3
    else:
        ndim = 2 if len(shape) == 3 else 3
    if len(shape) not in (ndim + 1, ndim + 2):
        findings.problems.append(
            f"train_images has shape {shape}; this set has {ndim} spatial axes"
        )
    if ndim == 3:
        findings.notes.append(
            "The axes of the volumes are kept as stored, and spacing is taken as 1."
        )
    return ndim, shape[-1] if len(shape) == ndim + 2 else 1


def _as_images(array: np.ndarray, ndim: int) -> np.ndarray:
    """Images (N, *spatial, channels) of uint8, int16 or float32."""
    if array.ndim == ndim + 1:
        array = array[..., None]
    if array.dtype == bool:
        return array.astype(np.uint8)
    for dtype in (np.uint8, np.int16):
        if np.can_cast(array.dtype, dtype):
            return array.astype(dtype, copy=False)
    return array.astype(np.float32, copy=False)


def _class_labels(
    labels: np.ndarray, known: MedMNISTSet | None, findings: Findings
) -> tuple[np.ndarray, bool]:
    """Labels (N,) or (N, classes) int32, and whether several classes may hold at once."""
    if labels.shape[1] == 1:
        return labels[:, 0].astype(np.int32), False
    if labels.max(initial=0) > 1:
        findings.problems.append(
            f"labels have {labels.shape[1]} columns and values up to {labels.max()}; several "
            "columns are of 0 and 1, one a class"
        )
        findings.finish()
    if known is None and (labels.sum(axis=1) == 1).all():
        findings.notes.append("Every row of the labels has one 1: taken for one class an image.")
        return labels.argmax(axis=1).astype(np.int32), False
    return labels.astype(np.int32), True


def _class_names(
    labels: np.ndarray,
    known: MedMNISTSet | None,
    given: Sequence[str] | None,
    multilabel: bool,
    file: Path,
) -> tuple[str, ...]:
    count = labels.shape[1] if multilabel else int(labels.max(initial=0)) + 1
    names = tuple(given or (known.class_names if known else map(str, range(max(count, 2)))))
    if count > len(names) or (multilabel and count != len(names)):
        raise UserError(
            f"{file}: labels are of {count} classes, class names of {len(names)}: "
            f"{some(names, 20)}; mend the labels or give class_names"
        )
    return names
