"""Prepared cases on disk: written once into ArrayRecord shards, read one by one at random.

A set is a folder of shards and an index, which is written last: without it the set is unfinished,
and writing goes on with the shards that are missing. A case is a record with a JSON header and the
bytes of its small arrays, and a record for each block of its large ones, so that a patch is read
without the rest; the last record of a shard says where each case begins. Nothing of it is ever run.
ArrayRecord keeps a checksum of each record, so a flipped bit is found when it is read.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxmed.data.quality import THREADS
from jaxmed.data.records import decode, encode
from jaxmed.data.sources.findings import DataError
from jaxmed.types import DatasetInfo, Example, UserError

VERSION = 4
INDEX_FILE = "index.json"
SHARD_BYTES = 2**26
"""Of the arrays of a shard, about: what an interrupted run has to do again at most."""

ABANDONED_SECONDS = 86_400.0
"""After which a file that nobody went on writing is taken for a killed writer's."""


def write_shards(
    read: Callable[[int], Example],
    rows: Sequence[int],
    ids: Sequence[str],
    folder: Path,
    *,
    key: str,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write what is missing of a set, each shard whole or not at all.

    Cases are prepared in threads, a few at a time, so the memory does not grow with the set. A
    run that was killed goes on after the last shard that it finished; two at once do the same work
    twice and no harm.

    Args:
        read: row -> prepared case.
        rows: of the cases.
        ids: of all rows of the source.
        folder: of the set; made where missing.
        key: of all that decides what is in it.
        progress: called with the number of cases there so far.

    Returns:
        Cases that were written now.

    Raises:
        UserError: where a case cannot be read, or the disk not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        first = sum(np.asarray(array).nbytes for array in read(rows[0]).values())
        each = max(1, SHARD_BYTES // max(first, 1))
        blocks = [list(rows[i : i + each]) for i in range(0, len(rows), each)]
        names = [f"shard-{i:05d}-of-{len(blocks):05d}.array_record" for i in range(len(blocks))]
        done = written = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for name, block in zip(names, blocks, strict=True):
                if not (folder / name).exists():
                    for _ in _write_shard(folder / name, _ahead(pool, read, block), ids):
                        written += 1
                        progress(done + written)
                else:
                    done += len(block)
                    progress(done + written)
        shards = [
            {"file": name, "rows": block, "bytes": (folder / name).stat().st_size}
            for name, block in zip(names, blocks, strict=True)
        ]
        index = {"version": VERSION, "key": key, "shards": shards}
        with _new_file(folder / INDEX_FILE) as part:
            part.write_text(json.dumps(index), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); check "
            "that there is permission, and space on the disk"
        ) from error
    return written


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], Example], rows: Iterable[int]
) -> Iterator[tuple[int, Example]]:
    """Cases in order, the next ones being read meanwhile."""
    waiting: collections.deque[tuple[int, Future[Example]]] = collections.deque()
    for row in rows:
        waiting.append((row, pool.submit(read, row)))
        if len(waiting) > THREADS:
            row, future = waiting.popleft()
            yield row, future.result()
    while waiting:
        row, future = waiting.popleft()
        yield row, future.result()


def _write_shard(
    path: Path, cases: Iterable[tuple[int, Example]], ids: Sequence[str]
) -> Iterator[int]:
    """Write one shard under a hidden name, then give it its own; yields the rows as they go."""
    with _new_file(path) as part:
        # One record a group, or reading one would read its neighbours too.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        starts, count = [], 0
        for row, example in cases:
            starts.append(count)
            for record in encode(example, name=ids[row]):
                _write(writer.write, record)
                count += 1
            yield row
        _write(writer.write, json.dumps(starts).encode())
        _write(writer.close)


def _write(call: Callable[..., Any], *content: bytes) -> None:
    """Call a writer, whose errors of a full disk are no OSError."""
    try:
        call(*content)
    except (RuntimeError, ValueError) as error:
        raise OSError(None, " ".join(str(error).split())[:200]) from error


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A hidden name to write to, which becomes `path` once it is whole and on the disk."""
    # Not by the process number, which other machines of a shared folder have too.
    part = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield part
        _sync(part)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left, but not what one that is still at work writes to."""
    for part in folder.glob(".*.array_record"):
        with contextlib.suppress(OSError):  # another writer may be as quick
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()


def _sync(path: Path) -> None:
    """See that a file is on the disk before it gets its name, lest a crash leaves it empty."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Shards:
    """The cases of a prepared set, by row of its source.

    Large arrays are `BlockedArray`s, which read from the disk what is asked of them. Threads and
    processes may share a set: each process opens the files for itself.

    Args:
        folder: as `write_shards` wrote it.
        key: that it must have.
        info: of the source.

    Raises:
        UserError: where the set is unfinished or of another key.
    """

    def __init__(self, folder: Path, *, key: str, info: DatasetInfo):
        self.info = info
        self._folder = folder
        index = read_index(folder)
        if index is None or index["version"] != VERSION or index["key"] != key:
            raise UserError(f"{folder}: holds no finished set of this data and plan; prepare it")
        self._places = {
            row: (shard["file"], place)
            for shard in index["shards"]
            for place, row in enumerate(shard["rows"])
        }
        self._start()

    def _start(self) -> None:
        self._readers: dict[str, tuple[Any, list[int]]] = {}  # with where each case begins
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def __getitem__(self, row: int) -> Example:
        read = functools.partial(self._read, int(row))
        [first] = read([0])
        with self._told(int(row)):
            return decode(first, read)

    def _read(self, row: int, numbers: Sequence[int]) -> list[bytes]:
        """Records of a case, by their numbers in it."""
        file, place = self._places[row]
        with self._told(row), self._lock:  # a reader is not for several threads
            if file not in self._readers:
                path = str(self._folder / Path(file).name)
                reader = ArrayRecordReader(path, "readahead_buffer_size:0")
                [starts] = reader.read([reader.num_records() - 1])
                self._readers[file] = reader, json.loads(starts)
            reader, starts = self._readers[file]
            return reader.read([starts[place] + number for number in numbers])

    @contextlib.contextmanager
    def _told(self, row: int) -> Iterator[None]:
        """Errors of reading a case as one that says which file to delete."""
        path = self._folder / Path(self._places[row][0]).name
        try:
            yield
        except (RuntimeError, LookupError, ValueError, TypeError, OSError, struct.error) as error:
            # Numbers that are damaged are of the wrong type to the reader.
            said = "damaged" if isinstance(error, TypeError) else " ".join(str(error).split())[:200]
            told = f"{path}, case {row}: cannot be read ({said})"
            raise DataError(
                f"{told}; delete this file, and the same command prepares it again", [told]
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process starts from: no open file."""
        return {k: v for k, v in vars(self).items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._start()


def is_finished(folder: Path, *, key: str) -> bool:
    """Whether a set is whole: its index of this key is there, and all shards that it names.

    Raises:
        UserError: where the index cannot be read, or a shard is not as long as it was.
    """
    index = read_index(folder)
    if index is None or (index["version"], index["key"]) != (VERSION, key):
        return False
    for shard in index["shards"]:
        path = folder / Path(shard["file"]).name
        if not path.is_file():
            return False
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{path}: has {path.stat().st_size} bytes and had {shard['bytes']}; delete this "
                "file, and the same command prepares it again"
            )
    return True


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a prepared set; None where it is unfinished.

    Raises:
        UserError: where it cannot be read.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        lacking = {"version", "key", "shards"} - index.keys()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to prepare again") from error
    return index
