"""Prepared cases on disk: whole or not there, and never read where they are damaged."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxmed.data import records, shards
from jaxmed.data.records import BlockedArray, decode, encode
from jaxmed.data.shards import INDEX_FILE, Shards, is_finished, write_shards
from jaxmed.data.sources.base import Case, FileSource
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.preprocessing.patches import find_foreground, random_patch
from jaxmed.types import UserError

INFO = Phantoms("cells", task="segmentation", size=16, count=1).info
IDS = [f"case{row}" for row in range(40)]


def case(row):
    rng = np.random.default_rng(row)
    return {
        "image": rng.normal(size=(16, 12, 1)).astype(np.float32),
        "mask": rng.integers(0, 3, (16, 12)).astype(np.int32),
        "index": np.asarray(row, np.int32),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 8 * (16 * 12 * 8 + 4))
    assert write_shards(case, range(0, 40, 2), IDS, tmp_path / "set", key="k") == 20
    return tmp_path / "set"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_record_comes_back_as_it_was():
    example = {**case(1), "on": np.array([True, False]), "scale": np.ones(2), "none": np.zeros(0)}
    for low, high in [(0, 255), (0, 256), (-1, 0), (-32768, 32767), (-32769, 0), (0, 2**31 - 1)]:
        example[f"{low} to {high}"] = np.array([low, high], np.int32)
    example["far"] = np.array([-(2**40), 2**40])
    assert_same(around(example), example)
    lean, full = ({"mask": case(1)["mask"] + more} for more in (0, 10**6))
    [lean], [full] = encode(lean, name="a"), encode(full, name="a")
    assert len(lean) < len(full) - 500, "stored as bytes"


def around(example, read=()):
    """A case as records and back; `read` takes the numbers of those that were asked for."""
    stored = encode(example, name="a")

    def fetch(numbers):
        read and read[0].extend(numbers)
        return [stored[number] for number in numbers]

    return decode(stored[0], fetch)


@pytest.mark.parametrize("shape", [(37, 20, 11, 1), (200, 64, 3), (5000,), (2, 3, 2000)])
def test_of_large_arrays_only_the_blocks_are_read_that_a_region_touches(shape, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_BYTES", 512)
    rng = np.random.default_rng(0)
    example = {
        "image": rng.normal(size=shape).astype(np.float32),
        "mask": rng.integers(0, 4, shape).astype(np.int32),
        "spacing": np.ones(3, np.float32),
    }
    asked = []
    found = around(example, [asked])
    assert not asked, "nothing but the header until something is asked for"
    assert isinstance(found["spacing"], np.ndarray)
    for name in ("image", "mask"):
        assert isinstance(found[name], BlockedArray)
        assert found[name].shape == shape and found[name].nbytes == example[name].nbytes
        np.testing.assert_array_equal(np.asarray(found[name]), example[name])
        for _ in range(20):
            low = [int(rng.integers(0, side + 1)) for side in shape]
            high = [int(rng.integers(a, side + 4)) for a, side in zip(low, shape, strict=True)]
            region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            for part in (region, region[:1], region[0]):
                cut = found[name][part]
                assert cut.dtype == example[name].dtype
                np.testing.assert_array_equal(cut, example[name][part])
    asked.clear()
    found["image"][tuple(slice(0, 1) for _ in shape)]
    assert asked == [1], "the first block of the first array"
    with pytest.raises(ValueError, match="steps"):
        found["image"][::2]


def test_a_patch_on_disk_is_a_patch_in_memory(monkeypatch):
    monkeypatch.setattr(records, "BLOCK_BYTES", 300)
    example = case(3)
    stored = around(example)
    for foreground in (0.0, 1.0):
        for shape in ((8, 8), (20, 8)):
            one, other = (
                random_patch(
                    {**given, **find_foreground(example["mask"], rng=np.random.default_rng(0))},
                    shape=shape,
                    rng=np.random.default_rng(1),
                    foreground=foreground,
                )
                for given in (example, stored)
            )
            assert_same(other, one)


def test_what_killed_writers_left_goes_and_what_others_write_stays(folder):
    old, new = (folder / f".{name}.shard-00000-of-00003.array_record" for name in "ab")
    for part in (old, new):
        part.touch()
    os.utime(old, (0, 0))
    write_shards(case, range(0, 40, 2), IDS, folder, key="k")
    assert new.exists() and not old.exists()


def test_cases_come_back_by_their_rows_in_threads_and_processes(folder):
    assert len(list(folder.glob("shard-*"))) == 3
    found = Shards(folder, key="k", info=INFO)
    assert len(found) == 20 and 4 in found and 5 not in found
    rows = np.random.default_rng(0).permutation(range(0, 40, 2)).tolist()
    with ThreadPoolExecutor(4) as pool:
        for row, example in zip(rows, pool.map(found.__getitem__, rows), strict=True):
            assert_same(example, case(row))
    assert_same(pickle.loads(pickle.dumps(found))[6], case(6))


def test_another_key_or_an_unfinished_set_is_refused(folder):
    with pytest.raises(UserError, match="no finished set of this data and plan"):
        Shards(folder, key="other", info=INFO)
    (folder / INDEX_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: cannot be read"):
        is_finished(folder, key="k")
    (folder / INDEX_FILE).unlink()
    assert not is_finished(folder, key="k")
    with pytest.raises(UserError, match="no finished set"):
        Shards(folder, key="k", info=INFO)


def test_only_what_is_missing_is_written_again(folder):
    files = sorted(folder.glob("shard-*"))
    files[1].unlink()
    assert not is_finished(folder, key="k")
    before = files[0].stat().st_mtime_ns
    assert write_shards(case, range(0, 40, 2), IDS, folder, key="k") == 8
    assert files[0].stat().st_mtime_ns == before
    assert is_finished(folder, key="k")
    assert_same(Shards(folder, key="k", info=INFO)[18], case(18))


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_found_and_named(folder, seed):
    rng = np.random.default_rng(seed)
    path = sorted(folder.glob("shard-*"))[1]
    whole = path.read_bytes()
    written = np.flatnonzero(np.frombuffer(whole, np.uint8))  # not the padding of a small file
    damaged = 0
    for _ in range(40):
        content = bytearray(whole)
        content[rng.choice(written)] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        found = Shards(folder, key="k", info=INFO)
        for row in range(16, 32, 2):
            try:
                example = found[row]
            except UserError as error:
                damaged += 1
                assert path.name in str(error) and "delete this file" in str(error)
            else:  # the bit was of no record, or of another one
                assert_same(example, case(row))
    assert damaged >= 20


def test_a_file_cut_short_is_found_and_named(folder):
    path = sorted(folder.glob("shard-*"))[2]
    path.write_bytes(path.read_bytes()[:-300])
    found = Shards(folder, key="k", info=INFO)
    with pytest.raises(UserError, match=path.name):
        for row in range(32, 40, 2):
            found[row]


def test_a_shard_of_another_length_is_not_called_ready(folder):
    path = sorted(folder.glob("shard-*"))[1]
    assert is_finished(folder, key="k")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{path.name}: has .* bytes and had .*; delete this file"):
        is_finished(folder, key="k")
    path.unlink()
    assert not is_finished(folder, key="k")
    assert write_shards(case, range(0, 40, 2), IDS, folder, key="k") == 8
    assert is_finished(folder, key="k")


def test_what_is_wrong_with_a_shard_is_told_once(folder):
    path = sorted(folder.glob("shard-*"))[0]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        Shards(folder, key="k", info=INFO)[0]
    assert str(error.value).count("cannot be read") == 1


def test_a_case_that_cannot_be_read_leaves_whole_shards_only(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 8 * (16 * 12 * 8 + 4))

    def broken(row):
        if row == 12:
            raise UserError("case12.png: cut short")
        return case(row)

    with pytest.raises(UserError, match="case12"):
        write_shards(broken, range(20), IDS, tmp_path, key="k")
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000-of-00003.array_record"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_shards(case, range(4), IDS, tmp_path / "file" / "set", key="k")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(self, record):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(
        shards, "ArrayRecordWriter", type("W", (), {"__init__": lambda *_: None, "write": full})
    )
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        write_shards(case, range(4), IDS, tmp_path / "set", key="k")
    assert list((tmp_path / "set").iterdir()) == []


def test_a_type_that_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(UserError, match="case3: image is uint16"):
        encode({"image": np.zeros(3, np.uint16)}, name="case3")


WRITER = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from jaxmed.data import shards

    def read(row):
        time.sleep(float(sys.argv[2]))
        return {"image": np.full((100, 1000), row, np.float32), "index": np.int32(row)}

    shards.SHARD_BYTES = 4 * 400_004
    names = [str(row) for row in range(40)]
    done = shards.write_shards(read, range(40), names, Path(sys.argv[1]), key="k")
    print(done)
"""


