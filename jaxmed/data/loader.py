"""Batches from a source: in order or shuffled, by threads or processes. The only file with grain.

Batch `s` of a training stream is a pure function of (seed, s), so resuming is starting at another
`s`, whatever the number of workers, and however many processes share the stream.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np

from jaxmed.types import Example, Transform, UserError

THREADS = 2
BATCHES_AHEAD = 2


class Batches:
    """An iterator over batches, to be closed, or used in a `with` statement."""

    def __init__(self, dataset: grain.IterDataset):
        self._iterator: Any = iter(dataset)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and worker processes; may be called twice."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def training_batches(
    source: Any,
    rows: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    seed: int,
    prepare: Callable[[Example, np.random.Generator], Example],
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """An endless stream of batches of this process's part of each global batch.

    The rows are shuffled anew each epoch; batches run on over its end. Process p of P holds the
    examples [p b, (p + 1) b) of each global batch of B = P b.

    Args:
        source: anything with `source[row] -> Example`.
        rows: those to draw from.
        batch_size: of the global batch.
        seed: of the order and of `prepare`.
        prepare: (example, rng) -> example of static shapes; the rng is a pure function of
            (seed, position in the global stream). With workers it must be picklable, and it must
            not change the arrays it is given.
        start_step: the batch to begin with.
        workers: processes that read and prepare; 0 uses threads of this one.
        process_index: of this process among those that train together.
        process_count: how many they are.

    Raises:
        UserError: for no rows, or a batch that the processes cannot share equally.
    """
    _check(source, rows, batch_size, process_count)
    order = grain.MapDataset.source(np.asarray(rows, np.int64)).seed(seed % 2**32)
    stream = order.shuffle().repeat().map_with_index(_LoadAtRandom(source, prepare, seed))
    return _batches(stream, batch_size, start_step, workers, process_index, process_count)


def evaluation_batches(
    source: Any,
    rows: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    prepare: Transform,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Each row once, in order; the last batch is filled up with examples of `valid` 0.

    All processes get equally many batches, of equal shapes. Arguments and errors are those of
    `training_batches`.
    """
    _check(source, rows, batch_size, process_count)
    padded = -(-len(rows) // batch_size) * batch_size
    local = batch_size // process_count
    load = _LoadInOrder(source, prepare, np.asarray(rows, np.int64), local)
    stream = grain.MapDataset.range(padded).map(load)
    return _batches(stream, batch_size, 0, workers, process_index, process_count)


def _check(source: Any, rows: Any, batch_size: int, process_count: int) -> None:
    name = getattr(getattr(source, "info", None), "name", "the data")
    if len(rows) == 0:
        raise UserError(f"{name}: no cases to load; check data.path and the split")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.batch_size is {batch_size}; expected a multiple of the {process_count} processes"
        )


def _batches(
    stream: grain.MapDataset,
    batch_size: int,
    start_step: int,
    workers: int,
    process_index: int,
    process_count: int,
) -> Batches:
    blocks = stream.batch(batch_size // process_count, batch_fn=stack_examples)
    blocks = blocks.slice(slice(process_index, None, process_count))
    blocks = blocks.slice(slice(start_step, None))
    # Grain would hold 500 batches by default.
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    dataset = blocks.to_iter_dataset(options)
    if workers:
        if not absl.flags.FLAGS.is_parsed():  # Grain's processes read flags, a notebook has none.
            absl.flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=_ignore_interrupt)
    return Batches(dataset)


def _ignore_interrupt(index: int, count: int) -> None:
    """Let Ctrl-C reach only the main process, which then ends its workers in good order."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclasses.dataclass(frozen=True)
class _LoadAtRandom:
    source: Any
    prepare: Callable[[Example, np.random.Generator], Example]
    seed: int

    def __call__(self, position: int, row: Any) -> Example:
        rng = np.random.default_rng([self.seed % 2**63, position])
        return _complete(self.prepare(dict(self.source[int(row)]), rng), int(row))


@dataclasses.dataclass(frozen=True)
class _LoadInOrder:
    source: Any
    prepare: Transform
    rows: np.ndarray
    local: int

    def __call__(self, position: int) -> Example:
        if position < len(self.rows):
            row = int(self.rows[position])
            return _complete(self.prepare(dict(self.source[row])), row)
        if position % self.local:
            return {}  # filled up from the first of its block, without reading a file
        row = int(self.rows[-1])
        example = _complete(self.prepare(dict(self.source[row])), row)
        return {**example, "valid": np.zeros((), np.float32)}


def _complete(example: Example, row: int) -> Example:
    return {"valid": np.ones((), np.float32), "index": np.asarray(row, np.int32), **example}


def stack_examples(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Stack examples along a new leading axis; empty ones become copies with `valid` 0.

    Raises:
        UserError: naming the key and the cases whose keys or shapes differ.
    """
    first = examples[0]
    filled = [e or {**first, "valid": np.zeros((), np.float32)} for e in examples]
    for example in filled:
        for key in first.keys() | example.keys():
            shapes = [np.shape(e[key]) if key in e else None for e in (first, example)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"cases {int(first['index'])} and {int(example['index'])} do not fit into one "
                    f"batch: {key} has shapes {shapes[0]} and {shapes[1]}; set a size or a patch "
                    "(plan=auto does), or data.batch_size=1"
                )
    return {key: np.stack([np.asarray(e[key]) for e in filled]) for key in first}
