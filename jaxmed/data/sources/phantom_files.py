"""Write phantoms to disk in the layouts of real data sets, to try these out and to test them."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import nibabel
import numpy as np

from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.types import Example, UserError

_TASKS = {
    "class_folders": "classification",
    "pairs": "segmentation",
    "voc": "detection",
    "coco": "detection",
    "msd": "segmentation",
    "medmnist": "classification",
}
_FLAT = ("voc", "coco")  # layouts that know no volumes


def write_phantoms(
    folder: str | Path,
    *,
    layout: str,
    kind: str = "cells",
    ndim: int | None = None,
    size: int | Sequence[int] = 64,
    count: int = 20,
    seed: int = 0,
    instances: bool = False,
    parts: bool = True,
) -> Phantoms:
    """Write a small data set of phantoms as real ones lie on disk.

    2-D images become PNG (of the body through a soft-tissue window, 8 bits), volumes NIfTI in RAS
    order with their spacing. Numbers of classes and boxes lose nothing.

    Args:
        folder: where to write to; made if missing. An npz file called phantoms.npz for medmnist.
        layout: "class_folders", "pairs", "voc", "coco", "msd" or "medmnist".
        kind: of phantom, "cells" or "body".
        ndim: 2 or 3; 3 for msd, else 2, where not given.
        size: voxels along every axis, or one number an axis.
        count: number of images.
        seed: of the phantoms.
        instances: pairs with masks of instance numbers.
        parts: write which part an image is in, in the layout's own way.

    Returns:
        The source that was written, in the order of its rows.

    Raises:
        UserError: if the layout is unknown or cannot hold such phantoms.
    """
    if layout not in _TASKS:
        raise UserError(f"layout is {layout!r}; expected one of {', '.join(_TASKS)}")
    ndim = ndim or (3 if layout == "msd" else 2)
    if ndim == 3 and layout in _FLAT:
        raise UserError(f"ndim is 3; the layout {layout} holds 2-D images only")
    if instances and layout != "pairs":
        raise UserError(f"instances is set; the layout {layout} knows none, pairs does")
    source = Phantoms(
        kind,
        task=_TASKS[layout],
        ndim=ndim,
        size=size,
        count=count,
        seed=seed,
        instances=instances,
    )
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    write: dict[str, Callable[[Path, Phantoms, dict[int, str]], None]] = {
        "class_folders": _write_class_folders,
        "pairs": _write_pairs,
        "voc": _write_voc,
        "coco": _write_coco,
        "msd": _write_msd,
        "medmnist": _write_medmnist,
    }
    known = {row: part for part, rows in source.parts.items() for row in rows} if parts else {}
    write[layout](root, source, known)
    return source


def _picture(example: Example) -> np.ndarray:
    """(*spatial,) uint8; Hounsfield units through a soft-tissue window, -160 to 240."""
    image = example["image"][..., 0]
    if image.dtype == np.uint8:
        return image
    return np.clip(np.rint((image + 160.0) * (255 / 400)), 0, 255).astype(np.uint8)


def _write_image(stem: Path, array: np.ndarray, spacing: np.ndarray) -> Path:
    """Write stem.png, or stem.nii.gz with RAS axes; returns the path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 2:
        path = stem.with_name(stem.name + ".png")
        imageio.imwrite(path, array)
        return path
    path = stem.with_name(stem.name + ".nii.gz")
    affine = np.diag([*spacing.astype(float), 1.0])
    nibabel.Nifti1Image(array, affine).to_filename(str(path))
    return path


def _write_example(stem: Path, example: Example) -> Path:
    """Write the image of an example, volumes with their own values."""
    volume = example["image"].ndim == 4
    array = example["image"][..., 0] if volume else _picture(example)
    return _write_image(stem, array, example["spacing"])


def _write_table(
    path: Path, source: Phantoms, first: str, names: Sequence[str], known: dict[int, str]
) -> None:
    """A manifest with the columns that are known: first, split, patient."""
    columns: dict[str, Sequence[str]] = {first: names}
    if known:
        columns["split"] = [known[row] for row in range(len(source))]
    if source.patients is not None:
        columns["patient"] = source.patients
    if len(columns) == 1:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_class_folders(root: Path, source: Phantoms, known: dict[int, str]) -> None:
    names = []
    for row in range(len(source)):
        example = source[row]
        name = source.info.class_names[int(example["label"])].replace(" ", "_")
        path = _write_example(root / known.get(row, "") / name / source.ids[row], example)
        names.append(path.relative_to(root).as_posix())
    if source.patients is not None:
        _write_table(root / "manifest.csv", source, "file", names, known)


