"""COCO: one JSON file of boxes for many images."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxmed.data.formats.common import safe_path
from jaxmed.data.images import image_stem
from jaxmed.data.manifest import Entry, read_entries
from jaxmed.data.sources.base import Case, FileSource, make_ids
from jaxmed.data.sources.findings import Findings, part_name, some
from jaxmed.data.sources.layouts import open_folder, wrong_layout
from jaxmed.data.sources.masks import read_json
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

_LAYOUT = "COCO"
_EXPECTED = "a JSON file with images, annotations and categories, here or in annotations/"


class Coco(FileSource):
    """Pictures with boxes in JSON files, one a part or one for all.

    Files called `instances_*.json` come before others. Of several, each must have train, val or
    test in its name, which is its part. Pictures lie beside the file, in `images/`, or in a folder
    named after the part. Annotations of crowds are left out; polygons are not read.

    Args:
        path: the folder, or one JSON file.
        invalid: "error", or "drop" to leave out what is wrong and count it in the notes: boxes
            without area or outside their image, of unknown images or classes, sizes that differ.
        class_names: the classes in the order of their numbers; that of the category ids where
            not given.
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
        class_names: Sequence[str] | None = None,
        channels: int | None = None,
        kind: str = "",
    ):
        root, tables = _find_tables(Path(path).expanduser())
        findings = Findings(root)
        opened = [_Table(root, file, part, findings) for file, part in tables]
        listed = list(dict.fromkeys(path for table in opened for path in table.files()))
        entries = read_entries(
            root,
            files=[[file] for file in listed],
            stems=[image_stem(file) for file in listed],
            findings=findings,
        )
        told = dict(zip(listed, entries or [], strict=False))
        left_out = {path for path, entry in told.items() if not entry.used}
        read = [table.read(left_out) for table in opened]
        pictures = [picture for table in read for picture in table.pictures]
        _check_twice(root, pictures, findings)
        found = list(dict.fromkeys(name for table in read for name in table.categories.values()))
        if class_names is None and len({frozenset(t.categories.values()) for t in read}) > 1:
            findings.problems.append("the files have different categories; give class_names")
        every = [thing for picture in pictures for thing in picture.objects]
        names = choose_classes(found, class_names, every, findings)
        crowds = sum(table.crowds for table in read)
        if crowds:
            findings.notes.append(f"{crowds} annotations of crowds (iscrowd) are left out.")
        note_cut_boxes(sum(table.cut for table in read), findings)
        files = [picture.path for picture in pictures]
        findings.finish(policy=invalid)
        cases = []
        for name, picture in zip(make_ids(root, files), pictures, strict=True):
            boxes, labels = pack_boxes([t for t in picture.objects if t.name in names], names)
            entry = told.get(picture.path, Entry())
            cases.append(
                Case(
                    name,
                    (picture.path,),
                    boxes=boxes,
                    box_label=labels,
                    part=entry.part or picture.part,
                    patient=entry.patient,
                )
            )
        info = detection_info(root, cases, names, channels, kind)
        super().__init__(info, cases, notes=findings.notes, channels=channels)
        self.tables = tuple(file for file, _ in tables)


