"""TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxmed.data.sources.base import crop_example, make_example, part_rows, row_number
from jaxmed.data.sources.findings import part_name, some
from jaxmed.types import DatasetInfo, Example, Region, UserError, check_example

_MASK_KEYS = ("segmentation_mask", "segmentation", "mask")


class TFDS:
    """A data set of TensorFlow Datasets that is prepared as array_record; fulfils `types.Source`.

    The features say what it is for: a `ClassLabel` makes it classification; a sequence of
    objects with `bbox` and `label` detection, an image called `mask` or
    `segmentation_mask` segmentation.

    Args:
        path: the folder of a prepared data set, or the name of one, such as "bccd".
        data_dir: where data sets lie that are given by name; TFDS's own default if not given.
        download: download and prepare the data set if it is not there.
        class_names: of a mask, the background first, where the data set does not name them.
        image_key: the feature that is the image; by default `image`, or the only one of its kind.

    Raises:
        UserError: if TFDS is not installed, or the data set is not there or of no known kind.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        data_dir: str | Path | None = None,
        download: bool = False,
        class_names: Sequence[str] | None = None,
        image_key: str | None = None,
    ):
        tfds = import_tfds()
        builder = _open_builder(tfds, str(path), data_dir, download=download)
        self._where = str(builder.info.full_name)
        features = builder.info.features
        self._image_key = image_key or _find_image(tfds, features, self._where)
        told = dict(
            builder.info.metadata or {}
        )  # as `tfds_writing` leaves it; of others often none
        class_names = class_names or told.get("class_names")
        self._fields = _find_labels(tfds, features, self._image_key, class_names, self._where)
        self.notes: Sequence[str] = []
        names = {split: part_name(split) for split in builder.info.splits}
        used = [split for split, part in names.items() if part is not None]
        if not used:
            used = list(names)
        elif len(used) < len(names):
            self.notes = [f"Splits left out: {some([s for s in names if s not in used])}."]
        self._splits = [_data_source(builder, split, self._where) for split in used]
        sizes = [len(split) for split in self._splits]
        if not sum(sizes):
            raise UserError(f"{self._where}: holds no examples; prepare the data set again")
        rows = [(name, row) for name, size in zip(used, sizes, strict=True) for row in range(size)]
        self.ids: Sequence[str] = [f"{name}_{row:05d}" for name, row in rows]
        self.patients: Sequence[str] | None = None
        self.labels: Sequence[Any] | None = None  # known only by reading
        self.parts: Mapping[str, Sequence[int]] = part_rows([names[name] or "" for name, _ in rows])
        image = self._image(self._fetch(0))
        self.info = DatasetInfo(
            name=builder.info.name,
            task=self._fields.task,
            ndim=image.ndim - 1,
            channels=image.shape[-1],
            class_names=self._fields.class_names,
            multilabel=self._fields.multilabel,
            instances=bool(told.get("instances")),
            citation=" ".join((builder.info.citation or "").split()),
            licence=builder.info.redistribution_info.license,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return self.read(index)

    def read(self, index: int, region: Region | None = None) -> Example:
        """One example, or a region of it; see `jaxmed.types.Source`."""
        row = row_number(index, len(self))
        stored = self._fetch(row)
        example = make_example(self._image(stored), index=row, spacing=stored.get("spacing"))
        example.update(self._fields.read(stored, example["image"].shape[:-1]))
        check_example(example, self.info, where=f"{self._where} {self.ids[row]}")
        return crop_example(example, region)

    def _fetch(self, row: int) -> Any:
        for split in self._splits:
            if row < len(split):
                return split[row]
            row -= len(split)
        raise IndexError(row)

    def _image(self, stored: Any) -> np.ndarray:
        """(*spatial, channels) of uint8, int16 or float32."""
        array = np.asarray(stored[self._image_key])
        # What `tfds_writing` wrote has channels, and tells its axes; of others they are guessed.
        is_ours = "spacing" in stored and len(stored["spacing"]) == array.ndim - 1
        if not is_ours and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] > 4)):
            array = array[..., None]
        if array.dtype == bool:
            return array.astype(np.uint8)
        for dtype in (np.uint8, np.int16):
            if np.can_cast(array.dtype, dtype):
                return array.astype(dtype)
        return array.astype(np.float32)


