"""The files of a workdir that say what a run is: config.json and split.json."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import jaxmed
from jaxmed.build.config import CONFIG_FILE, base_config, differences, flatten, read_run, write_json
from jaxmed.build.locks import Lock
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.training.checkpoints import finished_steps
from jaxmed.training.processes import is_first
from jaxmed.types import Source, UserError

SPLIT_FILE = "split.json"
LOCK_FILE = ".lock"


FREE = (
    "data.path",
    "data.download",
    "data.workers",
    "data.cache_gb",
    "data.on_device",
    "data.prepared",
    "training.steps_per_call",
    "data.max_boxes",
    "evaluation.batch_size",
    "evaluation.resamples",
    "evaluation.explain",
    "evaluation.familiarity",
)
"""What cannot change the result, so that it may be another when a run is gone on with."""


def is_free(key: str) -> bool:
    """Whether a key of the config cannot change what a training comes to."""
    return key in FREE or key.startswith("sharding.")


def make_folder(path: Path) -> None:
    """Make a folder, or say why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been as quick
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made or written ({error.strerror or error}); choose another folder"
        ) from error


@contextlib.contextmanager
def hold_workdir(workdir: Path) -> Iterator[None]:
    """Keep other trainings out of a workdir while this one runs; where there are no locks, say so.

    Raises:
        UserError: another training is under way in it.
    """
    lock = Lock(workdir / LOCK_FILE)
    try:
        is_taken = lock.take()
    except UserError as error:
        print(f"note: {error}; take care that only one training uses {workdir}")
        is_taken = True
    if not is_taken:
        raise UserError(
            f"{workdir}: a training is under way in it ({lock.holder()}); wait for it, stop it, or "
            "use another workdir"
        )
    try:
        yield
    finally:
        lock.free()


def check_could_be_made(path: Path) -> None:
    """Refuse a folder that `make_folder` could not make, without making it."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path}: cannot be made or written; choose another folder")


def check_same_kind(workdir: Path, earlier: Mapping[str, Any], config: ConfigDict) -> None:
    """Refuse a workdir of another task or layout, whose differences would fill a page."""
    old = (earlier["config"]["task"], earlier["config"]["data"]["layout"])
    new = (config.task, config.data.layout)
    if old != new:
        raise UserError(
            f"{workdir}: holds a run of {old[0]} on {old[1]}, not of {new[0]} on {new[1]}; use "
            "another workdir"
        )
    before = flatten(earlier["config"])
    for key in ("folds", "seeds", "vary"):
        old, new = before[f"training.{key}"], config.training[key]
        if old != new:
            raise UserError(
                f"{workdir}: holds a run with training.{key}={old!r}, not {new!r}; use another "
                "workdir"
            )


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run came as far as a finished checkpoint."""
    return bool(saved_steps(workdir))


def saved_steps(workdir: Path) -> list[int]:
    """Steps of a run's finished checkpoints, in order."""
    return finished_steps(workdir / "checkpoints")


def read_split(workdir: Path, source: Source) -> dict[str, list[int]]:
    """The split that a run saved, as rows of `source`.

    Raises:
        UserError: where it is gone (a new one would validate on what was learnt), or of other data.
    """
    ids = read_split_ids(workdir)
    rows = {name: row for row, name in enumerate(source.ids)}
    missing = [name for names in ids.values() for name in names if name not in rows]
    if missing:
        raise UserError(
            f"{workdir / SPLIT_FILE}: {len(missing)} of its cases, such as {missing[0]}, are not "
            "in the data; give --config.data.path the set that the run was trained on"
        )
    return {part: [rows[name] for name in names] for part, names in ids.items()}


def read_split_ids(workdir: Path) -> dict[str, list[str]]:
    """The ids of each part of the split that a run saved.

    Raises:
        UserError: where it cannot be read.
    """
    path = workdir / SPLIT_FILE
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(parts, dict) or not all(isinstance(p, list) for p in parts.values()):
            raise ValueError("it does not list cases by part")
        lacking = [part for part in ("train", "val") if not parts.get(part)]
        if len(lacking) == 1 or not any(parts.values()):  # folds are in place of both
            raise ValueError(f"it has no cases of {lacking[0]}")
        cases = [name for part, names in parts.items() for name in names]
        if len(set(cases)) < len(cases):
            raise ValueError("a case is in two parts")
        return parts
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it or train anew") from error


def describe_run(
    config: ConfigDict,
    source: Source,
    split: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    notes: Sequence[str],
    members: Sequence[Any] = (),
) -> dict[str, Any]:
    """The content of config.json."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "config": config.to_dict(),
        "seed": config.seed,
        "planned": dict(settings),
        "members": [dataclasses.asdict(member) for member in members],
        "data": {
            "sha256": digest(source),
            "info": dataclasses.asdict(source.info),
            "cases": {part: len(rows) for part, rows in split.items()},
            "class_counts": fingerprint["class_counts"],
            "dtypes": fingerprint["dtypes"],
            "median_shape": np.median(fingerprint["shapes"], axis=0).astype(int).tolist(),
            "spacing": fingerprint["spacing"],
            "notes": list(notes),
        },
        "versions": {
            "python": platform.python_version(),
            "jaxmed": jaxmed.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "devices": [device.device_kind for device in jax.devices()],
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The git commit of the code that runs, with a plus where it was changed; None outside git."""
    folder = Path(__file__).parent
    try:
        head = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=40"]
        done = subprocess.run(head, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_or_compare(workdir: Path, run: dict[str, Any]) -> None:
    """Write config.json, or refuse to go on with a config or data that change the result."""
    path = workdir / CONFIG_FILE
    if not has_checkpoints(workdir):
        if is_first():
            write_json(path, run)
        return
    old = read_run(workdir)
    if old["data"]["sha256"] != run["data"]["sha256"]:
        raise UserError(
            f"{workdir}: was trained on other data than {run['config']['data']['path']}; use "
            "another workdir, or give it the same data"
        )
    # Keys that were not there yet when the run began have their defaults.
    defaults = base_config(run["config"]["task"], run["config"]["data"]["layout"])
    before, now = flatten(defaults) | flatten(old["config"]), flatten(run["config"])
    longer = now["training.steps"] >= before["training.steps"]
    if now["optimizer.schedule"] == "constant" and longer:
        for key in ("training.steps", "training.epochs"):
            before[key] = now[key]
    for key in now:
        # What an earlier plan had set is kept.
        if is_free(key) or key.endswith("_every") or key == "plan":
            before[key] = now[key]
    changed = differences(before, now)
    if changed:
        advice = "use another workdir, or the old values to go on with it"
        length = ("training.steps", "training.epochs")
        if any(line.startswith(length) for line in changed):
            # A warm-up that was given as a share follows the length.
            changed = [line for line in changed if not line.startswith("optimizer.warmup")]
        if all(line.startswith(length) for line in changed):
            what = (
                "a shorter run"
                if not longer
                else (f"under the schedule {now['optimizer.schedule']} a longer run")
            )
            advice = (
                f"{what} is another one: use another workdir, perhaps with "
                f"--config.model.init={workdir}"
            )
        raise UserError(
            f"{workdir}: holds a run with another config ({'; '.join(changed)}); {advice}"
        )
    if is_first():
        write_json(path, {**old, "config": run["config"]})
