"""Pascal VOC: one XML file of boxes beside each image."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmed.data.images import image_stem, list_images
from jaxmed.data.manifest import Entry, read_entries
from jaxmed.data.sources.base import Case, FileSource
from jaxmed.data.sources.findings import Findings, one_a_key, part_name
from jaxmed.data.sources.layouts import open_folder, wrong_layout
from jaxmed.data.sources.objects import (
    Object,
    choose_classes,
    detection_info,
    header_shape,
    note_cut_boxes,
    pack_boxes,
    usable_objects,
)
from jaxmed.types import UserError

_LAYOUT = "Pascal VOC"
_EXPECTED = "JPEGImages/, Annotations/*.xml and, for given parts, ImageSets/Main/{train,val}.txt"
_CORNERS = ("ymin", "xmin", "ymax", "xmax")


class PascalVOC(FileSource):
    """Pictures in `JPEGImages/` with boxes in `Annotations/*.xml`.

    Parts are those of `ImageSets/Main/{train,val,test,trainval}.txt`; pictures that these leave out
    are left out here too. VOC counts pixels from 1 and includes the last one, so that minima lose
    1 to become half-open. Objects marked as difficult are kept.

    Args:
        path: the folder.
        invalid: "error", or "drop" to leave out what is wrong and count it in the notes: boxes
            without area or outside their image, pictures without annotation and the reverse.
        box_minimum: smallest `xmax - xmin` and `ymax - ymin`, in the file's own numbers, of a sound
            box. Read to the letter a VOC box with equal corners is one pixel, but tools write
            such boxes for none.
        class_names: the classes in the order of their numbers; sorted names where not given.
        channels: convert images to this many channels; None keeps the files' own.
        kind: where the images come from, such as "microscopy".

    Raises:
        UserError: if the folder is of another layout or annotations are wrong.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        invalid: str = "error",
        box_minimum: int | float = 1,
        class_names: Sequence[str] | None = None,
        channels: int | None = None,
        kind: str = "",
    ):
        root = open_folder(path, layout=_LAYOUT)
        if not (root / "JPEGImages").is_dir() or not (root / "Annotations").is_dir():
            raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
        findings = Findings(root)
        cases, objects = _read_pairs(root, float(box_minimum), findings)
        found = sorted({thing.name for things in objects for thing in things})
        every = [thing for things in objects for thing in things]
        names = choose_classes(found, class_names, every, findings)
        findings.finish(policy=invalid)
        packed = []
        for case, things in zip(cases, objects, strict=True):
            boxes, labels = pack_boxes([t for t in things if t.name in names], names)
            packed.append(dataclasses.replace(case, boxes=boxes, box_label=labels))
        info = detection_info(root, packed, names, channels, kind)
        super().__init__(info, packed, notes=findings.notes, channels=channels)


def _read_pairs(
    root: Path, box_minimum: float, findings: Findings
) -> tuple[list[Case], list[list[Object]]]:
    """The cases, still without boxes, and the sound objects of each."""
    images = one_a_key(
        list_images(root / "JPEGImages"), image_stem, what="images", findings=findings
    )
    files = {path.stem: path for path in sorted((root / "Annotations").glob("*.xml"))}
    parts = _read_parts(root, findings)
    stems = _complete(images, files, list(parts) or sorted({*images, *files}), findings)
    entries = read_entries(
        root, files=[[images[stem]] for stem in stems], stems=stems, findings=findings
    )
    known = entries or [Entry()] * len(stems)
    cases, objects, difficult, cut = [], [], 0, 0
    for stem, entry in zip(stems, known, strict=True):
        if not entry.used:
            continue
        shape = header_shape(images[stem], findings)
        annotation = _read_annotation(files[stem], box_minimum, findings)
        if shape is None or annotation is None:
            continue
        stated, things, hard = annotation
        if stated is not None and stated != shape:
            findings.invalid.append(
                f"{files[stem].name}: size is {stated[1]}x{stated[0]}, that of "
                f"{images[stem].name} is {shape[1]}x{shape[0]} (width x height)"
            )
            continue
        usable = usable_objects(things, shape, findings)
        before = {thing.box for thing in things}
        cut += sum(thing.box not in before for thing in usable)
        difficult += hard
        part = entry.part or parts.get(stem, "")
        cases.append(Case(id=stem, images=(images[stem],), part=part, patient=entry.patient))
        objects.append(usable)
    if difficult:
        findings.notes.append(f"{difficult} objects are marked as difficult and are kept.")
    note_cut_boxes(cut, findings)
    return cases, objects


