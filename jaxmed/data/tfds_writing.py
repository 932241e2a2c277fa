"""A set of cases written as a data set of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.sources.tfds import import_tfds
from jaxmed.types import DatasetInfo, Example, UserError

VERSION = "1.0.0"


def write_tfds(
    read: Callable[[int], Example],
    split: Mapping[str, Sequence[int]],
    ids: Sequence[str],
    info: DatasetInfo,
    folder: str | Path,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write each part as a split that `tfds.builder_from_directory` and `data.layout=tfds` read.

    An example has `id`, `image` and `spacing` (mm a voxel along each axis), and `label` (a
    classification), `objects` with `bbox` and `label` (a detection) or `mask` (a segmentation).

    Args:
        read: row -> case. A part is read a case at a time, so memory does not grow with the set.
        split: rows of each part.
        ids: of all rows.
        info: of the set.
        folder: a data_dir of TFDS; the set is in a folder of its name in it.
        progress: called with the number of cases written so far.

    Returns:
        The folder of the set.

    Raises:
        UserError: where the set is there already, has boxes in 3-D, which TFDS does not know, or
            cannot be written.
    """
    tfds = import_tfds()
    if info.task == "detection" and info.ndim == 3:
        raise UserError("TensorFlow Datasets has no boxes in 3-D; this set cannot be written")
    name = re.sub(r"\W+", "_", info.name.lower()).strip("_")
    name = name if name[:1].isalpha() else f"set_{name}"
    home = Path(folder) / name / VERSION
    if home.exists():
        raise UserError(f"{home}: is there already; remove it, or choose another folder")
    rows = {part: list(members) for part, members in split.items() if len(members)}
    first = read(next(iter(rows.values()))[0])
    done = 0

    def examples(part: str) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal done
        for number, row in enumerate(rows[part]):
            yield number, _stored(read(row), ids[row], info)
            done += 1
            progress(done)

    class Builder(  # type: ignore[call-arg]
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,
    ):
        """A set that jaxmed prepared."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(_features(tfds, first, info))
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                description=f"{info.name}: {info.task}, prepared by jaxmed.",
                citation=info.citation,
                license=info.licence or None,
                metadata=tfds.core.MetadataDict(
                    class_names=list(info.class_names), instances=info.instances
                ),
                disable_shuffling=True,  # which would hold a part in memory
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {part: examples(part) for part in rows}

        def _generate_examples(self) -> Any:  # the splits bring their own
            raise NotImplementedError

    Builder.name = name
    try:
        builder = Builder(data_dir=str(folder), file_format="array_record")
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of a download that is none
            builder.download_and_prepare()
    except OSError as error:
        raise UserError(
            f"{home}: cannot be written ({error}); check permission and space"
        ) from error
    finally:
        for draft in home.parent.glob(f"incomplete.*_{VERSION}*"):
            shutil.rmtree(draft, ignore_errors=True)
        for unused in ("downloads/extracted", "downloads"):
            with contextlib.suppress(OSError):  # it is not there, or holds something
                (Path(folder) / unused).rmdir()
    return home


def _features(tfds: Any, example: Example, info: DatasetInfo) -> dict[str, Any]:
    kinds = tfds.features
    free = (None,) * info.ndim
    image = example["image"]
    features = {
        "id": kinds.Text(),
        "image": kinds.Tensor(
            shape=(*free, image.shape[-1]), dtype=image.dtype.type, encoding="zlib"
        ),
        "spacing": kinds.Tensor(shape=(info.ndim,), dtype=np.float32),
    }
    names = kinds.ClassLabel(names=list(info.class_names))
    if info.task == "segmentation":
        features["mask"] = kinds.Tensor(shape=free, dtype=np.int32, encoding="zlib")
    elif info.task == "detection":
        features["objects"] = kinds.Sequence({"bbox": kinds.BBoxFeature(), "label": names})
    else:
        features["label"] = kinds.Sequence(names) if info.multilabel else names
    return features


def _stored(example: Example, name: str, info: DatasetInfo) -> dict[str, Any]:
    """A case as TFDS has it."""
    stored = {"id": name, "image": example["image"], "spacing": example["spacing"]}
    if info.task == "segmentation":
        return {**stored, "mask": example["mask"]}
    if info.task == "classification":
        label = example["label"]
        return {
            **stored,
            "label": np.flatnonzero(label).tolist() if info.multilabel else int(label),
        }
    # TFDS has (ymin, xmin, ymax, xmax) as fractions of the image.
    sides = np.tile(np.asarray(example["image"].shape[:-1], np.float64), 2)
    boxes = np.clip(example["boxes"] / sides, 0, 1)
    objects = [
        {"bbox": box, "label": int(label)}
        for box, label in zip(boxes, example["box_label"], strict=True)
    ]
    return {**stored, "objects": objects}
