"""How fast a device can be, and what share of that a program makes use of."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "TPU v6": 918.0,
    "TPU v5p": 459.0,
    "TPU v5": 197.0,
    "TPU v4": 275.0,
    "TPU v3": 123.0,
    "TPU v2": 45.0,
}
"""Makers' figures, dense products of bfloat16 (float16 before Ampere), by a part of the name."""

_SIDE = 1024


@functools.cache
def peak_flops(device: Any) -> float | None:
    """Floating-point operations a second that a device can do at best; None where unknown.

    Of accelerators it is the maker's figure for products of 16-bit numbers; a CPU, which comes in
    too many kinds, is measured: the best of some products of float32 matrices.
    """
    if device.platform == "cpu":
        return _measured(device)
    known = (value for name, value in PEAK_TFLOPS.items() if name in device.device_kind)
    return next((1e12 * value for value in known), None)


def _measured(device: Any) -> float:
    with jax.default_device(device):
        a = jnp.ones((_SIDE, _SIDE), jnp.float32)
        product = jax.jit(jnp.matmul).lower(a, a).compile()
        jax.block_until_ready(product(a, a))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(product(a, a))
            best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


class InBackground:
    """Works out a number in a thread, from the first time that it is asked for.

    Called, it gives the number, or None as long as that is not known (or cannot be worked out).
    """

    def __init__(self, count: Callable[[], float]):
        self._count = count
        self._pool = ThreadPoolExecutor(1)
        self._future: Future[float] | None = None

    def __call__(self) -> float | None:
        """The number, if it is known by now."""
        if self._future is None:
            self._future = self._pool.submit(self._count)
            self._pool.shutdown(wait=False)  # when this is done
        if not self._future.done() or self._future.exception() is not None:
            return None
        return self._future.result()


def utilization(flops: float, seconds: float, *, device: Any = None, devices: int = 1) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Args:
        flops: that the model needs, whatever the program really does.
        seconds: that it took.
        device: one of those that did it; None is JAX's first.
        devices: how many they were.

    Returns:
        The share of what the devices could have done in that time; NaN where that is unknown.
    """
    peak = peak_flops(jax.devices()[0] if device is None else device)
    return flops / (seconds * peak * devices) if peak and seconds > 0 else float("nan")


def device_bytes() -> int:
    """Memory of a local device; of the CPU, what the machine or its container has, shared out."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    if limit:
        return limit
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, second and first version
        try:
            total = min(total, int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # none, or "max"
            continue
    return total // len(jax.local_devices())
