"""Faults of the machine: each is told with what to do, and loses nothing beyond a checkpoint."""

import errno
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build.cli import explain_fault
from jaxmed.build.config import config_of_run, read_run, write_json
from jaxmed.build.runs import train_run
from jaxmed.build.workdir import LOCK_FILE, hold_workdir, write_or_compare
from jaxmed.training.checkpoints import restore_variables
from jaxmed.training.logging import Logger
from jaxmed.training.sharding import Lifted
from jaxmed.types import UserError

FULL = (
    OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"),
    ValueError('OUT_OF_RANGE: Failed writing: "a/b": No space left on device [os_error_code=28]'),
    RuntimeError("RESOURCE_EXHAUSTED: Failed to write: ENOSPC"),
)


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_told_whoever_says_so(error):
    told = explain_fault(error)
    assert "the disk is full" in told and "goes on from there" in told


def test_other_faults_are_told_and_bugs_are_not():
    read_only = explain_fault(OSError(errno.EROFS, "Read-only file system", "runs/a/config.json"))
    assert read_only.startswith("runs/a/config.json: the disk cannot be written")
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "quota is used up" in explain_fault(wrapped)
    memory = explain_fault(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"))
    assert "out of memory on the device" in memory and "data.batch_size" in memory
    assert "memory" in explain_fault(MemoryError())
    assert explain_fault(ValueError("shapes do not fit")) is None
    assert explain_fault(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 1 on elsewhere")
    file.flush()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_workdir_is_for_one_training_at_a_time(tmp_path):
    with (
        hold_workdir(tmp_path),
        pytest.raises(UserError, match="a training is under way in it"),
        hold_workdir(tmp_path),
    ):
        pass
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="process 1 on elsewhere"), hold_workdir(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    with hold_workdir(tmp_path):  # the lock went with its process
        pass


def test_a_run_of_another_version_is_told(tmp_path):
    config = small_config("classification").to_dict()
    config["data"]["colour_of_walls"] = 3
    write_json(tmp_path / "config.json", {"config": config, "data": {}, "versions": {}})
    with pytest.raises(UserError, match=r"data\.colour_of_walls.*made with another version"):
        config_of_run(read_run(tmp_path))


def test_a_run_goes_on_in_a_version_that_has_more_keys(tmp_path):
    config = small_config("classification")
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    run = {"config": config.to_dict(), "data": {"sha256": "0"}}
    earlier = json.loads(json.dumps(run))
    del earlier["config"]["loss"]["label_smoothing"]
    write_json(tmp_path / "config.json", earlier)
    write_or_compare(tmp_path, run)
    write_json(tmp_path / "config.json", earlier)
    run["config"]["loss"]["label_smoothing"] = 0.1
    with pytest.raises(UserError, match=r"loss.label_smoothing: 0.0 -> 0.1"):
        write_or_compare(tmp_path, run)


@pytest.mark.slow
def test_no_memory_a_disk_that_cannot_be_written_and_a_clock_that_goes_back(tmp_path, monkeypatch):
    """Three attempts end where one that nothing happened to ends."""
    settings = {"training.steps": 6, "training.evaluate_every": 0, "training.checkpoint_every": 2}
    train_run(small_config("classification", **settings), tmp_path / "whole")
    place, log = Lifted.place_batch, Logger.log
    batches = []

    def no_memory(self, batch):
        batches.append(batch)
        if len(batches) == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
        return place(self, batch)

    def read_only(self, step, *rest):
        if step == 5:
            raise OSError(errno.EROFS, "Read-only file system", "metrics.jsonl")
        return log(self, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Lifted, "place_batch", no_memory)
        with pytest.raises(jax.errors.JaxRuntimeError):
            train_run(small_config("classification", **settings), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    with monkeypatch.context() as patched:
        patched.setattr(Logger, "log", read_only)
        with pytest.raises(OSError, match="Read-only"):
            train_run(small_config("classification", **settings), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["2", "4"]
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert train_run(small_config("classification", **settings), tmp_path / "run")
    whole, again = (
        restore_variables(tmp_path / name / "checkpoints", step=6)[0] for name in ("whole", "run")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, again)
