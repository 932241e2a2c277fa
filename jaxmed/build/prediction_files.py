"""Which files are predicted, and where their predictions may go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmed.data.images import image_stem, list_images
from jaxmed.inference.standalone import files
from jaxmed.inference.standalone.contents import ModelError
from jaxmed.training.processes import is_first, wait_for_all
from jaxmed.types import UserError


def find_inputs(inputs: Sequence[str], *, output: Path | None = None) -> list[tuple[str, Path]]:
    """Name and path of each image; the name is relative to the folder it was found in.

    Args:
        inputs: files and folders.
        output: of the predictions; where it lies within a folder given, what is in it is no input.

    Raises:
        UserError: where there is none, or two would be written to the same name.
    """
    if not inputs:
        raise UserError("no images given; name files or folders after the flags")
    found: list[tuple[str, Path]] = []
    for given in inputs:
        path = Path(given)
        own = path.name or path.resolve().name
        if path.is_dir():
            images = list_images(path)
            besides = ""
            if output is not None and output.resolve() != path.resolve():
                own_results = output.resolve()
                besides = f" besides those in {output}" if images else ""
                images = [i for i in images if not i.resolve().is_relative_to(own_results)]
            if not images:
                raise UserError(f"{path}: holds no images{besides}; give a folder of image files")
            # The slices of a series are one image, listed by the folder itself.
            found += [(own if i == path else str(i.relative_to(path)), i) for i in images]
        elif path.exists():
            found.append((own, path))
        else:
            raise UserError(f"{path}: no such file or folder; check the path")
    seen: dict[str, Path] = {}
    for name, path in found:
        key = os.path.join(os.path.dirname(name), image_stem(name))
        if key in seen:
            raise UserError(
                f"{path} and {seen[key]} would be written to the same name; predict them into "
                "different folders"
            )
        seen[key] = path
    return found


def claim(output: Path, origin: dict[str, Any]) -> None:
    """Make the folder of the predictions, and note in it whose they are; see `files.claim`.

    Raises:
        UserError: it holds files of another origin, or predictions by other weights, or cannot be
            written.
    """
    try:
        files.check_output(output, origin)
        wait_for_all("output: looked at")
        if is_first():
            files.claim(output, origin)
        wait_for_all("output: made")
    except ModelError as error:
        raise UserError(str(error)) from error


def check_apart(named: Sequence[tuple[str, Path]], output: Path) -> None:
    """Make sure that no mask, which has the name of its image, is written among images.

    Raises:
        UserError: one would be.
    """
    for name, path in named:
        folder = path if path.is_dir() else path.parent  # of a DICOM series the slices' own
        if (output / name).parent.resolve() == folder.resolve():
            raise UserError(
                f"--output={output}: masks would be written among the images; choose another folder"
            )
