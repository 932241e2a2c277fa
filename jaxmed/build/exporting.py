"""Export a trained run: the whole pipeline as one file, an ONNX network, or its weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed import __version__
from jaxmed.build.config import CONFIG_FILE, config_of_run, read_run
from jaxmed.build.decisions import DECISIONS_FILE, read_decisions, use_decisions
from jaxmed.build.export_checks import (
    check_equal,
    compare,
    find_cases,
    predict_by_run,
    read_cases,
    score_cost,
)
from jaxmed.build.forward import make_forward
from jaxmed.build.trained import TrainedRun, load_run, take_members
from jaxmed.build.workdir import make_folder
from jaxmed.inference import standalone
from jaxmed.inference.export import (
    expand_arrays,
    export_program,
    loader_parts,
    name_arrays,
    reduce_arrays,
    zip_parts,
)
from jaxmed.inference.onnx_writing import write_onnx
from jaxmed.inference.standalone.contents import (
    DESCRIPTION,
    NETWORK,
    PROGRAM,
    VERSION,
    WEIGHTS,
    pack_arrays,
)
from jaxmed.inference.writers import OTHER_COLUMNS
from jaxmed.models.convolution import use_onednn
from jaxmed.types import Example, UserError

FORMATS = ("stablehlo", "onnx", "safetensors")
ARTEFACT = "model.zip"
CHECKED = 8
"""Cases that the equality with the predictor is checked on."""


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
    config = config_of_run(read_run(workdir)) if config is None else config
    run = load_run(workdir, _computing(config, "float32"))
    fixed, _ = read_decisions(workdir, run)
    use_decisions(run, fixed)
    chosen = run.variables if not run.chosen else take_members(run.variables, run.chosen)
    arrays = reduce_arrays(name_arrays(chosen), dtype, ensemble=len(run.chosen) > 1)
    description = _describe(run, format, dtype) | {
        "decisions": None if fixed is None else dataclasses.asdict(fixed)
    }
    make_folder(output)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as draft:
        place = Path(draft)
        if format == "safetensors":
            _write_weights(place, workdir, run, dtype, description)
            reopened = load_run(place, _computing(config, "float32"))
            predict = _predict_with(reopened)
        else:
            parts = _make_parts(run, config, format, dtype, arrays, description)
            _write(place, parts, format, description)
            model = standalone.load(place / ARTEFACT if format == "stablehlo" else place)
            predict = _predict_by(model)
        description["checked"] = _check(workdir, run, dtype, predict)
        if format == "safetensors":
            _write_text(place / DESCRIPTION, description)
        else:
            _write(place, parts, format, description)
        return _move(place, output, format)


def _computing(config: ConfigDict, dtype: str) -> ConfigDict:
    """The config with a type to compute in."""
    copied = config.copy_and_resolve_references()
    copied.model.dtype = dtype
    return copied


def _describe(run: TrainedRun, format: str, dtype: str) -> dict[str, Any]:
    """What the loader must know, and what people want to."""
    info, config, task = run.info, run.experiment.config, run.experiment.task
    predictor = run.predict
    description: dict[str, Any] = {
        "version": VERSION,
        "jaxmed": __version__,
        "format": format,
        "dtype": dtype,
        "task": info.task,
        "ndim": info.ndim,
        "class_names": list(info.class_names),
        "multilabel": info.multilabel,
        "instances": info.instances,
        "prepare": dataclasses.asdict(run.experiment.prepare),
        "windows": {
            "size": list(predictor.window),
            "overlap": predictor.overlap,
            "fill": predictor.fill,
            "batch": predictor.batch_size,
        },
        "trained_on": {
            "name": info.name,
            "licence": info.licence,
            "citation": info.citation,
            "channels": info.channels,
            "gray_only": "data.channels" in run.run["planned"],
            "dtypes": run.run["data"]["dtypes"],
        },
        "models": max(1, len(run.chosen)),
        "step": run.step,
        "parameters_sha256": run.sha256,
        "columns": sorted(OTHER_COLUMNS),
    }
    if info.task == "detection":
        description["score_threshold"] = task.score_threshold
        description["suppression"] = {
            "iou_threshold": task.iou_threshold,
            "max_boxes": task.max_detections,
            "candidates": task.candidates,
        }
    if info.instances:
        description["smallest"] = task.smallest
    del config
    return description


def _make_parts(
    run: TrainedRun,
    config: ConfigDict,
    format: str,
    dtype: str,
    arrays: Mapping[str, np.ndarray],
    description: dict[str, Any],
) -> dict[str, bytes]:
    """The parts that hold the network; adds to the description what a program needs."""
    if format == "onnx":
        function = _onnx_function(run)
        told = json.dumps({name: description[name] for name in ("task", "class_names", "prepare")})
        shape = (*run.predict.window, run.experiment.info.channels)
        with use_onednn(False):
            return {NETWORK: write_onnx(function, arrays, shape, description=told)}
    # Kernels of int8 are multiplied out in float32; only bfloat16 computes in fewer bits.
    computing = "bfloat16" if dtype == "bfloat16" else "float32"
    experiment = run.experiment
    if computing != "float32":
        experiment = type(experiment)(
            _computing(config, computing),
            run.info,
            run.run["data"]["class_counts"],
            experiment.members,
        )
    forward = make_forward(
        experiment.config,
        run.info,
        experiment.model,
        experiment.task,
        ensemble=len(run.chosen) > 1,
        uncertain=False,
    )
    numbers, names = experiment.numbers_for(run.chosen), sorted(arrays)

    def program(weights: list[jax.Array], images: jax.Array) -> Mapping[str, jax.Array]:
        variables = expand_arrays(dict(zip(names, weights, strict=True)))
        return _named(forward(variables, numbers, {"image": images}))

    module, rules = export_program(program, [arrays[name] for name in names], _shape(run))
    description["program"] = {**rules, "weights": names}
    metadata = {"format": "jaxmed", "parameters_sha256": run.sha256}
    return {PROGRAM: module, WEIGHTS: pack_arrays(dict(arrays), metadata=metadata)}


def _named(found: Any) -> dict[str, jax.Array]:
    return dict(found) if isinstance(found, dict) else {"probabilities": found}


def _shape(run: TrainedRun) -> list[str]:
    """Of the program's images: the batch is free, of a U-Net also the sizes, in whole steps."""
    config, window = run.experiment.config, run.predict.window
    sides = [str(side) for side in window]
    # A draw of dropout is of one size.
    if run.info.task == "segmentation" and not config.evaluation.dropout_samples:
        steps = config.model.strides or (2,) * (len(config.model.features) - 1)
        for axis in range(run.info.ndim):
            step = math.prod(s if isinstance(s, int) else s[axis] for s in steps)
            sides[axis] = f"{step}*side{axis}" if step > 1 else f"side{axis}"
    return ["batch", *sides, str(run.experiment.info.channels)]


