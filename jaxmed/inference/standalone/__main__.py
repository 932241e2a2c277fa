"""Predict image files with an exported model.

`python model.zip --output=DIR IMAGE_OR_FOLDER...`, or, of a folder with an ONNX network,
`python FOLDER --output=DIR IMAGE_OR_FOLDER...`
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .contents import ModelError
from .decisions import scale
from .model import Model, load


def main(arguments: list[str] | None = None, *, model: str | None = None) -> int:
    """Predict files; returns the exit code: 0, or 2 where something could not be predicted.

    Args:
        arguments: of the command line; None takes the program's own.
        model: the artefact, where it is not an argument.
    """
    parser = argparse.ArgumentParser(description="Predict image files with an exported model.")
    parser.add_argument("--model", default=model, help="model.zip, or a folder that was exported")
    parser.add_argument("--output", required=True, help="folder for the predictions")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    given = parser.parse_args(arguments)
    try:
        if given.model is None:
            raise ModelError("--model is missing")
        opened = load(given.model)
        output = Path(given.output)
        named = find(given.images, output=output)
        if opened.description["task"] == "segmentation":
            check_apart(named, output)
        told = opened.description
        origin = {key: told[key] for key in ("step", "parameters_sha256")}
        files.claim(output, {"trained_on": told["trained_on"]["name"], **origin})
        return 2 if predict_files(opened, named, output) else 0
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def find(given: list[str], *, output: Path) -> list[tuple[str, Path]]:
    """Name and path of each image; names are relative to the folder given, and differ.

    Predictions in `output`, of an earlier call, are no images.

    Raises:
        ModelError: there is none, or two have one name.
    """
    found: list[tuple[str, Path]] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and files.suffix_of(p))
            if output.resolve() != path.resolve():
                inside = [p for p in inside if not p.resolve().is_relative_to(output.resolve())]
            kept = [
                p for p in inside if not any(part[0] == "." for part in p.relative_to(path).parts)
            ]
            found += [(str(p.relative_to(path)), p) for p in kept]
        else:
            found.append((path.name, path))
    stems = [name[: len(name) - len(files.suffix_of(Path(name)))] for name, _ in found]
    if not found or len(set(stems)) < len(stems):
        raise ModelError("no images found" if not found else "two images have one name; part them")
    return found


def check_apart(named: list[tuple[str, Path]], output: Path) -> None:
    """Make sure that no mask, which has the name of its image, is written among images.

    Raises:
        ModelError: one would be.
    """
    for name, path in named:
        if (output / name).parent.resolve() == path.parent.resolve():
            raise ModelError(
                f"--output={output}: masks would be written among the images; choose another folder"
            )


def predict_files(model: Model, named: list[tuple[str, Path]], output: Path) -> int:
    """Predict files and write what the task gives; returns how many failed."""
    rows: list[dict[str, str]] = []
    boxes: list[dict[str, Any]] = []
    task = model.description["task"]
    failed = 0
    try:
        for number, (name, path) in enumerate(named, 1):
            try:
                image = files.read(path)
                if image.note:
                    print(f"note: {name}: {image.note}")
                found = model.predict(image.array, spacing=image.spacing.tolist())
                if task == "segmentation":
                    print(f"{name} -> {files.write_mask(output / name, found, image)}")
            except (ModelError, MemoryError) as error:
                told = str(error) or "does not fit the memory"
                print(f"error: {told if str(path) in told else f'{path}: {told}'}", file=sys.stderr)
                failed += 1
                continue
            if task == "classification":
                rows.append({"file": name, **_columns(model, found)})
                print(f"{name}: {rows[-1]['prediction'] or 'none'} ({found.max():.3f})")
            if task == "detection":
                boxes += _listed(model, found, name, number)
                sure = int((found["scores"] >= model.description["score_threshold"]).sum())
                print(f"{name}: {sure} objects")
    finally:
        # Whatever goes wrong must not lose what was predicted before it.
        if rows:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            _write(output / "predictions.csv", text.getvalue())
        if task == "detection":
            _write(output / "detections.json", json.dumps(boxes, indent=1) + "\n")
    return failed


def _write(path: Path, text: str) -> None:
    """Write a table, whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    if path.exists():
        print(f"note: {path} of an earlier prediction is replaced")
    try:
        files.replace_text(path, text)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror}); make room") from error


def _columns(model: Model, probabilities: np.ndarray) -> dict[str, str]:
    """The line of predictions.csv, as predict.py writes it, of one image."""
    names = model.class_names
    if model.description["multilabel"]:
        prediction = "+".join(n for n, p in zip(names, probabilities, strict=True) if p > 0.5)
    else:
        prediction = names[int(probabilities.argmax())]
    row = {"prediction": prediction}
    own = set(model.description["columns"])
    for name, probability in zip(names, probabilities, strict=True):
        row[f"probability of {name}" if name in own else name] = f"{probability:.6f}"
    decided = model.decide(probabilities)
    if not decided:
        return row
    row["decision"] = "+".join(decided["decision"])
    if model.description["multilabel"]:
        pairs = zip(names, decided["calibrated"], strict=True)
        return row | {f"calibrated/{name}": f"{value:.6f}" for name, value in pairs}
    row["calibrated"] = f"{decided['calibrated'][names.index(row['decision'])]:.6f}"
    return row | {"set": "+".join(decided["set"])}


def _listed(
    model: Model, found: dict[str, np.ndarray], name: str, number: int
) -> list[dict[str, Any]]:
    """The boxes of one image as COCO results: [x, y, width, height], of volumes x, y, z."""
    low, high = np.split(found["boxes"], 2, axis=-1)
    order = slice(None, None, -1) if low.shape[-1] == 2 else slice(None)
    corners = np.concatenate([low[:, order], (high - low)[:, order]], axis=-1)
    listed = [
        {
            "file_name": name,
            "image_id": number,
            "category_id": int(label) + 1,
            "category": model.class_names[int(label)],
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 6),
        }
        for box, score, label in zip(
            corners.tolist(), found["scores"].tolist(), found["labels"], strict=True
        )
    ]
    if fixed := model.description["decisions"]:
        right = scale(found["scores"], fixed["slope"], fixed["intercept"])
        for box, probability in zip(listed, right.tolist(), strict=True):
            box["probability"] = round(probability, 6)
    return listed


if __name__ == "__main__":
    sys.exit(main())