class _Fields:
    """Which features hold the labels, and how to read them."""

    def __init__(
        self, task: str, key: str, class_names: Sequence[str], *, multilabel: bool = False
    ):
        self.task, self.key, self.multilabel = task, key, multilabel
        self.class_names = tuple(class_names)

    def read(self, stored: Any, shape: tuple[int, ...]) -> Example:
        """The label keys of an example."""
        value = stored[self.key]
        if self.task == "segmentation":
            mask = np.asarray(value)
            return {"mask": (mask[..., 0] if mask.ndim > len(shape) else mask).astype(np.int32)}
        if self.task == "detection":
            # TFDS stores (ymin, xmin, ymax, xmax) as fractions of the image.
            boxes = np.asarray(value["bbox"], np.float32).reshape(-1, 4)
            labels = np.asarray(value["label"], np.int32).reshape(-1)
            return {"boxes": boxes * np.array([*shape, *shape], np.float32), "box_label": labels}
        if self.multilabel:
            label = np.zeros(len(self.class_names), np.int32)
            label[np.asarray(value, np.int64)] = 1
            return {"label": label}
        return {"label": np.asarray(value, np.int32)}


def import_tfds() -> ModuleType:
    """TensorFlow Datasets, which takes seconds to load, or a UserError that says how to have it."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"TensorFlow Datasets is not installed ({error}); install jaxmed anew"
        ) from error
    return tensorflow_datasets


def _open_builder(
    tfds: ModuleType, path: str, data_dir: str | Path | None, *, download: bool
) -> Any:
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            # NAME/ holds one folder a version: take the newest.
            versions = [path.parent for path in folder.glob("*/features.json")]
            newest = max(versions, key=lambda version: _numbers(version.name), default=folder)
            return tfds.builder_from_directory(newest)
        builder = tfds.builder(
            path,
            data_dir=None if data_dir is None else str(data_dir),
            file_format="array_record",
        )
        if download:
            builder.download_and_prepare(file_format="array_record")
    # TFDS raises errors of many types, from its registry to the network.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: no data set of TensorFlow Datasets can be opened ({type(error).__name__}: "
            f"{said}); give a prepared folder or a known name"
        ) from error
    if not builder.info.splits:
        raise UserError(
            f"{path}: is not prepared in {builder.data_dir}; set --config.data.download=true"
        )
    return builder


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _data_source(builder: Any, split: str, where: str) -> Any:
    try:
        return builder.as_data_source(split)
    except (NotImplementedError, ImportError, OSError, ValueError) as error:
        raise UserError(
            f"{where}: cannot be read at random ({' '.join(str(error).split())[:200]}); prepare it "
            "with file_format='array_record'"
        ) from error


def _find_image(tfds: ModuleType, features: Any, where: str) -> str:
    if "image" in features:
        return "image"
    kinds = (tfds.features.Image, tfds.features.Tensor)
    found = [
        key
        for key, feature in features.items()
        if isinstance(feature, kinds) and len(feature.shape or ()) > 1 and key not in _MASK_KEYS
    ]
    if len(found) == 1:
        return found[0]
    raise UserError(f"{where}: has the features {', '.join(features)}; say which is the image_key")


def _find_labels(
    tfds: ModuleType,
    features: Any,
    image_key: str,
    class_names: Sequence[str] | None,
    where: str,
) -> _Fields:
    kinds = tfds.features
    for key, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(inner, kinds.FeaturesDict) and {"bbox", "label"} <= set(inner):
            return _Fields("detection", key, class_names or inner["label"].names)
    for key in _MASK_KEYS:
        if key in features and key != image_key:
            if not class_names or class_names[0] != "background":
                raise UserError(
                    f"{where}: name the classes of {key} (class_names), background first"
                )
            return _Fields("segmentation", key, class_names)
    for key, feature in features.items():
        if isinstance(feature, kinds.ClassLabel):
            return _Fields("classification", key, class_names or feature.names)
        inner = getattr(feature, "feature", None)
        if isinstance(inner, kinds.ClassLabel):
            return _Fields("classification", key, class_names or inner.names, multilabel=True)
    raise UserError(
        f"{where}: the features {', '.join(features)} hold no class label, boxes or mask"
    )