def _write_pairs(root: Path, source: Phantoms, known: dict[int, str]) -> None:
    for row in range(len(source)):
        example = source[row]
        _write_example(root / "images" / source.ids[row], example)
        kind = np.uint16 if source.info.instances else np.uint8
        mask = example["mask"].astype(kind)
        _write_image(root / "masks" / source.ids[row], mask, example["spacing"])
    if not source.info.instances:
        text = "\n".join(source.info.class_names) + "\n"
        (root / "classes.txt").write_text(text, encoding="utf-8")
    _write_table(root / "manifest.csv", source, "id", source.ids, known)


def _write_voc(root: Path, source: Phantoms, known: dict[int, str]) -> None:
    annotations = root / "Annotations"
    annotations.mkdir(exist_ok=True)
    for row in range(len(source)):
        example = source[row]
        path = _write_example(root / "JPEGImages" / source.ids[row], example)
        top = ElementTree.Element("annotation")
        ElementTree.SubElement(top, "filename").text = path.name
        size = ElementTree.SubElement(top, "size")
        height, width = example["shape"].tolist()
        for key, number in (("width", width), ("height", height), ("depth", 1)):
            ElementTree.SubElement(size, key).text = str(number)
        for box, label in zip(example["boxes"], example["box_label"], strict=True):
            thing = ElementTree.SubElement(top, "object")
            ElementTree.SubElement(thing, "name").text = source.info.class_names[int(label)]
            ElementTree.SubElement(thing, "difficult").text = "0"
            bounds = ElementTree.SubElement(thing, "bndbox")
            low_row, low_col, high_row, high_col = (int(v) for v in box)
            # VOC counts from 1 and includes the last pixel.
            corners = {"xmin": low_col + 1, "ymin": low_row + 1, "xmax": high_col, "ymax": high_row}
            for key, number in corners.items():
                ElementTree.SubElement(bounds, key).text = str(number)
        ElementTree.indent(top)
        tree = ElementTree.ElementTree(top)
        tree.write(annotations / f"{source.ids[row]}.xml", encoding="utf-8")
    for part in sorted(set(known.values())):
        path = root / "ImageSets" / "Main" / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(source.ids[row] for row in source.parts[part]) + "\n")
    if source.patients is not None:
        _write_table(root / "manifest.csv", source, "id", source.ids, known)


def _write_coco(root: Path, source: Phantoms, known: dict[int, str]) -> None:
    names = source.info.class_names
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    tables: dict[str, dict[str, Any]] = {}
    for row in range(len(source)):
        part, example = known.get(row, ""), source[row]
        path = _write_example(root / "images" / part / source.ids[row], example)
        table = tables.setdefault(part, {"images": [], "annotations": [], "categories": categories})
        height, width = example["shape"].tolist()
        table["images"].append(
            {"id": row + 1, "file_name": path.name, "width": width, "height": height}
        )
        for box, label in zip(example["boxes"].tolist(), example["box_label"], strict=True):
            rows, cols = box[2] - box[0], box[3] - box[1]
            table["annotations"].append(
                {
                    "id": len(table["annotations"]) + 1,
                    "image_id": row + 1,
                    "category_id": int(label) + 1,
                    "bbox": [box[1], box[0], cols, rows],
                    "area": rows * cols,
                    "iscrowd": 0,
                }
            )
    for part, table in tables.items():
        _write_json(root / "annotations" / f"instances_{part or 'all'}.json", table)
    if source.patients is not None:
        _write_table(root / "manifest.csv", source, "id", source.ids, known)


def _write_msd(root: Path, source: Phantoms, known: dict[int, str]) -> None:
    listed = []
    for row in range(len(source)):
        name, example = source.ids[row], source[row]
        image = _write_example(root / "imagesTr" / name, example)
        mask = example["mask"].astype(np.uint8)
        label = _write_image(root / "labelsTr" / name, mask, example["spacing"])
        listed.append({"image": f"./imagesTr/{image.name}", "label": f"./labelsTr/{label.name}"})
    content = {
        "name": source.info.name,
        "licence": source.info.licence,
        "modality": {"0": "CT" if source.ids[0].startswith("body") else "microscopy"},
        "labels": {str(number): name for number, name in enumerate(source.info.class_names)},
        "numTraining": len(listed),
        "numTest": 0,
        "training": listed,
        "test": [],
    }
    _write_json(root / "dataset.json", content)
    _write_table(root / "split.csv", source, "id", source.ids, known)


def _write_medmnist(root: Path, source: Phantoms, known: dict[int, str]) -> None:
    parts = source.parts if known else {"train": range(len(source))}
    arrays: dict[str, np.ndarray] = {}
    for part, rows in parts.items():
        examples = [source[row] for row in rows]
        arrays[f"{part}_images"] = np.stack([_picture(example) for example in examples])
        labels = np.array([[int(example["label"])] for example in examples], np.uint8)
        arrays[f"{part}_labels"] = labels
    with (root / "phantoms.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
