"""Say what a folder holds, where it is not what was asked for."""

from __future__ import annotations

from pathlib import Path

from jaxmed.data.images import is_image
from jaxmed.data.sources.findings import part_name, some
from jaxmed.types import UserError

IMAGE_FOLDERS = ("images", "imagesTr", "image", "imgs")
MASK_FOLDERS = ("masks", "labelsTr", "mask", "labels", "label", "segmentations")

_LAYOUTS = {
    "Pascal VOC": ("PascalVOC", "configs/detect_voc.py", "voc"),
    "COCO": ("Coco", "configs/detect_coco.py", "coco"),
    "Medical Segmentation Decathlon": ("Decathlon", "configs/segment_msd.py", "msd"),
    "images and masks": ("ImageMaskPairs", "configs/segment_pairs.py", "pairs"),
    "MedMNIST": ("MedMNIST", "configs/classify_medmnist.py", "medmnist"),
    "TensorFlow Datasets": ("TFDS", "a config of the task", "tfds"),
    "class folders": ("ClassFolders", "configs/classify_folders.py", "class_folders"),
}


def open_folder(path: str | Path, *, layout: str) -> Path:
    """The folder as a Path, if it is one and holds anything.

    Raises:
        UserError: with what was found instead.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(
            f"{folder}: no such folder; give that of a data set of {layout} with --config.data.path"
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; {layout} is read from a folder")
    if not any(not child.name.startswith(".") for child in folder.iterdir()):
        raise UserError(f"{folder}: is an empty folder; expected a data set of {layout}")
    return folder


def wrong_layout(folder: Path, *, layout: str, expected: str) -> UserError:
    """An error that says what the layout needs, what is there, and what it looks like instead."""
    names = [child.name + "/" * child.is_dir() for child in visible(folder)]
    other, nested = guess_layout(folder), nested_layouts(folder)
    same = [child for child, inside in nested.items() if inside == layout]
    if other is not None and other != layout:
        source, config, key = _LAYOUTS[other]
        hint = f"it looks like {other}: use {source}, {config}, or --config.data.layout={key}"
    elif same:
        hint = f"did you mean {same[0]}"
    elif nested:
        hint = "it holds data sets, such as " + " and ".join(
            f"{child.name} ({inside})" for child, inside in list(nested.items())[:2]
        )
    else:
        hint = "check the path"
    return UserError(
        f"{folder}: is not of the layout {layout}, which needs {expected}; "
        f"found {some(names, 6) or 'nothing'}; {hint}"
    )


def guess_layout(folder: Path) -> str | None:
    """The name of the layout that a folder looks like, or None."""
    tests = {
        "TensorFlow Datasets": _is_tfds,
        "Pascal VOC": lambda path: (
            (path / "JPEGImages").is_dir() or _has(path, "Annotations/*.xml")
        ),
        "Medical Segmentation Decathlon": lambda path: (
            (path / "dataset.json").is_file() and (path / "imagesTr").is_dir()
        ),
        "COCO": lambda path: _has(path, "instances_*.json") or _has(path, "annotations/*.json"),
        "images and masks": is_pairs,
        "MedMNIST": lambda path: _has(path, "*.npz"),
        "class folders": _is_class_folders,
    }
    return next((name for name, test in tests.items() if test(folder)), None)


def nested_layouts(folder: Path) -> dict[Path, str]:
    """The folders inside that are data sets themselves, with the layout of each.

    A class folder may well hold folders of images, so that these do not count, save where the
    folders are named after parts.
    """
    found = {}
    for child in visible(folder):
        layout = guess_layout(child) if child.is_dir() and not part_name(child.name) else None
        if layout == "class folders" and not any(
            part_name(inner.name) for inner in child.iterdir()
        ):
            layout = None
        if layout is not None:
            found[child] = layout
    return found


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files left out, sorted."""
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def is_pairs(folder: Path) -> bool:
    """Whether a folder of images lies beside one of masks, perhaps inside each part."""
    places = [folder]
    places += [path for path in visible(folder) if path.is_dir() and part_name(path.name)]
    return any(
        any((place / name).is_dir() for name in IMAGE_FOLDERS)
        and any((place / name).is_dir() for name in MASK_FOLDERS)
        for place in places
    )


def _has(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def _is_tfds(folder: Path) -> bool:
    return _has(folder, "features.json") or _has(folder, "*/features.json")


def _is_class_folders(folder: Path) -> bool:
    folders = [path for path in visible(folder) if path.is_dir()]
    inside = [path for path in folders if part_name(path.name)]
    for part in inside:
        folders += [path for path in visible(part) if path.is_dir()]
    with_images = [path for path in folders if any(is_image(child) for child in visible(path))]
    return len(with_images) > 1 and not nested_layouts(folder)