def start_writer(folder, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_loses_no_shard_and_two_at_once_do_no_harm(tmp_path):
    first = start_writer(tmp_path / "set", 0.05)
    while len(list((tmp_path / "set").glob("shard-*"))) < 3:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not is_finished(tmp_path / "set", key="k")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("shard-*")}
    pair = [start_writer(tmp_path / "set", 0.0) for _ in range(2)]
    written = [int(process.communicate()[0]) for process in pair]
    assert max(written) <= 40 - 4 * len(kept)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    found = Shards(tmp_path / "set", key="k", info=INFO)
    for row in range(40):
        assert (np.asarray(found[row]["image"]) == row).all()


LARGE = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from jaxmed.data.records import BlockedArray
    from jaxmed.data.shards import Shards, write_shards
    from jaxmed.data.sources.phantoms import Phantoms

    def most():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def read(row):
        return {"image": np.full((64, 256, 256, 1), row, np.float32), "index": np.int32(row)}

    before, names = most(), [str(row) for row in range(25)]
    write_shards(read, range(25), names, Path(sys.argv[1]), key="k")
    written = most()
    info = Phantoms("cells", task="segmentation", size=16, count=1).info
    found = Shards(Path(sys.argv[1]), key="k", info=info)
    for row in range(25):
        assert (found[row]["image"][10:40, 100:130, 100:130] == row).all()
    print(written - before, most() - written)
"""


def test_memory_does_not_grow_with_the_set(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(LARGE), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    writing, reading = map(int, done.stdout.split())
    assert sum(path.stat().st_size for path in (tmp_path / "set").iterdir()) > 400 * 2**20
    assert writing < 300 and reading < 30, "MiB beside what the libraries take"


def test_a_stamp_changes_with_any_file_or_box_and_with_nothing_else(tmp_path):
    series, picture = tmp_path / "series", tmp_path / "a.png"
    series.mkdir()
    for path in (series / "1.dcm", series / "2.dcm", picture):
        path.write_bytes(b"12345678")
    boxes = np.zeros((1, 4), np.float32)

    def stamp(boxes=boxes):
        cases = [Case("s", (series,)), Case("a", (picture,), boxes=boxes)]
        return FileSource(INFO, cases).stamp()

    first = stamp()
    assert stamp() == first
    assert stamp(boxes + 1) != first
    time.sleep(0.02)
    with (series / "2.dcm").open("r+b") as file:  # in place: the folder stays as it is
        file.write(b"8")
    assert stamp() != first
