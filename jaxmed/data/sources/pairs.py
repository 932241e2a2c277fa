"""Images and masks of the same name: `images/ID.png` and `masks/ID.png`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jaxmed.data.formats.grid import distance
from jaxmed.data.images import image_grid, image_stem, list_images
from jaxmed.data.manifest import Entry, read_entries
from jaxmed.data.sources.base import FAR_APART, Case, FileSource, make_ids, usual_kind
from jaxmed.data.sources.findings import Findings, one_a_key, part_name
from jaxmed.data.sources.layouts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    open_folder,
    visible,
    wrong_layout,
)
from jaxmed.data.sources.masks import (
    MaskReader,
    check_class_names,
    classes_of_values,
    json_classes,
    read_json,
    stored_values,
)
from jaxmed.types import DatasetInfo, UserError

_LAYOUT = "images and masks"
_EXPECTED = "images/ID.png and masks/ID.png, perhaps in train/ and val/, or ID_image and ID_mask"
_IMAGE_END = re.compile(r"_(image|img|0000)$", re.IGNORECASE)
_MASK_END = re.compile(r"_(mask|masks|label|labels|seg|segmentation|gt)$", re.IGNORECASE)
_SAMPLED_MASKS = 16


class ImageMaskPairs(FileSource):
    """Images and masks with the same name, 2-D or 3-D, perhaps of different formats.

    They lie in two folders, such as `images/` and `masks/` or `imagesTr/` and `labelsTr/`, each
    with or in folders called train, val and test; or in one, as `ID_image.nrrd` and
    `ID_label.nrrd`. A mask may also be called `ID_mask`. The classes of semantic masks are
    those of `class_names`, of a `classes.txt` (one name a line) or a `dataset.json` (its
    `labels`); without these all masks are read once to see which numbers there are.

    Args:
        path: the folder.
        masks: "semantic" for class numbers, "instance" for a number an object.
        invalid: "error", or "drop" to leave out what is wrong and count it in the notes: images
            without mask and the reverse, pairs of different shapes or places in space.
        class_names: what the numbers of semantic masks mean, the background first.
        channels: convert images to this many channels; None keeps the files' own.
        kind: where the images come from, such as "MRI".

    Raises:
        UserError: if the folder is of another layout, or images and masks do not fit.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        masks: str = "semantic",
        invalid: str = "error",
        class_names: Sequence[str] | None = None,
        channels: int | None = None,
        kind: str = "",
    ):
        if masks not in ("semantic", "instance"):
            raise UserError(f"masks is {masks!r}; expected 'semantic' or 'instance'")
        root = open_folder(path, layout=_LAYOUT)
        findings = Findings(root)
        found = _find_pairs(root, findings)
        entries = read_entries(
            root,
            files=[list(pair) for pair in found],
            stems=[_stem(*pair) for pair in found],
            findings=findings,
        )
        known = entries or [Entry()] * len(found)
        stems = [_stem(*pair) for pair in found]
        ids = make_ids(root, [image for image, _ in found], stems=stems)
        usable = [
            i for i, pair in enumerate(found) if known[i].used and _same_grid(*pair, findings)
        ]
        pairs, known = [found[i] for i in usable], [known[i] for i in usable]
        ids = [ids[i] for i in usable]
        findings.finish(policy=invalid)
        if not pairs:
            raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
        names, reader = classes_of_masks(
            root, [mask for _, mask in pairs], masks, class_names, findings
        )
        findings.finish(policy=invalid)
        files = [image for image, _ in pairs]
        cases = [
            Case(
                id=name,
                images=(image,),
                mask=mask,
                part=entry.part or _part(root, image),
                patient=entry.patient,
            )
            for name, (image, mask), entry in zip(ids, pairs, known, strict=True)
        ]
        ndim, usual = usual_kind([[file] for file in files], channels=channels)
        info = DatasetInfo(
            name=root.resolve().name,
            task="segmentation",
            ndim=ndim,
            channels=usual,
            class_names=names,
            kind=kind,
            instances=masks == "instance",
        )
        super().__init__(info, cases, notes=findings.notes, channels=channels, read_mask=reader)


def _find_pairs(root: Path, findings: Findings) -> list[tuple[Path, Path]]:
    """Each image with its mask; what has no partner is added to `findings.invalid`."""
    places = [root, *(path for path in visible(root) if path.is_dir() and part_name(path.name))]
    pairs: list[tuple[Path, Path]] = []
    for place in places:
        images, masks = _one_of(place, IMAGE_FOLDERS), _one_of(place, MASK_FOLDERS)
        if images is not None and masks is not None:
            pairs += _match(images, list_images(images), masks, list_images(masks), findings)
    if pairs or findings.invalid or findings.problems:
        return pairs
    flat = [path for place in places for path in list_images(place) if path.parent == place]
    image_files = [path for path in flat if _IMAGE_END.search(image_stem(path))]
    mask_files = [path for path in flat if _MASK_END.search(image_stem(path))]
    if not image_files or not mask_files:
        raise wrong_layout(root, layout=_LAYOUT, expected=_EXPECTED)
    return _match(root, image_files, root, mask_files, findings)


