import os
import pickle
import threading

import numpy as np
import pytest

from jaxmed.data.cache import Cached
from jaxmed.data.loader import Stream, joint_batches, stack_examples, training_batches
from jaxmed.types import UserError


class Numbers:
    """Cases that are their own number."""

    def __init__(self, cases=10):
        self.cases = cases
        self.reads = 0

    def __len__(self):
        return self.cases

    def __getitem__(self, row):
        self.reads += 1
        return {"image": np.full((3, 3, 1), row, np.uint8), "process": np.asarray(os.getpid())}


def draw(example, rng):
    return {**example, "drawn": np.asarray(rng.random(), np.float32)}


def take(count, **options):
    options = {"batch_size": 4, "seed": 3, "prepare": draw, **options}
    with training_batches(Numbers(), range(10), **options) as batches:
        return [next(batches) for _ in range(count)]


def same(one, other, keys=("image", "index", "drawn")):
    return all(np.array_equal(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in keys)


def test_each_row_comes_once_an_epoch_in_a_new_order():
    indices = np.concatenate([b["index"] for b in take(15)])
    epochs = indices.reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert not same(take(3), take(3, seed=4))


def test_random_numbers_follow_the_position():
    batches = take(4)
    for step, batch in enumerate(batches):
        for place in range(4):
            expected = np.random.default_rng([3, step * 4 + place]).random()
            assert batch["drawn"][place] == np.float32(expected)
    drawn = np.concatenate([b["drawn"] for b in batches])
    assert len(set(drawn)) == 16


def test_resumes_at_any_step():
    assert same(take(9)[5:], take(4, start_step=5))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    batches = take(6, workers=2, start_step=1)
    assert same(take(7)[1:], batches)
    assert os.getpid() not in np.concatenate([b["process"] for b in batches])


def test_processes_share_each_global_batch():
    whole = take(5)
    parts = [take(5, process_index=p, process_count=2) for p in range(2)]
    assert parts[0][0]["image"].shape == (2, 3, 3, 1)
    joined = [
        {k: np.concatenate([parts[0][s][k], parts[1][s][k]]) for k in whole[0]} for s in range(5)
    ]
    assert same(whole, joined)
    again = [take(2, process_index=p, process_count=2, start_step=3) for p in range(2)]
    assert same(again[1], parts[1][3:])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streams_side_by_side_are_each_as_if_alone(workers):
    streams = [Stream(range(10), 3, draw), Stream([1, 4, 7], 8, draw)]
    options = {"batch_size": 4, "start_step": 2, "workers": workers}
    with joint_batches(Numbers(), streams, **options) as batches:
        joint = [next(batches) for _ in range(4)]
    assert joint[0]["image"].shape == (2, 4, 3, 3, 1)
    assert same([{k: x[0] for k, x in b.items()} for b in joint], take(4, start_step=2))
    with training_batches(Numbers(), [1, 4, 7], batch_size=4, seed=8, prepare=draw) as batches:
        alone = [next(batches) for _ in range(6)][2:]
    assert same([{k: x[1] for k, x in b.items()} for b in joint], alone)


def test_a_closed_iterator_ends():
    batches = training_batches(Numbers(), range(3), batch_size=2, seed=0, prepare=draw)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no cases"):
        training_batches(Numbers(), [], batch_size=2, seed=0, prepare=draw)
    with pytest.raises(UserError, match="multiple of the 3"):
        training_batches(Numbers(), [1], batch_size=4, seed=0, prepare=draw, process_count=3)
    ragged = [
        {"image": np.zeros((n, 3, 1), np.float32), "index": np.asarray(n, np.int32)} for n in (2, 3)
    ]
    with pytest.raises(UserError, match="cases 2 and 3.*image has shapes"):
        stack_examples(ragged)


class Broken(Numbers):
    def __getitem__(self, row):
        raise UserError(f"case{row}.png: cannot be read")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_source_reach_the_caller(workers):
    with (
        training_batches(
            Broken(), [4], batch_size=1, seed=0, prepare=draw, workers=workers
        ) as batches,
        pytest.raises(UserError, match="case4.png"),
    ):
        next(batches)


def test_cache_keeps_what_fits_and_protects_it():
    source = Numbers()
    size = sum(v.nbytes for v in source[0].values())
    source.reads = 0
    cached = Cached(source, max_bytes=3 * size, transform=lambda e: {**e, "image": e["image"] + 1})
    for _ in range(2):
        for row in range(5):
            assert cached[row]["image"].max() == row + 1
    assert source.reads == 5 + 2  # three were kept
    assert cached.used == 3 * size
    with pytest.raises(ValueError, match="read-only"):
        cached[0]["image"][:] = 0
    example = cached[0]
    example["image"] = np.zeros(1)  # the dict is the caller's own
    assert cached[0]["image"].max() == 1


def test_cache_may_be_shared_by_threads_and_sent_to_processes():
    source = Numbers(40)
    size = sum(v.nbytes for v in source[0].values())
    cached = Cached(source, max_bytes=25 * size)
    threads = [threading.Thread(target=lambda: [cached[i] for i in range(40)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cached.used == 25 * size
    copy = pickle.loads(pickle.dumps(cached))
    assert copy.used == 0
    assert copy[3]["image"].max() == 3
