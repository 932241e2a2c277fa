"""Several processes, on one machine or many, that work as one: who is first, and what all know.

Everything here does nothing, at no cost, where there is one process. All processes must call these
functions in the same order, as they must run the same programs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20
"""A process that was silent for so long is lost, and ends the others. (JAX's default is 100.)"""


def connect(*, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Join the other processes; must come before anything else asks JAX for devices.

    Args:
        coordinator: HOST:PORT where process 0 listens; empty asks the cluster (SLURM, Open MPI,
            Kubernetes and TPU pods are known to JAX).
        processes: how many there are, where `coordinator` is given.
        process: number of this one, likewise.

    Raises:
        RuntimeError, ValueError: where JAX cannot join them.
    """
    given: dict[str, Any] = {}
    if coordinator:
        given = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when all processes are here; `name` says where, to all of them the same."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def share_of(items: Sequence[Any]) -> list[Any]:
    """Every n-th item: those that this process deals with."""
    return list(items[jax.process_index() :: jax.process_count()])


def gather_bytes(content: bytes) -> list[bytes]:
    """What each process has, in the order of their numbers."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.asarray(len(content), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    every = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(every, sizes.tolist(), strict=True)]


def gather_json(items: Sequence[Any]) -> list[Any]:
    """The items of all processes, process by process; they must be what JSON can hold."""
    if jax.process_count() == 1:
        return list(items)
    return [i for part in gather_bytes(json.dumps(list(items)).encode()) for i in json.loads(part)]


def gather_rows(rows: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Numbers and arrays by row and name, of all processes, in the order of the row numbers."""
    if jax.process_count() == 1:
        return {row: dict(values) for row, values in rows.items()}
    file = io.BytesIO()
    arrays = {
        f"{row}:{n}": np.asarray(v) for row, values in rows.items() for n, v in values.items()
    }
    np.savez(file, allow_pickle=False, **arrays)
    found: dict[int, dict[str, Any]] = {}
    for part in gather_bytes(file.getvalue()):
        with np.load(io.BytesIO(part), allow_pickle=False) as stored:
            for key in stored.files:
                row, name = key.split(":", 1)
                value = stored[key]
                plain = value.ndim == 0 and value.dtype == np.float64
                found.setdefault(int(row), {})[name] = float(value) if plain else value
    return dict(sorted(found.items()))


def local_copy(tree: Any) -> Any:
    """Arrays that every device holds whole, as arrays of this process alone."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)