def _onnx_function(run: TrainedRun) -> Callable[..., Mapping[str, jax.Array]]:
    """(weights, images) -> outputs; models of an ensemble one after another, boxes unsuppressed."""
    experiment, members = run.experiment, run.chosen
    task: Any = experiment.task
    if run.info.task == "detection":
        if len(members) > 1:
            raise UserError(
                "--format=onnx: boxes of several models are fused in the program, which ONNX has "
                "no operations for; export with --format=stablehlo"
            )
        task = SimpleNamespace(predict=task.decode)
    if experiment.config.evaluation.dropout_samples:
        raise UserError(
            "--format=onnx: draws of dropout are random numbers of jax; add "
            "--config.evaluation.dropout_samples=0, or export with --format=stablehlo"
        )
    forward = make_forward(
        experiment.config, run.info, experiment.model, task, ensemble=False, uncertain=False
    )

    def function(arrays: dict[str, jax.Array], images: jax.Array) -> Mapping[str, jax.Array]:
        variables = expand_arrays(arrays)
        if len(members) < 2:
            return _named(forward(variables, experiment.numbers_for(members), {"image": images}))
        found = []
        for place, member in enumerate(members):
            own = jax.tree.map(
                lambda x, place=place: jax.lax.index_in_dim(x, place, keepdims=False), variables
            )
            found.append(forward(own, experiment.numbers_for([member]), {"image": images}))
        return _named(sum(found) / len(found))

    return function


def _write_weights(
    place: Path, workdir: Path, run: TrainedRun, dtype: str, description: dict[str, Any]
) -> None:
    """Weights and config of a run, as `load_run` opens them."""
    several = bool(run.chosen)
    arrays = reduce_arrays(name_arrays(run.variables), dtype, ensemble=several)
    arrays |= {f"best/{name}": _plain(value) for name, value in run.best.items()}
    config = dict(run.run)
    config["config"] = {**config["config"], "data": {**config["config"]["data"], "path": ""}}
    _write_text(place / CONFIG_FILE, config)
    if (workdir / DECISIONS_FILE).is_file():
        shutil.copyfile(workdir / DECISIONS_FILE, place / DECISIONS_FILE)
    description["arrays"] = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name}
        for name, array in sorted(arrays.items())
    }
    metadata = {"format": "jaxmed", "step": str(run.step), "parameters_sha256": run.sha256}
    (place / WEIGHTS).write_bytes(pack_arrays(arrays, metadata=metadata))
    _write_text(place / DESCRIPTION, description)


def _plain(array: Any) -> np.ndarray:
    """As one of the types of a safetensors file."""
    found = np.asarray(array)
    return found.astype(np.float32 if found.dtype.kind == "f" else np.int32)


def _write(
    place: Path, parts: Mapping[str, bytes], format: str, description: Mapping[str, Any]
) -> None:
    told = (json.dumps(description, indent=1) + "\n").encode()
    every = {DESCRIPTION: told, **parts, **loader_parts()}
    if format == "stablehlo":
        (place / ARTEFACT).write_bytes(zip_parts(every))
        return
    for name, content in every.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _write_text(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
    workdir: Path, run: TrainedRun, dtype: str, predict: Callable[[Example], Any]
) -> dict[str, Any]:
    """Compare with the predictor, and of fewer bits measure what they cost."""
    cases = find_cases(workdir, run, most=CHECKED if dtype == "float32" else None)
    some = dataclasses.replace(cases, rows=cases.rows[:CHECKED])
    examples = list(read_cases(some, run))
    wanted = predict_by_run(run, examples)
    found = compare(wanted, [predict(example) for example in examples])
    told = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    print(f"largest difference from the predictor on {len(examples)} cases: {told}")
    checked: dict[str, Any] = {
        "cases": len(examples),
        "made_up": cases.source is None,
        "differences": {
            name: value if np.isfinite(value) else None for name, value in found.items()
        },
    }
    if dtype == "float32":
        check_equal(found)
        return checked
    checked["cost"] = score_cost(workdir, run, cases, predict)
    for name, values in checked["cost"].items():
        before, after = (values[when] for when in ("before", "after"))
        if "/" not in name and before is not None and after is not None:
            print(f"{name}: {before:.4f} -> {after:.4f} ({after - before:+.4f}) by {dtype}")
    return checked


def _move(place: Path, output: Path, format: str) -> Path:
    """Bring what was checked to its place; a file is replaced at once."""
    for path in sorted(place.iterdir()):
        target = output / path.name
        if path.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    return output / ARTEFACT if format == "stablehlo" else output
