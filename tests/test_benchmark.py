"""The benchmark's lines are well formed; what they say is not a test."""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmed.benchmark import cases, timing
from jaxmed.benchmark.rival import Rival
from jaxmed.types import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_a_case_and_its_rival_are_timed_in_turns():
    turns = []

    def rival():
        turns.append("theirs")
        return 10.0

    work = timing.Work(lambda: (turns.append("ours"), time.sleep(0.03)), items=5, unit="images")
    found = timing.measure("waiting", work, repeats=3, rival=rival)
    # Short work is repeated until its turn is full, and the first run of a turn does not count.
    assert [name for name, _ in itertools.groupby(turns)] == ["ours", "theirs"] * 3
    assert turns.count("theirs") == 6 and 9 <= turns.count("ours") <= 15
    assert found["case"] == "waiting" and found["against_ms"] == 10_000
    assert found["ms"] >= 30 and found["images_per_s"] <= 167
    assert found["ratio"] == pytest.approx(1e4 / found["ms"], rel=0.5)


def test_compiled_work_counts_what_it_costs():
    a = jnp.ones((64, 64))
    work = timing.compile_work(lambda x, y: (x @ y, x.sum()), a, a, items=1, unit="products",
                               donate=True)  # fmt: skip
    found = timing.measure("product", work, repeats=2)
    assert work.flops >= 2 * 64**3
    assert found["peak_bytes"] >= 2 * a.nbytes
    assert found["compile_s"] > 0 and found["products_per_s"] > 0
    assert 0 < found["mfu"] < 1
    assert not a.is_deleted()


@pytest.mark.parametrize("name", ["nms", "bootstrap", "prepare_nifti", "surface_scores", "loader"])
def test_cases_run(name):
    work = cases.CASES[name]()
    work.run()
    assert work.items > 0


@pytest.mark.slow
def test_the_script_prints_a_line_a_case():
    command = [sys.executable, str(ROOT / "experiments/benchmark.py"), "--repeats=1"]
    done = subprocess.run(
        [*command, "--cases=nms,step_detector3d"], capture_output=True, text=True, check=True
    )
    machine, *lines = map(json.loads, done.stdout.splitlines())
    assert machine["jax"] == jax.__version__
    assert {line["case"] for line in lines} == {"nms", "step_detector3d"}
    done = subprocess.run([*command, "--cases=nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such case" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_a_rival_that_is_not_there_is_told():
    with pytest.raises(UserError, match="EXTRAS=torch"):
        Rival("nms").__enter__()
