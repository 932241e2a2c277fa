"""Checkpoints: the latest two states and the best one. The only file with orbax.

Each is a folder `STEP/state`. Which step was the best is part of every state, so the two cannot
disagree, and a save without an evaluation displaces nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxmed.training.faults import disk_fault
from jaxmed.training.processes import is_first, wait_for_all
from jaxmed.training.state import TrainState
from jaxmed.types import UserError

# A folder STEP.replaced is the former checkpoint of a step that is being saved once more; one
# STEP.superseded is ahead of the state that training went on from, and is left to the user.
REPLACED = ".replaced"
SEAL = "checksums.json"
SUPERSEDED = ".superseded"


@dataclasses.dataclass
class _LatestAndBest:
    """Orbax's preservation policy: all but the latest two and the best may go.

    The last but one is what a training goes on from where the latest turns out to be damaged.
    """

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        latest = sorted(c.step for c in checkpoints)[-2:]
        return [c.step in (*latest, self.best) for c in checkpoints]


class Checkpoints:
    """The checkpoints in a folder; to be closed, or used in a `with` statement.

    Args:
        directory: holds one folder a step; made where missing.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()
        if is_first():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._recover()
        wait_for_all("checkpoints: recovered")
        self._policy = _LatestAndBest()
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Write a global state, in the background unless `wait`; then drop what is outdated.

        Kept are this state, the one before, and the one that state.best names. The arrays may be
        given away (donated) once this returns.

        Raises:
            UserError: where the disk refuses.
        """
        step = int(state.step)
        best = _best_step(state.best)
        self.wait()
        self._policy.best = best
        tree = _to_tree(state)
        self._check_room(tree, f"step {step}")
        replaced = self._make_way(step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree))
        with self._telling(f"step {step}"):
            saved = self._manager.save(step, args=args)
        if not saved:
            raise RuntimeError(f"{self.directory}: orbax left out the checkpoint of step {step}")
        if wait or replaced:
            self.wait()
        if replaced is not None and is_first():
            shutil.rmtree(replaced)

    def restore(self, template: TrainState, *, step: int | str | None = None) -> TrainState:
        """A saved state, in the shapes, types and shardings of `template`.

        Args:
            template: ShapeDtypeStructs or arrays with shardings, on whichever devices there are
                now; those of the run that saved do not matter.
            step: a step, "best", or None for the latest that can be read.

        Raises:
            UserError: where there is no checkpoint, it is broken, or of another model; then the
                first leaf that differs is named.
        """

        def read(number: int) -> TrainState:
            stored = _metadata(self.directory, number)
            _check_fits(f"{self.directory}/{number}", stored, _to_tree(template))
            return self._restore(number, template)

        return _read_first(self.directory, _wanted(self.directory, step), read)

    def _restore(self, step: int, template: TrainState) -> TrainState:
        target = jax.tree.map(_abstract, _to_tree(template))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        tree = self._manager.restore(step, args=args)["state"]
        key = jax.random.wrap_key_data(tree["key"], impl=_key_impl(template.key))
        return TrainState(**{**tree, "key": key})

    def steps(self) -> list[int]:
        """Of the finished checkpoints, in order."""
        return finished_steps(self.directory)

    def latest_step(self) -> int | None:
        """Of the latest finished checkpoint."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Of the checkpoint with the best main score; None before the first evaluation."""
        self.wait()
        return best_step(self.directory)

    def wait(self) -> None:
        """Return when all is written, and sealed: see `_seal`.

        Raises:
            UserError: where the disk refuses.
        """
        with self._telling("a checkpoint"):
            self._manager.wait_until_finished()
            if is_first():
                for number in self.steps():
                    _seal(self.directory / str(number))

    def close(self) -> None:
        """Write what is left and end the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Say it where the disk refuses, of which libraries raise errors of many types."""
        try:
            yield
        except Exception as error:
            if fault := disk_fault(error):
                raise self._cannot_save(what, fault) from error
            raise

    def _cannot_save(self, what: str, why: str) -> UserError:
        left = max(self.steps(), default=None)
        again = "begins anew" if left is None else f"goes on from step {left}"
        return UserError(
            f"{self.directory}: cannot save {what} ({why}); make room and give the same command "
            f"again, which {again}"
        )

    def _check_room(self, tree: Any, what: str) -> None:
        """Before orbax begins, whose threads fill the screen where they cannot write.

        Raises:
            UserError: there is room for less than half of the numbers, which shrink by a tenth or
                so as they are written.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if is_first() and free < size / 2:
            told = f"it has {size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB of the disk are free"
            raise self._cannot_save(what, told)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _make_way(self, step: int) -> Path | None:
        """Move aside checkpoints that a save of `step` cannot stand beside.

        Orbax leaves out, in silence, a save at or before its latest step.
        """
        replaced = None
        ahead = [number for number in finished_steps(self.directory) if number >= step]
        wait_for_all("checkpoints: listed")
        for number in ahead:
            path = self.directory / str(number)
            aside = path.with_name(path.name + (REPLACED if number == step else SUPERSEDED))
            if number == step:
                replaced = aside
            else:
                print(f"{path} is ahead of this run at step {step}; kept as {aside.name}")
            if is_first():
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        if ahead:
            wait_for_all("checkpoints: moved")
            self._manager.reload()
        return replaced

    def _recover(self) -> None:
        """Finish what a process that was killed while replacing a checkpoint left behind."""
        for aside in self.directory.glob("*" + REPLACED):
            path = aside.with_name(aside.name.removesuffix(REPLACED))
            if path.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(path)


def best_step(directory: str | Path) -> int | None:
    """Of the checkpoint with the best main score; None where none was evaluated."""
    directory = Path(directory).absolute()
    steps = finished_steps(directory)[::-1]
    if not steps:
        return None
    best = _read_first(directory, steps, lambda n: _read_arrays(directory, n, ("best",)))["best"]
    return _best_step(best)


def restore_variables(
    directory: str | Path, *, step: int | str | None = "best"
) -> tuple[dict[str, Any], int]:
    """What prediction needs of a checkpoint, as NumPy arrays, on any machine.

    Args:
        directory: of the checkpoints of a run.
        step: a step, "best" (the latest where none was evaluated), or None for the latest.

    Returns:
        The network's variables, the moving average where there is one, and their step.

    Raises:
        UserError: where there is none, it cannot be read, or it holds several models.
    """
    directory = Path(directory).absolute()

    def read(number: int) -> tuple[dict[str, Any], int]:
        found = _read_arrays(directory, number, ("params", "ema", "model_state", "best"))
        if "variables" in found["best"]:
            raise UserError(
                f"{directory}: holds models trained together; give the run of a single one"
            )
        return found["ema"] or {"params": found["params"], **found["model_state"]}, number

    return _read_first(directory, _wanted(directory, step), read)


def restore_members(directory: str | Path) -> dict[str, Any]:
    """The best of each of the models that were trained together, as NumPy arrays.

    Returns:
        `best` of the latest state that can be read: "variables", "score" and "step", each with the
        models along the first axis.

    Raises:
        UserError: where there is none, or it cannot be read.
    """
    directory = Path(directory).absolute()
    steps = _wanted(directory, None)
    return _read_first(directory, steps, lambda n: _read_arrays(directory, n, ("best",)))["best"]


def merge_params(new: Any, old: Any) -> tuple[Any, dict[str, list[str]]]:
    """Parameters of a new model with those of an old one wherever path and shape agree.

    Returns:
        The merged tree, and lists of paths: "loaded", "reshaped" (other shape, as the last layer
        for another number of classes), "missing" (not in the old) and "unused" (only there);
        those of "reshaped" and "missing" keep their new values.
    """
    given = _by_path(old)
    report: dict[str, list[str]] = {"loaded": [], "reshaped": [], "missing": []}

    def choose(path: Any, value: Any) -> Any:
        name = _name(path)
        if name not in given:
            report["missing"].append(name)
            return value
        if np.shape(given[name]) != np.shape(value):
            report["reshaped"].append(name)
            return value
        report["loaded"].append(name)
        return np.asarray(given[name]).astype(value.dtype)

    merged = jax.tree_util.tree_map_with_path(choose, new)
    report["unused"] = sorted(given.keys() - _by_path(new).keys())
    return merged, report


def _to_tree(state: TrainState) -> dict[str, Any]:
    """A dict of the state with the key as numbers, so that any reader can tell what it holds."""
    tree = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    key = tree["key"]
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        tree["key"] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        tree["key"] = jax.random.key_data(key)
    return tree


def _key_impl(key: Any) -> Any:
    """The kind of a typed key, which may be a ShapeDtypeStruct."""
    found = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
    return found[0]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def finished_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints; an unfinished one has a longer name."""
    named = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in named if name.isdigit() and name == str(int(name)))


