"""Medical Segmentation Decathlon, and the raw folders of nnU-Net."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmed.data.formats.common import safe_path
from jaxmed.data.formats.grid import Grid, distance
from jaxmed.data.images import image_grid, image_stem, list_images
from jaxmed.data.manifest import Entry, read_entries
from jaxmed.data.sources.base import FAR_APART, Case, FileSource, usual_kind
from jaxmed.data.sources.findings import Findings, one_a_key
from jaxmed.data.sources.layouts import open_folder, wrong_layout
from jaxmed.data.sources.masks import MaskReader, json_classes, read_json
from jaxmed.types import DatasetInfo, UserError

_LAYOUT = "Medical Segmentation Decathlon"
_EXPECTED = "dataset.json, imagesTr/ and labelsTr/"
_CHANNEL = re.compile(r"_(\d{4})$")


class Decathlon(FileSource):
    """A task of the Medical Segmentation Decathlon, or a raw data set of nnU-Net.

    `dataset.json` names the classes (`labels`) and channels (`modality` or `channel_names`). Images
    lie in `imagesTr/ID.nii.gz`, their channels on a fourth axis, or one file a channel in
    `imagesTr/ID_0000.nii.gz` and so on; masks in `labelsTr/ID.nii.gz`. Parts come from a
    `manifest.csv` or `split.csv`; the unlabelled test images are left out.

    Args:
        path: the folder.
        invalid: "error", or "drop" to leave out what is wrong and count it in the notes: images
            without mask and the reverse, unreadable headers, shapes that differ.

    Raises:
        UserError: if the folder is of another layout, or files are missing or do not fit.
    """

    def __init__(self, path: str | Path, *, invalid: str = "error"):
        root = open_folder(path, layout=_LAYOUT)
        file = root / "dataset.json"
        if not file.is_file() or not (root / "imagesTr").is_dir():
            raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
        dataset = read_json(file)
        names, ignored = json_classes(file, dataset)
        channel_names = _channel_names(dataset, file)
        findings = Findings(root)
        cases = _find_cases(root, dataset, len(channel_names), findings)
        cases = _with_entries(root, cases, findings)
        cases = [case for case in cases if _fits(case, len(channel_names), findings)]
        if not cases and not findings.problems and not findings.invalid:
            raise wrong_layout(root, layout=_LAYOUT, expected=f"images beside {_EXPECTED}")
        findings.finish(policy=invalid)
        if not cases:
            raise UserError(f"{root}: no sound case is left; mend the files")
        if (root / "imagesTs").is_dir():
            findings.notes.append("The images of imagesTs have no masks and are left out.")
        stated = dataset.get("numTraining")
        if isinstance(stated, int) and stated != len(cases):
            findings.notes.append(
                f"dataset.json states {stated} training images (numTraining), "
                f"there are {len(cases)}."
            )
        info = DatasetInfo(
            name=str(dataset.get("name") or root.resolve().name),
            task="segmentation",
            ndim=usual_kind([case.images for case in cases])[0],
            channels=len(channel_names),
            class_names=names,
            kind=", ".join(channel_names),
            licence=str(dataset.get("licence") or dataset.get("license") or ""),
            citation=str(dataset.get("reference") or ""),
        )
        reader = MaskReader(ignored=ignored)
        super().__init__(info, cases, notes=findings.notes, read_mask=reader)


def _channel_names(dataset: dict[str, Any], file: Path) -> list[str]:
    names = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file}: has no modality or channel_names; expected {{'0': 'MRI', ...}}")
    if sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{file}: channels are numbered {', '.join(names)}; expected 0, 1, 2, ...")
    return [str(names[str(number)]) for number in range(len(names))]


def _find_cases(
    root: Path, dataset: dict[str, Any], channels: int, findings: Findings
) -> list[Case]:
    """The cases that dataset.json lists or, where it lists none, those that the folders hold."""
    listed = dataset.get("training")
    masks = one_a_key(
        list_images(root / "labelsTr") if (root / "labelsTr").is_dir() else [],
        image_stem,
        what="masks",
        findings=findings,
    )
    images = one_a_key(list_images(root / "imagesTr"), image_stem, what="images", findings=findings)
    if isinstance(listed, list) and listed:
        return _listed_cases(root, listed, images, findings)
    cases = []
    by_case: dict[str, list[Path]] = {}
    for stem, path in images.items():
        # A number at the end is a channel's only where the mask does not carry it as well.
        name = stem if stem in masks else _CHANNEL.sub("", stem)
        by_case.setdefault(name, []).append(path)
    for name, files in by_case.items():
        if name not in masks:
            findings.invalid.append(f"image {files[0].name} has no mask in labelsTr")
        else:
            cases.append(Case(name, tuple(sorted(files)), masks[name]))
    findings.invalid += [
        f"mask {masks[name].name} has no image in imagesTr" for name in masks if name not in by_case
    ]
    return cases


def _listed_cases(
    root: Path, listed: Sequence[Any], images: dict[str, Path], findings: Findings
) -> list[Case]:
    cases: dict[str, Case] = {}
    for number, row in enumerate(listed):
        where = f"dataset.json training {number}"
        if not isinstance(row, dict) or not {"image", "label"} <= set(row):
            findings.problems.append(f"{where}: is {row!r}, expected image and label")
            continue
        image = root / safe_path(str(row["image"]), where=f"{root / where}")
        mask = root / safe_path(str(row["label"]), where=f"{root / where}")
        files: tuple[Path, ...] = (image,)
        name = image_stem(image)
        if not image.exists():
            files = tuple(images[s] for s in sorted(images) if _CHANNEL.sub("", s) == name) or files
        absent = [path for path in (*files, mask) if not path.exists()]
        missing = [path.relative_to(root).as_posix() for path in absent]
        if missing:
            findings.invalid.append(f"{where}: no file {' and no '.join(missing)}")
        elif name in cases:
            findings.problems.append(f"{where}: {name} is listed twice")
        else:
            cases[name] = Case(name, files, mask)
    used = {path for case in cases.values() for path in case.images}
    unlisted = len(set(images.values()) - used)
    if unlisted:
        findings.notes.append(f"{unlisted} files of imagesTr are not in dataset.json: left out.")
    return list(cases.values())


def _fits(case: Case, channels: int, findings: Findings) -> bool:
    """Whether the headers of a case state the channels and one grid; if not, `findings` says so."""
    try:
        images = [image_grid(path) for path in case.images]
        beside = [*case.images[1:], *([case.mask] if case.mask is not None else [])]
        others = {path: image_grid(path) for path in beside}
    except UserError as error:
        findings.invalid.append(str(error))
        return False
    found = sum(grid.shape[-1] for grid in images)
    if found != channels:
        findings.invalid.append(
            f"{case.id}: has {found} channels, dataset.json names {channels} of them"
        )
    unlike = [
        f"{case.id}: {case.images[0].parent.name}/{case.images[0].name} and "
        f"{path.parent.name}/{path.name} {words}"
        for path, other in others.items()
        if (words := _unlike(images[0], other))
    ]
    findings.invalid += unlike[:1]  # the others mostly differ for the same reason
    return found == channels and not unlike


def _unlike(image: Grid, other: Grid) -> str:
    """In what another file of a case does not fit the image; "" where it does."""
    shape, other_shape = image.shape[:-1], other.shape[:-1]
    if shape != other_shape:
        return f"have the shapes {shape} and {other_shape}"
    voxels, words = distance(image, other)
    return f"lie up to {voxels:.4g} voxels apart ({words})" if voxels > FAR_APART else ""


def _with_entries(root: Path, cases: Sequence[Case], findings: Findings) -> list[Case]:
    entries = read_entries(
        root,
        files=[[*case.images, *([case.mask] if case.mask else [])] for case in cases],
        stems=[case.id for case in cases],
        findings=findings,
    )
    known = entries or [Entry()] * len(cases)
    return [
        Case(case.id, case.images, case.mask, part=entry.part, patient=entry.patient)
        for case, entry in zip(cases, known, strict=True)
        if entry.used
    ]