def _one_of(place: Path, names: Sequence[str]) -> Path | None:
    wanted = [name.lower() for name in names]
    found = [path for path in visible(place) if path.is_dir() and path.name.lower() in wanted]
    if len(found) > 1:
        raise UserError(
            f"{place}: holds {' and '.join(path.name for path in found)}; keep one of them here"
        )
    return found[0] if found else None


def _match(
    images: Path,
    image_files: Sequence[Path],
    masks: Path,
    mask_files: Sequence[Path],
    findings: Findings,
) -> list[tuple[Path, Path]]:
    def name(path: Path, root: Path) -> str:
        return (path.parent.relative_to(root) / image_stem(path)).as_posix()

    image_of = one_a_key(image_files, lambda p: name(p, images), what="images", findings=findings)
    mask_of = one_a_key(mask_files, lambda p: name(p, masks), what="masks", findings=findings)
    bare = {_MASK_END.sub("", key): key for key in mask_of}
    pairs, used = [], set()
    for key, image in image_of.items():
        short = _IMAGE_END.sub("", key)
        partner = key if key in mask_of else bare.get(key, bare.get(short))
        if partner is None:
            findings.invalid.append(f"image {_shown(image)} has no mask")
        elif partner in used:
            findings.problems.append(f"mask {_shown(mask_of[partner])} fits two images")
        else:
            used.add(partner)
            pairs.append((image, mask_of[partner]))
    lonely = [mask_of[key] for key in mask_of if key not in used]
    findings.invalid += [f"mask {_shown(mask)} has no image" for mask in lonely]
    return pairs


def _stem(image: Path, mask: Path) -> str:
    """The name of a pair: ID, where the files are ID_image and ID_mask."""
    short = _IMAGE_END.sub("", image_stem(image))
    return short if _MASK_END.sub("", image_stem(mask)) == short else image_stem(image)


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _same_grid(image: Path, mask: Path, findings: Findings) -> bool:
    """Whether the headers state one grid; if not, `findings` says so."""
    try:
        grid, mask_grid = image_grid(image), image_grid(mask)
    except UserError as error:
        findings.invalid.append(str(error))
        return False
    shape, mask_shape = grid.shape[:-1], mask_grid.shape[:-1]
    if shape != mask_shape:
        findings.invalid.append(
            f"image {_shown(image)} has shape {shape}, its mask {_shown(mask)} {mask_shape}"
        )
        return False
    voxels, words = distance(grid, mask_grid)
    if voxels > FAR_APART:
        findings.invalid.append(
            f"image {_shown(image)} and its mask {_shown(mask)} lie up to {voxels:.4g} voxels "
            f"apart ({words})"
        )
    return voxels <= FAR_APART


def _part(root: Path, image: Path) -> str:
    """The part by the nearest folder that is named after one."""
    folders = image.relative_to(root).parts[:-1]
    return next((part for part in map(part_name, reversed(folders)) if part), "")


def classes_of_masks(
    root: Path,
    masks: Sequence[Path],
    meaning: str,
    given: Sequence[str] | None,
    findings: Findings,
) -> tuple[tuple[str, ...], MaskReader]:
    """Class names of the masks in a folder, and how to read them.

    Args:
        root: that may hold a classes.txt or dataset.json.
        masks: the files.
        meaning: "semantic" or "instance".
        given: class names, where they are known.
        findings: where problems and notes go.
    """
    if meaning == "instance":
        lossy = [mask.name for mask in masks if mask.suffix.lower() in (".jpg", ".jpeg")]
        if lossy:
            findings.problems.append(f"{lossy[0]}: JPEG does not keep numbers: save masks as PNG")
        pair = given or ("background", "object")
        return check_class_names(pair, where=f"{root} class_names"), MaskReader()
    names, ignored = _stated_classes(root, given)
    if names is None:
        return classes_of_values(stored_values(masks, findings), findings)
    if len(names) > 2:
        return names, MaskReader(ignored=ignored)
    # Masks of 0 and 255 are told from a few, or from all if these are empty; each one is checked
    # when it is read.
    values = stored_values(masks[:: max(1, len(masks) // _SAMPLED_MASKS)], findings)
    if set(values) <= {0}:
        values = stored_values(masks, findings)
    if set(values) in ({255}, {0, 255}):
        return names, classes_of_values(values, findings)[1]
    return names, MaskReader(ignored=ignored)


def _stated_classes(
    root: Path, given: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, int | None]:
    """Class names as given or as a file states them, and the number to be ignored."""
    text, table = root / "classes.txt", root / "dataset.json"
    if given is not None:
        # Names alone do not say which number is to be ignored.
        ignored = json_classes(table, read_json(table))[1] if table.is_file() else None
        return check_class_names(given, where=f"{root} class_names"), ignored
    if text.is_file():
        lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        return check_class_names(names, where=str(text)), None
    if table.is_file():
        return json_classes(table, read_json(table))
    return None, None
