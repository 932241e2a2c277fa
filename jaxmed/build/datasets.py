"""Open a data set, and look through it before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.config import choose
from jaxmed.data.quality import duplicate_notes, look_through
from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.coco import Coco
from jaxmed.data.sources.findings import DataError, Findings
from jaxmed.data.sources.medmnist import MedMNIST
from jaxmed.data.sources.msd import Decathlon
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.data.sources.tfds import TFDS
from jaxmed.data.sources.voc import PascalVOC
from jaxmed.types import Source, UserError

SOURCES: dict[str, Callable[..., Source]] = {
    "phantoms": lambda data, task: Phantoms(
        data.kind,
        task=task,
        ndim=data.ndim,
        size=tuple(data.extent) if len(data.extent) > 1 else data.extent[0],
        count=data.count,
        instances=data.masks == "instance",
    ),
    "class_folders": lambda data, task: ClassFolders(
        data.path, label_column=data.label_column, **_conversion(data)
    ),
    "medmnist": lambda data, task: MedMNIST(
        data.path or "data",
        name=data.name or None,
        class_names=tuple(data.class_names) or None,
        download=data.download,
    ),
    "voc": lambda data, task: PascalVOC(data.path, invalid=data.invalid, **_conversion(data)),
    "coco": lambda data, task: Coco(data.path, invalid=data.invalid, **_conversion(data)),
    "pairs": lambda data, task: ImageMaskPairs(
        data.path, masks=data.masks, invalid=data.invalid, **_conversion(data)
    ),
    "msd": lambda data, task: Decathlon(data.path, invalid=data.invalid),
    "tfds": lambda data, task: TFDS(
        data.name or data.path,
        data_dir=data.path or None,
        download=data.download,
        class_names=tuple(data.class_names) or None,
    ),
}


def _conversion(data: ConfigDict) -> dict[str, Any]:
    """What the data do not say themselves, where the config does."""
    return {"class_names": tuple(data.class_names) or None, "channels": data.channels or None}


CONFIG_VERBS = {"classification": "classify", "detection": "detect", "segmentation": "segment"}


def make_source(config: ConfigDict) -> Source:
    """Open the data set.

    Raises:
        UserError: where the layout is unknown, the path wrong, or the data are broken.
    """
    data = config.data
    make = choose(SOURCES, data.layout, key="data.layout")
    for key, choices in (("masks", ("semantic", "instance")), ("invalid", ("error", "drop"))):
        choose(dict.fromkeys(choices), data[key], key=f"data.{key}")
    if data.layout == "phantoms" and len(data.extent) not in (1, data.ndim):
        raise UserError(f"data.extent is {data.extent}; expected one side, or {data.ndim}")
    if data.layout not in ("phantoms", "medmnist", "tfds") and not data.path:
        raise UserError("data.path is empty; give --config.data.path=FOLDER of the images")
    source = make(data, config.task)
    if source.info.task != config.task:
        raise UserError(
            f"data.path={data.path or data.name}: is a set for {source.info.task}, the config is "
            f"for {config.task}; use a config named {CONFIG_VERBS[source.info.task]}_*"
        )
    return source


def look_further(config: ConfigDict, source_error: DataError) -> DataError:
    """What is wrong with a data set, where opening it failed already: with that, all broken files.

    So that the user can mend everything at once, and not the headers first and then the pixels.
    """
    lenient = config.copy_and_resolve_references()
    lenient.data.invalid = "drop"
    try:
        source = make_source(lenient)
    except UserError:
        return source_error
    broken, _ = look_through(source, range(len(source)))
    findings = Findings(Path(config.data.path), invalid=[*source_error.problems, *broken.values()])
    try:
        findings.finish()
    except DataError as error:
        return error
    return source_error


def look_through_data(
    config: ConfigDict,
    source: Source,
    split: Mapping[str, Sequence[int]],
    *,
    check: Callable[[np.ndarray, str], None] | None = None,
) -> tuple[dict[str, list[int]], list[str]]:
    """The split without the cases that cannot be used, and notes on these and on doubles.

    Args:
        config: resolved or not.
        source: the data set.
        split: rows of each part.
        check: see `look_through`.

    Raises:
        UserError: listing all broken cases, unless data.invalid is "drop"; or where a part that had
            cases has none left.
    """
    if isinstance(source, Phantoms):
        return {part: list(rows) for part, rows in split.items()}, []
    rows = sorted({row for members in split.values() for row in members})
    broken, digests = look_through(source, rows, check=check)
    findings = Findings(Path(config.data.path), invalid=list(broken.values()))
    findings.finish(policy=config.data.invalid)
    usable = {part: [r for r in rows if r not in broken] for part, rows in split.items()}
    for part, members in split.items():
        if members and not usable[part]:
            raise UserError(f"{config.data.path}: no case of {part} can be used; mend the files")
    notes = [*findings.notes, *duplicate_notes(digests, usable, source.labels)]
    for note in notes:
        print(f"data: {note}")
    return usable, notes


def check_classes_left(
    config: ConfigDict,
    source: Source,
    split: Mapping[str, Sequence[int]],
    usable: Mapping[str, Sequence[int]],
) -> None:
    """Refuse to train where leaving cases out left a class without any."""
    if source.labels is None or source.info.multilabel:
        return
    before, after = (
        {int(source.labels[row]) for row in parts.get("train", ())} for parts in (split, usable)
    )
    gone = [source.info.class_names[label] for label in sorted(before - after)]
    if gone:
        raise UserError(
            f"{config.data.path}: leaving out what is broken leaves no training case of "
            f"{', '.join(gone)}; mend the files (see without --config.data.invalid=drop what is "
            "wrong)"
        )
