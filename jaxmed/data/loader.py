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

from jaxmed.types import Example, UserError

THREADS = 2
BATCHES_AHEAD = 2
EXAMPLES = 2**48
"""Of an endless stream."""


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


@dataclasses.dataclass(frozen=True)
class Stream:
    """What one model learns from: the rows, the seed of their order, and what becomes of each."""

    rows: Sequence[int] | np.ndarray
    seed: int
    prepare: Callable[[Example, np.random.Generator], Example]


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
    stream = Stream(rows, seed, prepare)
    blocks = _blocks(source, stream, batch_size, process_index, process_count)
    return _batches(blocks, start_step, workers)


def joint_batches(
    source: Any,
    streams: Sequence[Stream],
    *,
    batch_size: int,
    start_step: int = 0,
    workers: int = 0,
) -> Batches:
    """Several endless streams at once, along a leading axis: (streams, batch_size, ...).

    Each is as `training_batches` has it: for models that are trained together, each on rows and in
    an order of its own. Arguments and errors are those of `training_batches`.
    """
    together = _Joint([_blocks(source, stream, batch_size, 0, 1) for stream in streams])
    return _batches(grain.MapDataset.source(together), start_step, workers)


def _check(source: Any, rows: Any, batch_size: int, process_count: int) -> None:
    name = getattr(getattr(source, "info", None), "name", "the data")
    if len(rows) == 0:
        raise UserError(f"{name}: no cases to load; check data.path and the split")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.batch_size is {batch_size}; expected a multiple of the {process_count} processes"
        )


def _blocks(
    source: Any, stream: Stream, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    _check(source, stream.rows, batch_size, process_count)
    order = grain.MapDataset.source(np.asarray(stream.rows, np.int64)).seed(stream.seed % 2**32)
    load = _LoadAtRandom(source, stream.prepare, stream.seed)
    # Not endlessly: Grain's number of batches of one example each would overflow.
    examples = order.shuffle().repeat(max(1, EXAMPLES // len(order))).map_with_index(load)
    blocks = examples.batch(batch_size // process_count, batch_fn=stack_examples)
    return blocks.slice(slice(process_index, None, process_count))


class _Joint:
    """The blocks of several streams, stacked along a new leading axis."""

    def __init__(self, blocks: Sequence[grain.MapDataset]):
        self._blocks = blocks

    def __len__(self) -> int:
        return min(len(blocks) for blocks in self._blocks)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return stack_examples([blocks[int(index)] for blocks in self._blocks])


def _batches(blocks: grain.MapDataset, start_step: int, workers: int) -> Batches:
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


def _complete(example: Example, row: int) -> Example:
    return {"valid": np.ones((), np.float32), "index": np.asarray(row, np.int32), **example}


def stack_examples(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Stack examples along a new leading axis.

    Raises:
        UserError: naming the key and the cases whose keys or shapes differ.
    """
    first = examples[0]
    for example in examples:
        for key in first.keys() | example.keys():
            shapes = [np.shape(e[key]) if key in e else None for e in (first, example)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"cases {first['index']} and {example['index']} do not fit into one "
                    f"batch: {key} has shapes {shapes[0]} and {shapes[1]}; set a size or a patch "
                    "(plan=auto does), or data.batch_size=1"
                )
    return {key: np.stack([np.asarray(e[key]) for e in examples]) for key in first}
