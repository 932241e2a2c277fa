"""The benchmark's tables are well formed; what they say is not a test."""

import jax.numpy as jnp

from jaxmed import benchmark


def test_convolution_table(monkeypatch):
    monkeypatch.setattr(benchmark, "CONVOLUTIONS", ((1, (8, 8), 2, 4), (1, (4, 4, 4), 2, 2)))
    lines = benchmark.benchmark_convolution(repeats=1, scale=2).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert "4x4" in rows[2] and "2x2x2" in rows[3]


def test_functions_are_timed_in_turns():
    seconds = benchmark.time_each([jnp.sin, jnp.cos], (jnp.ones(3),), repeats=2)
    assert len(seconds) == 2 and min(seconds) > 0


def test_machine_is_named():
    assert "jax" in benchmark.describe_machine()