def _wanted(directory: Path, step: int | str | None) -> list[int]:
    """Steps to try in turn."""
    steps = finished_steps(directory)
    if not steps:
        raise UserError(f"{directory}: there is no checkpoint; train first, or check the path")
    if step == "best":
        step = best_step(directory)
        if step is not None and step not in steps:
            print(f"{directory}: the best checkpoint, of step {step}, is gone; the latest is used")
            step = None
    if step is None:
        return steps[::-1]
    if int(step) not in steps:
        raise UserError(f"{directory}: there is no checkpoint of step {step}; there are {steps}")
    return [int(step)]


def _best_step(best: Any) -> int | None:
    """Which checkpoint is the best; none where states hold the best of several models."""
    return int(best["step"]) if "variables" not in best and np.isfinite(best["score"]) else None


def _read_first(directory: Path, steps: list[int], read: Callable[[int], Any]) -> Any:
    """What `read` returns of the first step that is whole and that it can read."""
    for number in steps:
        try:
            _check_seal(directory / str(number))
            return read(number)
        except UserError:
            raise
        except Exception as error:  # Of a broken file, orbax raises any of a dozen types.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            message = f"{directory}/{number}: the checkpoint cannot be read ({reason})"
            if number == steps[-1]:
                advice = "restore it from a copy, or train anew in another workdir"
                if others := [str(n) for n in finished_steps(directory) if n not in steps]:
                    advice = f"restore it from a copy, or remove it to use step {others[-1]}"
                raise UserError(f"{message}; {advice}") from error
            print(f"{message}; trying the one before")
    raise AssertionError("called with at least one step")


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of a checkpoint, by its path within."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                size = crc = 0
                while part := file.read(2**22):
                    size, crc = size + len(part), zlib.crc32(part, crc)
            found[path.relative_to(folder).as_posix()] = [size, crc]
    return found


