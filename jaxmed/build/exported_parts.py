"""The parts of an exported run: what it says of itself, and its network in one of the formats."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed import __version__
from jaxmed.build.config import CONFIG_FILE
from jaxmed.build.decisions import DECISIONS_FILE
from jaxmed.build.experiment import Experiment
from jaxmed.build.familiarity import FAMILIARITY_FILE, read_familiarity
from jaxmed.build.forward import make_forward
from jaxmed.build.trained import TrainedRun, parameters_sha256, take_members
from jaxmed.inference.export import (
    expand_arrays,
    export_program,
    loader_parts,
    name_arrays,
    reduce_arrays,
)
from jaxmed.inference.onnx_writing import write_onnx
from jaxmed.inference.standalone.contents import (
    NETWORK,
    PROGRAM,
    VERSION,
    WEIGHTS,
    pack_arrays,
)
from jaxmed.inference.writers import OTHER_COLUMNS
from jaxmed.models.convolution import use_onednn
from jaxmed.types import UserError


def describe(run: TrainedRun, decisions: Any, *, format: str, dtype: str) -> dict[str, Any]:
    """What the loader must know, and what people want to.

    Args:
        run: the run.
        decisions: that its validation part fixed, or None.
        format: of the export.
        dtype: of the weights.
    """
    info, task, predictor = run.info, run.experiment.task, run.predict
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
        "decisions": None if decisions is None else dataclasses.asdict(decisions),
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
    return description


def program_parts(
    run: TrainedRun,
    experiment: Experiment,
    arrays: Mapping[str, np.ndarray],
    description: dict[str, Any],
) -> dict[str, bytes]:
    """StableHLO, its weights and the loader; adds to the description what a program needs.

    Args:
        run: the run.
        experiment: of the run, with the type to compute in.
        arrays: of `reduce_arrays`.
        description: of `describe`.
    """
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
    return {PROGRAM: module, WEIGHTS: _pack(arrays, run), **loader_parts()}


def onnx_parts(
    run: TrainedRun, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> dict[str, bytes]:
    """The network as ONNX, computing in float32 from whatever the weights are, and the loader."""
    told = {name: description[name] for name in ("task", "class_names", "prepare", "windows")}
    shape = (*run.predict.window, run.experiment.info.channels)
    with use_onednn(False):
        network = write_onnx(_onnx_function(run), arrays, shape, description=json.dumps(told))
    return {NETWORK: network, **loader_parts()}


def weight_parts(
    workdir: Path, run: TrainedRun, dtype: str, description: dict[str, Any]
) -> dict[str, bytes]:
    """Weights and config of a run, as `load_run` opens them.

    Names and digest of the weights are added to the description.
    Paths are left out, and notes on the data, which may name cases: these are nobody else's. What
    was planned is in the config itself.
    """
    arrays = reduce_arrays(name_arrays(run.variables), dtype, ensemble=bool(run.chosen))
    rounded = jax.tree.map(np.asarray, expand_arrays(arrays))
    own = take_members(rounded, run.chosen) if run.chosen else rounded
    sha256 = parameters_sha256(own["params"])
    description["parameters_sha256"] = sha256
    arrays |= {f"best/{name}": _plain(value) for name, value in run.best.items()}
    config = {**run.run["config"], "plan": "none"}
    config["data"] = {**config["data"], "path": "", "prepared": ""}
    config["model"] = {**config["model"], "init": ""}
    description["arrays"] = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name}
        for name, array in sorted(arrays.items())
    }
    parts = {
        WEIGHTS: _pack(arrays, run),
        CONFIG_FILE: (
            json.dumps(
                {**run.run, "config": config, "data": {**run.run["data"], "notes": []}}, indent=1
            )
            + "\n"
        ).encode(),
    }
    return parts | _fixed_parts(workdir, run, sha256)


def _fixed_parts(workdir: Path, run: TrainedRun, sha256: str) -> dict[str, bytes]:
    """What the validation part fixed of these weights, to be used with those of another digest.

    These are the same but for rounding, whose cost the export measures.
    """
    parts = {}
    path = workdir / DECISIONS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("parameters_sha256") == run.sha256:
        parts[path.name] = json.dumps({**known, "parameters_sha256": sha256}, indent=2).encode()
    if read_familiarity(workdir, run) is not None:
        stream = io.BytesIO()
        with np.load(workdir / FAMILIARITY_FILE, allow_pickle=False) as arrays:
            np.savez(stream, **{**arrays, "parameters_sha256": sha256}, allow_pickle=False)
        parts[FAMILIARITY_FILE] = stream.getvalue()
    return parts


def _pack(arrays: Mapping[str, np.ndarray], run: TrainedRun) -> bytes:
    metadata = {"format": "jaxmed", "step": str(run.step), "parameters_sha256": run.sha256}
    return pack_arrays(dict(arrays), metadata=metadata)


def _plain(array: Any) -> np.ndarray:
    """As one of the types of a safetensors file."""
    found = np.asarray(array)
    return found.astype(np.float32 if found.dtype.kind == "f" else np.int32)


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
        decode = task.decode
        task = copy.copy(task)
        task.predict = decode
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
