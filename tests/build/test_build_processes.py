"""Several processes work as one: train, evaluate, predict, lose one, go on with fewer."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmed.build import launch
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.training.checkpoints import restore_variables
from jaxmed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--config.data.count=40",
    "--config.data.batch_size=4",
    "--config.training.steps=8",
    "--config.training.evaluate_every=4",
    "--config.training.log_every=1",
    "--config.evaluation.resamples=20",
)
DETECTOR = ("--config.model.width=4", "--config.model.head_features=8")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *arguments, count, folder):
    """So many processes of a script, their outputs in files; one has no need of the others."""
    port = free_port()
    started = []
    for number in range(count):
        joined = (f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={number}")
        with (folder / f"output{number}.txt").open("w") as output:
            started.append(
                subprocess.Popen(
                    [
                        *(sys.executable, str(ROOT / "experiments" / script), *arguments),
                        *(joined if count > 1 else ()),
                    ],
                    cwd=ROOT,
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def run(script, *arguments, count, folder):
    codes = [process.wait(300) for process in start(script, *arguments, count=count, folder=folder)]
    text = (folder / "output0.txt").read_text()
    assert codes == [0] * count, text
    return text


def wait_for(text, process, folder):
    """What the first process has said, once that holds the text."""
    for _ in range(1200):
        told = (folder / "output0.txt").read_text()
        if text in told:
            return told
        assert process.poll() is None, told
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not appear: {told}")


def children(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in listed.split()]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    config = ("--config=configs/detect_phantoms.py:cells", *SETTINGS, *DETECTOR)
    for count in (1, 2):
        workdir = f"--workdir={tmp_path}/run{count}"
        told = run("train.py", *config, workdir, count=count, folder=tmp_path)
        assert "step 8/8" in told
        run("evaluate.py", workdir, "--split=test", count=count, folder=tmp_path)
    one, two = (restore_variables(tmp_path / f"run{n}/checkpoints", step=8)[0] for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)
    for part in ("val", "test"):
        scores = [
            json.loads((tmp_path / f"run{n}/evaluation/{part}/summary.json").read_text())
            for n in (1, 2)
        ]
        assert scores[0]["cases"] == scores[1]["cases"]
        for name, entry in scores[0]["metrics"].items():
            other = scores[1]["metrics"][name]
            assert entry["n"] == other["n"]
            if entry["value"] is not None:
                assert entry["value"] == pytest.approx(other["value"], abs=0.02)
    write_phantoms(tmp_path / "new", layout="class_folders", count=5, size=64)
    predicted = []
    for count in (1, 2):
        flags = (f"--workdir={tmp_path}/run1", f"--output={tmp_path}/out{count}")
        run("predict.py", *flags, f"{tmp_path}/new", count=count, folder=tmp_path)
        predicted.append(json.loads((tmp_path / f"out{count}/detections.json").read_text()))
    assert predicted[0] and predicted[0] == predicted[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_lost_process_ends_the_others_and_fewer_go_on(tmp_path):
    config = ("--config=configs/detect_phantoms.py:cells", *SETTINGS, *DETECTOR)
    config += ("--config.training.steps=5000", "--config.training.checkpoint_every=4")
    config += ("--config.training.evaluate_every=0", f"--workdir={tmp_path}/run")
    first, second = start("train.py", *config, count=2, folder=tmp_path)
    try:
        for _ in range(1200):
            if (tmp_path / "run/checkpoints/8").exists():
                break
            assert first.poll() is None, (tmp_path / "output0.txt").read_text()
            time.sleep(0.1)
        for pid in (second.pid, *children(second)):
            os.kill(pid, signal.SIGKILL)
        assert first.wait(60) == launch.LOST
        assert "goes on from the last checkpoint" in (tmp_path / "output0.txt").read_text()
    finally:
        for process in (first, second):
            process.kill()
            process.wait(10)
    steps = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()]
    [alone] = start("train.py", *config, count=1, folder=tmp_path)
    try:
        told = wait_for(f"step {max(steps) + 2}/", alone, tmp_path)
        assert f"going on from step {max(steps)} " in told
    finally:
        alone.send_signal(signal.SIGTERM)
        assert alone.wait(60) == 130


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(tmp_path):
    config = ("--config=configs/detect_phantoms.py:cells", *SETTINGS, *DETECTOR)
    config += ("--config.training.steps=5000", f"--workdir={tmp_path}/run")
    config += ("--config.training.evaluate_every=0",)
    both = start("train.py", *config, count=2, folder=tmp_path)
    wait_for("step 3/", both[0], tmp_path)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in both] == [130, 130]
    assert "stopped and saved at step" in (tmp_path / "output0.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_killed_parent_leaves_no_orphan(tmp_path):
    config = ("--config=configs/detect_phantoms.py:cells", *SETTINGS, *DETECTOR)
    config += ("--config.training.steps=5000", f"--workdir={tmp_path}/run")
    both = start("train.py", *config, count=2, folder=tmp_path)
    wait_for("step 3/", both[0], tmp_path)
    [child] = children(both[1])
    both[1].kill()
    both[1].wait(10)
    assert both[0].wait(60) == 130
    for _ in range(300):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
    assert "stopped and saved at step" in (tmp_path / "output0.txt").read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, True),
        # An interactive step of one task, in an allocation of four.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"KUBERNETES_SERVICE_HOST": "a"}, False),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_clusters_are_recognised(monkeypatch, environment, expected):
    known = ("SLURM", "OMPI", "TPU_WORKER", "KUBERNETES", "JOB_")
    for name in [n for n in os.environ if n.startswith(known)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.in_cluster() == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_scripts_start_with_huge_pages_and_keep_what_they_compiled(tmp_path):
    code = (
        "import os, jax; from jaxmed.build import cli; "
        "cli.run(lambda _: print(os.environ['GLIBC_TUNABLES'], "
        "jax.config.jax_compilation_cache_dir))"
    )
    names = ("GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment["XDG_CACHE_HOME"] = str(tmp_path)

    def told(**chosen):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **chosen}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.split()

    pages, folder = told()
    assert pages == "glibc.malloc.hugetlb=1"
    assert Path(folder).is_relative_to(tmp_path / "jaxmed/compiled") and Path(folder).is_dir()
    assert Path(folder).stat().st_mode & 0o77 == 0
    assert told(GLIBC_TUNABLES="", JAX_COMPILATION_CACHE_DIR="") in ([], ["None"])
    # A home that cannot be written to is no error.
    (tmp_path / "file").touch()
    assert told(XDG_CACHE_HOME=f"{tmp_path}/file")[1] == "None"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"processes": 2, "process": 0}, "need --coordinator"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "expected 0 to one less"),
        ({"coordinator": "a:1"}, "expected 0 to one less"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "HOST:PORT"),
    ],
)
def test_mistyped_processes(given, expected):
    with pytest.raises(UserError, match=expected):
        launch.check(**{"coordinator": "", "processes": 0, "process": -1, **given})


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_compiled_programs_that_others_could_change_are_not_run(tmp_path):
    folder = tmp_path / "shared" / "compiled"
    folder.mkdir(parents=True, mode=0o700)
    assert launch._is_private(folder)
    folder.chmod(0o770)
    assert not launch._is_private(folder)
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    assert not launch._is_private(folder)
    folder.parent.chmod(0o1777)  # as /tmp: what is there belongs to its owner
    assert launch._is_private(folder)