def _seal(folder: Path) -> None:
    """Note what a finished checkpoint consists of: its format does not tell changed numbers."""
    if not (folder / SEAL).exists():
        draft = folder / f"{SEAL}.part"
        draft.unlink(missing_ok=True)
        text = json.dumps(_checksums(folder))
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, folder / SEAL)


def _check_seal(folder: Path) -> None:
    """ValueError where a checkpoint is not what it was when it was sealed.

    One without a seal, as a kill right after it was written leaves it, is taken as it is. Files
    that came later, such as those that systems leave in folders looked at, change nothing.
    """
    if not (folder / SEAL).is_file():
        return
    noted, found = json.loads((folder / SEAL).read_text(encoding="utf-8")), _checksums(folder)
    for name in noted:
        if noted[name] != found.get(name):
            raise ValueError(f"{name} is damaged")


def _metadata(directory: Path, step: int) -> Any:
    # The handler, since orbax's own reader of a single item warns about a file it never wrote.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(directory / str(step) / "state").tree
    finally:
        handler.close()


def _read_arrays(directory: Path, step: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Some parts of a checkpoint as NumPy arrays."""
    stored = _metadata(directory, step)
    item = {name: stored[name] for name in names}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.restore(directory / str(step) / "state", args=args)
    finally:
        handler.close()


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_fits(where: str, stored: Any, wanted: Any) -> None:
    """Raise a UserError that names the first leaf in which a checkpoint and a state differ."""
    for name, problem in _differences(_by_path(stored), _by_path(wanted)):
        raise UserError(
            f"{where}: {name} {problem}; it is of another model or optimizer, use its config or "
            "another workdir"
        )


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, leaf in wanted.items():
        if name not in stored:
            yield name, "is missing in the checkpoint"
        elif tuple(stored[name].shape) != tuple(leaf.shape):
            yield name, f"has shape {tuple(stored[name].shape)}, expected {tuple(leaf.shape)}"
        # Orbax would cast in silence.
        elif np.dtype(stored[name].dtype) != np.dtype(leaf.dtype):
            yield name, f"has type {stored[name].dtype}, expected {leaf.dtype}"
    for name in sorted(stored.keys() - wanted.keys()):
        yield name, "is in the checkpoint, but not in this model"
