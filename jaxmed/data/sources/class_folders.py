"""Class folders: `CLASS/...` or `SPLIT/CLASS/...`, or a manifest that gives the classes."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jaxmed.data.images import image_stem, list_images
from jaxmed.data.manifest import Entry, has_column, read_entries
from jaxmed.data.sources.base import Case, FileSource, make_ids, usual_kind
from jaxmed.data.sources.findings import PARTS, Findings, part_name, some
from jaxmed.data.sources.layouts import guess_layout, nested_layouts, open_folder, wrong_layout
from jaxmed.types import DatasetInfo, UserError, count_of

_LAYOUT = "class folders"
RARE = 0.05
"""Share of the images of another class of nearly its name, below which a class may be a slip."""
_EXPECTED = "CLASS/... or SPLIT/CLASS/... with at least two classes, or a manifest.csv with labels"


class ClassFolders(FileSource):
    """Images sorted into one folder a class, at any depth below it.

    The folders may lie in folders called train, val and test (or training, valid, validation,
    testing, in any case). A `manifest.csv` with `file` or `id` may give `split`, `patient` and the
    label, which then has the last word over the folder.

    Args:
        path: the folder.
        class_names: the classes in the order of their numbers; sorted names where not given.
        label_column: the manifest's column of labels.
        channels: convert images to this many channels; None keeps the files' own.
        kind: where the images come from, such as "X-ray".

    Raises:
        UserError: if the folder is of another layout, or files and manifest disagree.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        label_column: str = "label",
        channels: int | None = None,
        kind: str = "",
    ):
        root = open_folder(path, layout=_LAYOUT)
        labelled = has_column(root, label_column)
        if not labelled and label_column != "label":
            raise UserError(f"{root}: no manifest.csv with a column {label_column!r} for labels")
        if not labelled and (guess_layout(root) not in (_LAYOUT, None) or nested_layouts(root)):
            raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
        files = list_images(root)
        if not files:
            raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
        findings = Findings(root)
        placed = [_place(root, file) for file in files]
        entries = read_entries(
            root,
            files=[[file] for file in files],
            stems=[image_stem(file) for file in files],
            findings=findings,
            label_column=label_column,
        )
        ids = make_ids(root, files)
        if entries is not None:
            used = [row for row, entry in enumerate(entries) if entry.used]
            files, placed = [files[row] for row in used], [placed[row] for row in used]
            entries, ids = [entries[row] for row in used], [ids[row] for row in used]
        known = _merge(root, files, placed, entries, labelled=labelled, findings=findings)
        if not any(entry.label for entry in known):
            raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
        names = _class_names(known, class_names, findings)
        findings.finish()
        cases = [
            Case(
                id=name,
                images=(file,),
                label=names.index(entry.label),
                part=entry.part,
                patient=entry.patient,
            )
            for name, file, entry in zip(ids, files, known, strict=True)
        ]
        ndim, found = usual_kind([[file] for file in files], channels=channels)
        info = DatasetInfo(
            name=root.resolve().name,
            task="classification",
            ndim=ndim,
            channels=found,
            class_names=names,
            kind=kind,
        )
        super().__init__(info, cases, notes=findings.notes, channels=channels)


def _place(root: Path, file: Path) -> Entry:
    """Part and class by the folders that a file lies in."""
    folders = file.relative_to(root).parts[:-1]
    part = part_name(folders[0]) if folders else None
    if part is not None:
        folders = folders[1:]
    return Entry(part=part or "", label=folders[0] if folders else "")


def _merge(
    root: Path,
    files: Sequence[Path],
    placed: Sequence[Entry],
    entries: Sequence[Entry] | None,
    *,
    labelled: bool,
    findings: Findings,
) -> list[Entry]:
    """What folders and manifest say together; the manifest has the last word."""
    if entries is None:
        entries = [Entry()] * len(files)
    listed = {entry.label for entry in entries if entry.label}
    merged, moved, renamed = [], 0, []
    for file, place, entry in zip(files, placed, entries, strict=True):
        label = entry.label or place.label
        if labelled and not entry.label and label not in listed:
            label = ""
        if not label:
            reason = "has no label in the manifest" if labelled else "lies in no class folder"
            findings.problems.append(f"{file.relative_to(root).as_posix()} {reason}")
        if entry.label and place.label in listed and entry.label != place.label:
            renamed.append(f"{file.name} {entry.label} instead of {place.label}")
        moved += bool(entry.part in PARTS and place.part and entry.part != place.part)
        merged.append(dataclasses.replace(entry, label=label, part=entry.part or place.part))
    if renamed:
        findings.notes.append(
            f"The manifest gives {count_of(len(renamed), 'image')} another label than the folder: "
            f"{some(renamed)}."
        )
    if moved:
        findings.notes.append(
            f"The manifest puts {moved} images in another part than their folder."
        )
    beside = {place.label for place, entry in zip(placed, merged, strict=True) if not entry.part}
    if not labelled and beside and any(place.part for place in placed):
        findings.problems.append(
            f"the folders {some(sorted(beside))} lie beside train, val or test; "
            "move them into one of these"
        )
    return merged


def _class_names(
    entries: Sequence[Entry], given: Sequence[str] | None, findings: Findings
) -> tuple[str, ...]:
    found = sorted({entry.label for entry in entries if entry.label})
    names = tuple(given) if given is not None else tuple(found)
    unknown = [name for name in found if name not in names]
    if unknown:
        findings.problems.append(
            f"unknown classes {some(unknown)}; class_names are {', '.join(names)}"
        )
    absent = [name for name in names if name not in found]
    if absent:
        findings.notes.append(f"No image is of {some(absent)}.")
    counts = Counter(entry.label for entry in entries if entry.label)
    for name in found:
        others = [other for other in found if counts[name] < RARE * counts[other]]
        like = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
        if like:
            findings.notes.append(
                f"Only {count_of(counts[name], 'image')} of the class {name!r}: is {like[0]!r} "
                "meant?"
            )
    if len(names) < 2:
        findings.problems.append(
            f"only one class was found, {', '.join(names)!r}; classification needs two or more"
        )
    in_train = {entry.label for entry in entries if entry.part in ("train", "")}
    strange = sorted({entry.label for entry in entries} - in_train - {""})
    if in_train and strange:
        findings.problems.append(
            f"the classes {some(strange)} have no training images; the training images are of "
            f"{some(sorted(in_train))}: is a name misspelt?"
        )
    return names