def _find_tables(path: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The root folder, and the JSON files with the part of each."""
    if path.is_file():
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        return root, [(path, "")]
    root = open_folder(path, layout=_LAYOUT)
    files = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
    files = [file for file in files if not file.name.startswith(".")]
    chosen = [file for file in files if file.name.startswith("instances_")] or [
        file for file in files if file.name not in ("dataset.json", "dataset_info.json")
    ]
    if not chosen:
        raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
    tables = [(file, _part_in_name(file.stem)) for file in chosen]
    parts = [part for _, part in tables]
    if len(tables) > 1 and ("" in parts or len(set(parts)) < len(parts)):
        raise UserError(
            f"{root}: holds {some([file.name for file in chosen], 6)}; of several files each needs "
            "a part of its own (train, val, test) in its name: or give the path of one of them"
        )
    return root, tables


def _part_in_name(stem: str) -> str:
    words = re.split(r"[^a-z]+", stem.lower())
    return next((part for part in map(part_name, words) if part), "")


@dataclasses.dataclass
class _Picture:
    path: Path
    part: str
    shape: tuple[int, ...]
    objects: list[Object]


class _Table:
    """One JSON file while it is read."""

    def __init__(self, root: Path, file: Path, part: str, findings: Findings):
        self.file, self.part, self.findings = file, part, findings
        stems = [re.sub(r"^instances_", "", file.stem), part, f"{part}2017", ""]
        places = [root / "images" / stem for stem in stems] + [root / stem for stem in stems]
        self.places = [*dict.fromkeys([*places, root / "JPEGImages", file.parent])]
        self.categories: dict[Any, str] = {}
        self.pictures: list[_Picture] = []
        self.crowds = self.cut = 0
        self.content = read_json(file)
        for key in ("images", "annotations", "categories"):
            if not isinstance(self.content, dict) or not _is_list_of_dicts(self.content.get(key)):
                raise UserError(f"{file}: has no list of {key}; expected COCO's {_EXPECTED}")

    def files(self) -> list[Path]:
        """The files of the pictures that are there."""
        found = [self._find(self._relative(row)) for row in self.content["images"]]
        return [path for path in found if path is not None]

    def _relative(self, row: dict) -> str:
        where = f"{self.file} image {_key(row.get('id'))}"
        return safe_path(str(row.get("file_name", "")), where=where)

    def read(self, left_out: Collection[Path]) -> _Table:
        """Read all pictures and objects but those of the files left out."""
        content = self.content
        rows = sorted(content["categories"], key=lambda row: str(row.get("id", "")).zfill(9))
        self.categories = {_key(row.get("id")): str(row.get("name", "")) for row in rows}
        if len(set(self.categories.values())) < len(rows):
            self.findings.problems.append(f"{self.file.name}: two categories have one id or name")
        by_id = self._read_pictures(content["images"], left_out)
        for row in content["annotations"]:
            self._read_object(row, by_id)
        for picture in self.pictures:
            before = {thing.box for thing in picture.objects}
            picture.objects = usable_objects(picture.objects, picture.shape, self.findings)
            self.cut += sum(thing.box not in before for thing in picture.objects)
        return self

    def _read_pictures(
        self, rows: Sequence[dict], left_out: Collection[Path]
    ) -> dict[Any, _Picture | None]:
        """The picture of each image id; None of one that is left out."""
        by_id: dict[Any, _Picture | None] = {}
        for row in rows:
            key, name = _key(row.get("id")), str(row.get("file_name", ""))
            if key in by_id:
                self.findings.problems.append(f"{self.file.name}: two images have the id {key!r}")
                continue
            by_id[key] = None
            path = self._find(self._relative(row))
            if path in left_out:
                continue
            if path is None:
                self.findings.invalid.append(f"{self.file.name} image {key}: no file {name!r}")
                continue
            shape = header_shape(path, self.findings)
            stated = (row.get("height"), row.get("width"))
            if shape is not None and None not in stated and stated != shape:
                self.findings.invalid.append(
                    f"{self.file.name} image {key}: size is {stated[1]}x{stated[0]}, that of "
                    f"{path.name} is {shape[1]}x{shape[0]} (width x height)"
                )
            elif shape is not None:
                by_id[key] = _Picture(path, self.part, shape, [])
        self.pictures = [picture for picture in by_id.values() if picture is not None]
        return by_id

    def _find(self, relative: str) -> Path | None:
        if relative in ("", "."):
            return None
        # Always in the same order: of two pictures of one name it must be the same every time.
        found = (place / relative for place in self.places)
        return next((path for path in found if path.is_file()), None)

    def _read_object(self, row: dict, by_id: dict[Any, _Picture | None]) -> None:
        where = f"{self.file.name} annotation {row.get('id', '?')}"
        image, category = _key(row.get("image_id")), _key(row.get("category_id"))
        box = row.get("bbox")
        if row.get("iscrowd"):
            self.crowds += 1
        elif image not in by_id:
            self.findings.invalid.append(f"{where}: no image has the id {image!r}")
        elif category not in self.categories:
            self.findings.invalid.append(f"{where}: no category has the id {category!r}")
        elif not _is_box(box):
            self.findings.invalid.append(f"{where}: bbox is {box!r}, expected four numbers")
        elif (picture := by_id[image]) is not None:
            left, top, width, height = map(float, box)  # type: ignore[arg-type]
            picture.objects.append(
                Object(
                    self.categories[category],
                    (top, left, top + height, left + width),
                    f"{where} ({self.categories[category]}, {picture.path.name})",
                )
            )


def _key(value: Any) -> int | str:
    """An id as JSON may hold it; what cannot be one becomes text that matches nothing."""
    return value if isinstance(value, int | str) else repr(value)


def _is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) and abs(number) < 1e9 for number in value)
    )


def _check_twice(root: Path, pictures: Sequence[_Picture], findings: Findings) -> None:
    """Add to the problems what is in a set, or in two parts, twice."""
    seen: dict[Path, str] = {}
    for picture in pictures:
        if picture.path in seen:
            findings.problems.append(
                f"{picture.path.relative_to(root).as_posix()} is listed twice"
                + (f", in {seen[picture.path]} and {picture.part}" if picture.part else "")
            )
        seen[picture.path] = picture.part
