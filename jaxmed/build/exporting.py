"""Export a trained run: the whole pipeline as one file, an ONNX network, or its weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.config import config_of_run, read_run
from jaxmed.build.decisions import Decisions, read_decisions, use_decisions
from jaxmed.build.experiment import Experiment
from jaxmed.build.export_checks import (
    check_equal,
    compare,
    compare_decided,
    find_cases,
    predict_by_run,
    read_cases,
    score_cost,
)
from jaxmed.build.exported_parts import describe, onnx_parts, program_parts, weight_parts
from jaxmed.build.trained import TrainedRun, load_run, parameters_sha256, take_members
from jaxmed.build.workdir import make_folder
from jaxmed.evaluation.decisions import ClassDecisions, LabelDecisions
from jaxmed.inference import standalone
from jaxmed.inference.export import expand_arrays, name_arrays, reduce_arrays, zip_parts
from jaxmed.inference.standalone.contents import DESCRIPTION
from jaxmed.types import Example, UserError

ARTEFACT = "model.zip"
CHECKED = 8
"""Cases that the equality with the predictor is checked on."""

PredictExample = Callable[[Example], Any]
Compare = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
"""What the run predicts of some cases, and the export -> the largest differences by their names."""


def export_run(
    workdir: str | Path,
    *,
    output: str | Path,
    format: str = "stablehlo",
    dtype: str = "float32",
    config: ConfigDict | None = None,
) -> Path:
    """Export the best checkpoint of a run, once it predicts what the run does.

    Args:
        workdir: of the run.
        output: folder to write to. Of "stablehlo" it gets `model.zip`, which holds everything; of
            "onnx" the same parts as files, with `network.onnx` in place of program and weights; of
            "safetensors" `weights.safetensors` and its JSON, which `load_run` opens as a workdir.
        format: see `output`.
        dtype: "float32", or "bfloat16" or "int8", whose cost in scores is measured on the
            validation part.
        config: the run's, with overrides.

    Returns:
        what was written, a file or the folder.

    Raises:
        UserError: the export differs from the predictor, or something cannot be exported; nothing
            is written then.
    """
    workdir, output = Path(workdir), Path(output)
    _check_place(output, format)
    config = config_of_run(read_run(workdir)) if config is None else config
    run = load_run(workdir, _computing(config, "float32"))
    fixed, _ = read_decisions(workdir, run)
    use_decisions(run, fixed)
    description = describe(run, fixed, format=format, dtype=dtype)
    is_new = not output.exists()
    make_folder(output)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as draft:
            _write_checked(Path(draft), workdir, run, config, fixed, description)
            return _move(Path(draft), output, format)
    except BaseException:
        if is_new and not any(output.iterdir()):
            output.rmdir()
        raise


def _check_place(output: Path, format: str) -> None:
    """Refuse to write among the files of a run, of others, or of an export of another kind."""
    if (output / "checkpoints").exists():
        raise UserError(f"--output={output}: is the workdir of a run; choose another folder")
    path = output / DESCRIPTION
    if format == "stablehlo" or not output.is_dir():
        return
    if not path.is_file():
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise UserError(
                f"--output={output}: holds files that are no export (there is no {DESCRIPTION}), "
                "which might be replaced; choose another folder"
            )
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["format"]
    except (ValueError, LookupError, TypeError):
        there = "another kind"
    if there != format:
        raise UserError(f"--output={output}: holds an export of {there}; choose another folder")


def _computing(config: ConfigDict, dtype: str) -> ConfigDict:
    """The config with a type to compute in."""
    copied = config.copy_and_resolve_references()
    copied.model.dtype = dtype
    return copied


def _write_checked(
    place: Path,
    workdir: Path,
    run: TrainedRun,
    config: ConfigDict,
    fixed: Decisions | None,
    description: dict[str, Any],
) -> None:
    """Write an export, open it as its users will, compare, and note what was found in it."""
    format, dtype = description["format"], description["dtype"]
    chosen = run.variables if not run.chosen else take_members(run.variables, run.chosen)
    arrays = reduce_arrays(name_arrays(chosen), dtype, ensemble=len(run.chosen) > 1)
    rounded = jax.tree.map(np.asarray, expand_arrays(arrays))
    description["parameters_sha256"] = parameters_sha256(rounded["params"])
    compared: Compare = compare
    if format == "safetensors":
        parts = weight_parts(workdir, run, dtype, description)
        _write(place, parts, description)
        predict = _predict_with(load_run(place, _computing(config, "float32")))
    else:
        if format == "onnx":
            parts = onnx_parts(run, arrays, description)
        else:
            # Kernels of int8 are multiplied out in float32; only bfloat16 computes in fewer bits.
            computing = "bfloat16" if dtype == "bfloat16" else "float32"
            experiment = Experiment(
                _computing(config, computing),
                run.info,
                run.run["data"]["class_counts"],
                run.experiment.members,
            )
            parts = program_parts(run, experiment, arrays, description)
        _write(place, parts, description)
        opened = place / ARTEFACT if format == "stablehlo" else place
        try:
            model = standalone.load(opened)
        except standalone.ModelError as error:
            raise UserError(f"export: the artefact cannot be opened: {error}") from error
        predict = _predict_by(model)
        if isinstance(fixed, ClassDecisions | LabelDecisions):
            compared = _compare_with_decisions(fixed, model)
    description["checked"] = _check(workdir, run, arrays, description, predict, compared)
    _write(place, parts, description)


def _write(place: Path, parts: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
    """The parts as a zip file, or where people want one of them by itself as a folder."""
    told = (json.dumps(description, indent=1, allow_nan=False) + "\n").encode()
    every = {DESCRIPTION: told, **parts}
    if description["format"] == "stablehlo":
        (place / ARTEFACT).write_bytes(zip_parts(every))
        return
    for name, content in every.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _compare_with_decisions(
    fixed: ClassDecisions | LabelDecisions, model: standalone.Model
) -> Compare:
    return lambda wanted, found: {
        **compare(wanted, found),
        **compare_decided(fixed, model, wanted, found),
    }


def _predict_with(run: TrainedRun) -> Callable[[Example], Any]:
    return lambda example: predict_by_run(run, [example])[0]


def _predict_by(model: standalone.Model) -> Callable[[Example], Any]:
    def predict(example: Example) -> Any:
        try:
            return model.predict(example["image"], spacing=example["spacing"].tolist())
        except standalone.ModelError as error:
            raise UserError(f"export: the artefact does not predict: {error}") from error

    return predict


def _check(
    workdir: Path,
    run: TrainedRun,
    arrays: Mapping[str, Any],
    description: Mapping[str, Any],
    predict: PredictExample,
    compared: Compare,
) -> dict[str, Any]:
    """Compare with the predictor, and of fewer bits measure what they cost.

    Raises:
        UserError: they differ. Of fewer bits the predictor has the rounded weights too; what a
            program of bfloat16 computes is rounded anew on every device, and only told.
    """
    format, dtype = description["format"], description["dtype"]
    cases = find_cases(workdir, run, most=CHECKED if dtype == "float32" else None)
    examples = list(read_cases(dataclasses.replace(cases, rows=cases.rows[:CHECKED]), run))
    found = [predict(example) for example in examples]
    differences = compared(predict_by_run(run, examples), found)
    told = ", ".join(f"{name} {value:.3g}" for name, value in differences.items())
    of = "the predictor" if dtype == "float32" else "the predictor in float32"
    print(f"largest difference from {of} on {len(examples)} cases: {told}")
    checked: dict[str, Any] = {
        "cases": len(examples),
        "made_up": cases.source is None,
        # Infinite where boxes are found by one of the two only; JSON knows no such number.
        "differences": {
            name: float(f"{value:.3g}") if math.isfinite(value) else None
            for name, value in differences.items()
        },
    }
    if dtype == "float32":
        check_equal(differences)
        return checked
    if dtype == "int8" or format != "stablehlo":
        rounded = run.experiment.predictor(expand_arrays(arrays), members=run.chosen)
        check_equal(compared(predict_by_run(run, examples, rounded), found))
    checked["cost"] = score_cost(run, cases, predict)
    for name, values in checked["cost"].items():
        before, after = (values[when] for when in ("before", "after"))
        if "/" not in name and before is not None and after is not None:
            print(f"{name}: {before:.4f} -> {after:.4f} ({after - before:+.4f}) by {dtype}")
    return checked


def _move(place: Path, output: Path, format: str) -> Path:
    """Bring what was checked to its place; a file is replaced at once.

    A folder is without its description meanwhile, and nothing opens one that was left so.
    """
    if format != "stablehlo":
        (output / DESCRIPTION).unlink(missing_ok=True)
    for path in sorted(place.iterdir(), key=lambda path: path.name == DESCRIPTION):
        target = output / path.name
        if path.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    return output / ARTEFACT if format == "stablehlo" else output
