"""Time a piece of work, alone or in turns with the same work of a rival."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jaxmed
from jaxmed.models import onednn_library
from jaxmed.models.convolution import use_onednn
from jaxmed.training.speed import utilization

TURN = 0.1
"""Seconds that short work is repeated for in each turn."""
REST = 0.05
"""Seconds between turns, for threads of the other program to fall asleep."""


@dataclasses.dataclass
class Work:
    """Something to repeat.

    Attributes:
        run: once; returns when it is done.
        items: that one run deals with.
        unit: of these.
        flops: that one run needs, as XLA counts them; 0 where that means nothing.
        peak_bytes: of arrays and scratch memory of the compiled program, where there is one.
        compile_s: seconds to compile it.
    """

    run: Callable[[], Any]
    items: float = 1
    unit: str = "runs"
    flops: float = 0.0
    peak_bytes: int | None = None
    compile_s: float | None = None


def compile_work(
    function: Callable[..., Any],
    *arguments: Any,
    items: float,
    unit: str,
    donate: bool = False,
    flops: float | None = None,
) -> Work:
    """Compile a function for these arguments, and make work of calling it.

    `flops` are counted where they are not given. With `donate` the first argument is a state that
    each call gives away and returns (first).
    """
    jitted = jax.jit(function, donate_argnums=0 if donate else ())
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    rest = arguments[1:]
    # Copied, since the caller's must not be given away.
    state = jax.tree.map(lambda x: x.copy(), arguments[0]) if donate else None

    def run() -> None:
        nonlocal state
        if donate:
            result = compiled(state, *rest)
            state = result[0]
        else:
            result = compiled(*arguments)
        jax.block_until_ready(result)

    return Work(
        run,
        items,
        unit,
        flops=count_flops(function, *arguments) if flops is None else flops,
        peak_bytes=memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        compile_s=seconds,
    )


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of a call, as XLA counts them before it optimises."""
    with use_onednn(False):  # calls out of XLA do work that it cannot count
        # A function of its own, since jit keeps what it traced before.
        cost = jax.jit(lambda *a: function(*a)).lower(*arguments).cost_analysis()
    return float((cost or {}).get("flops", 0.0))


def measure(
    name: str, work: Work, *, repeats: int, rival: Callable[[], float] | None = None
) -> dict[str, Any]:
    """Time work, in turns with a rival, so that both see the same load of the machine.

    Args:
        name: of the case.
        work: to time.
        repeats: the median of so many counts.
        rival: does the same work elsewhere and returns the seconds it took.

    Returns:
        What to print, plain numbers and text.
    """
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(_take_turn(functools.partial(_time_once, work.run)))
        if rival is not None:
            theirs.append(_take_turn(rival))
    seconds = statistics.median(ours)
    result: dict[str, Any] = {
        "case": name,
        "device": jax.devices()[0].device_kind,
        "ms": _rounded(1e3 * seconds),
        f"{work.unit}_per_s": _rounded(work.items / seconds),
    }
    if work.flops:
        result["gflops_per_s"] = _rounded(1e-9 * work.flops / seconds)
        result["mfu"] = _rounded(utilization(work.flops, seconds))
    if work.peak_bytes is not None:
        result["peak_bytes"] = int(work.peak_bytes)
    if work.compile_s is not None:
        result["compile_s"] = _rounded(work.compile_s)
    if theirs:
        result["against_ms"] = _rounded(1e3 * statistics.median(theirs))
        # Of each turn, so that what disturbed both is in neither.
        result["ratio"] = _rounded(
            statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
        )
    return result


def _time_once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _take_turn(run: Callable[[], float]) -> float:
    """Seconds of a run, the median of as many as fill a turn.

    The first of a turn does not count: memory that lay idle may have been given back, and caches
    hold what the other side worked on.
    """
    time.sleep(REST)
    run()
    seconds: list[float] = []
    while sum(seconds) < TURN:
        seconds.append(run())
    return statistics.median(seconds)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def describe_machine() -> dict[str, Any]:
    """The device, the host, its load and the versions."""
    device = jax.devices()[0]
    library = onednn_library.library()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "jaxmed": jaxmed.__version__,
        "jax": jax.__version__,
        "onednn": library.version if library else None,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()