def _complete(
    images: Mapping[str, Path],
    files: Mapping[str, Path],
    wanted: Sequence[str],
    findings: Findings,
) -> list[str]:
    """The wanted stems that have both an image and an annotation."""
    stems = []
    for stem in wanted:
        there = {"image": stem in images, "annotation": stem in files}
        if all(there.values()):
            stems.append(stem)
        else:
            missing = " and no ".join(what for what, found in there.items() if not found)
            findings.invalid.append(f"{stem} has no {missing}")
    left_out = len({*images} - {*wanted})
    if left_out:
        findings.notes.append(f"{left_out} images are in no list of ImageSets and are left out.")
    return stems


def _read_parts(root: Path, findings: Findings) -> Mapping[str, str]:
    """The part of each stem that the lists name; empty without lists."""
    folder = root / "ImageSets" / "Main"
    lists = {part_name(path.stem): path for path in sorted(folder.glob("*.txt"))}
    named = {part: path for part, path in lists.items() if part is not None}
    trainval = folder / "trainval.txt"
    if trainval.is_file() and not {"train", "val"} & set(named):
        named["train"] = trainval
    parts: dict[str, str] = {}
    for part, path in named.items():
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            stem = line.split()[0] if line.split() else ""
            if stem in parts and stem:
                findings.problems.append(f"{path.name}: {stem} is already in part {parts[stem]}")
            elif stem:
                parts[stem] = part
    return parts


def _read_annotation(
    path: Path, box_minimum: float, findings: Findings
) -> tuple[tuple[int, ...] | None, list[Object], int] | None:
    """Stated rows and columns, the objects, and how many of them are difficult."""
    try:
        root = read_xml(path)
    except UserError as error:
        findings.invalid.append(str(error))
        return None
    objects, difficult = [], 0
    for number, element in enumerate(root.iter("object"), start=1):
        where = f"{path.name} object {number}"
        name = (element.findtext("name") or "").strip()
        corners = [_number(element.findtext(f"bndbox/{key}")) for key in _CORNERS]
        top, left, bottom, right = corners
        if not name:
            findings.invalid.append(f"{where}: has no name")
        elif not all(math.isfinite(value) for value in corners):
            findings.invalid.append(f"{where} ({name}): has no box of four numbers")
        elif min(bottom - top, right - left) < box_minimum:
            findings.invalid.append(
                f"{where} ({name}): box {left:g},{top:g},{right:g},{bottom:g} has no area"
                if min(bottom - top, right - left) <= 0
                else f"{where} ({name}): box {left:g},{top:g},{right:g},{bottom:g} is too small"
            )
        else:
            difficult += (element.findtext("difficult") or "0").strip() == "1"
            objects.append(Object(name, (top - 1, left - 1, bottom, right), f"{where} ({name})"))
    size = [_number(root.findtext(f"size/{key}")) for key in ("height", "width")]
    stated = tuple(int(value) for value in size if math.isfinite(value) and value > 0)
    return (stated if len(stated) == 2 else None), objects, difficult


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file without a document type.

    Document types are refused: entities that they define can grow without bound.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        data = path.read_bytes()
        # NULs go, so that no wide encoding hides the word.
        if b"<!DOCTYPE" in data.replace(b"\0", b"").upper():
            raise UserError(f"{path}: has a DOCTYPE, which is not read; remove it from the file")
        return ElementTree.fromstring(data)
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as XML: {error}; mend the file") from error
