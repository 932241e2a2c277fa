"""Timings of single operations, as Markdown tables that name the machine they were taken on.

A timing means something only beside others of the same run: cores may be shared.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxmed.models import onednn_library
from jaxmed.models.convolution import convolution, use_onednn

CONVOLUTIONS = (
    (8, (256, 256), 32, 32),
    (8, (128, 128), 64, 64),
    (8, (64, 64), 128, 128),
    (8, (32, 32), 256, 256),
    (2, (64, 64, 64), 32, 32),
    (2, (32, 32, 32), 64, 64),
    (2, (16, 16, 16), 128, 128),
)
"""Batch, spatial shape, input and output channels."""


def describe_machine() -> str:
    """The device, the host, its load and the versions, in a line or two of Markdown."""
    device = jax.devices()[0]
    library = onednn_library.library()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{device.device_kind} ({device.platform}, {jax.device_count()} devices) on "
        f"{_processor()}, {os.cpu_count()} cores{load}; jax {jax.__version__}, "
        f"oneDNN {library.version if library else 'not there'}, "
        f"Python {platform.python_version()}.\n"
        "Cores may be shared with other work: compare columns of one run, not runs."
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()


def time_each(
    functions: Sequence[Callable[..., Any]], arguments: Sequence[Any], *, repeats: int
) -> list[float]:
    """Median seconds of a call of each function, taken in turns so that all see the same load."""
    compiled = [jax.jit(function).lower(*arguments).compile() for function in functions]
    for function in compiled:
        jax.block_until_ready(function(*arguments))
    seconds: list[list[float]] = [[] for _ in compiled]
    for _ in range(repeats):
        for times, function in zip(seconds, compiled, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def benchmark_convolution(*, repeats: int = 5, scale: int = 1) -> str:
    """Forward and forward + backward GFLOP/s of oneDNN and of XLA, as a table.

    Args:
        repeats: calls timed.
        scale: divides spatial sides, for a quick look.
    """
    rows = [
        "| 3-wide convolution: batch, spatial, cin, cout | oneDNN forward | XLA forward "
        "| oneDNN forward + backward | XLA forward + backward |",
        "|---|---|---|---|---|",
    ]
    for batch, spatial, cin, cout in CONVOLUTIONS:
        sides = tuple(side // scale for side in spatial)
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], (batch, *sides, cin))
        kernel = jax.random.normal(keys[1], (*(3,) * len(sides), cin, cout))
        work = 2e-9 * batch * float(np.prod(sides)) * float(np.prod(kernel.shape))
        forward = time_each([_forward(True), _forward(False)], (x, kernel), repeats=repeats)
        both = time_each([_both(True), _both(False)], (x, kernel), repeats=repeats)
        speeds = [work / t for t in forward] + [3 * work / t for t in both]
        figures = " | ".join(f"{speed:.0f}" for speed in speeds)
        rows.append(f"| {batch}, {'x'.join(map(str, sides))}, {cin}, {cout} | {figures} |")
    return "\n".join(["GFLOP/s, float32:", "", *rows])


def _forward(enabled: bool) -> Callable[..., jax.Array]:
    def run(x, kernel):
        with use_onednn(enabled):
            return convolution(x, kernel)

    return run


def _both(enabled: bool) -> Callable[..., Any]:
    def run(x, kernel):
        y, pullback = jax.vjp(_forward(enabled), x, kernel)
        return y, pullback(jnp.ones_like(y))

    return run


BENCHMARKS: dict[str, Callable[..., str]] = {"convolution": benchmark_convolution}
"""Every part by its name; each takes `repeats` and `scale` and returns a table."""
