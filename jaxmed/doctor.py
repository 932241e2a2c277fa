"""Whether jaxmed can work here: `python -m jaxmed.doctor`.

Says which versions, devices and memory there are, tries a convolution and its gradient on every
device, and ends with 1 where something is wrong.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import jaxmed  # nothing else of it, for what it needs may be what is missing

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Kind = Literal["ok", "note", "wrong"]
Finding = tuple[Kind, str]

NO_MODULE = {"onednn-cpu-gomp"}
"""A requirement that is a library, and no module of Python."""
FEWEST_GIB = 4
TOLERANCE = 2e-2
"""Of a convolution beside NumPy's, relative: products may be of bfloat16, as TPUs' are."""


def main() -> int:
    """Print what was found; 0 where nothing is wrong, else 1."""
    print(f"jaxmed {jaxmed.__version__}, Python {platform.python_version()}, {platform.platform()}")
    wrong = 0
    for check in (find_requirements, find_extras, find_memory, find_devices):
        for kind, told in _all_of(check):
            print(f"{kind:<6} {told}", flush=True)
            wrong += kind == "wrong"
    print(f"wrong in {wrong} place{'s' * (wrong > 1)}" if wrong else "all is well")
    return int(wrong > 0)


def _all_of(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds, be it that the check itself lacks a package, or that jaxmed is none."""
    try:
        yield from check()
    except ModuleNotFoundError as error:
        yield "wrong", f"{error.name} is not installed; make setup installs all that jaxmed needs"


def find_requirements() -> Iterator[Finding]:
    """Each package that jaxmed needs: there, in a version that it works with, and importable."""
    right = []
    for requirement in _requirements(extra=""):
        name, wanted = requirement.name, requirement.specifier
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield "wrong", f"{name} is missing; install it: pip install '{name}{wanted}'"
            continue
        if version not in wanted:
            yield "wrong", f"{name} is {version}; jaxmed works with {wanted}"
        elif name not in NO_MODULE and (problem := _import_problem(name)):
            yield "wrong", f"{name} {version} cannot be imported ({problem}); install it again"
        else:
            right.append(f"{name} {version}")
    yield "ok", ", ".join(right)


def find_extras() -> Iterator[Finding]:
    """Which extras are whole."""
    extras = importlib.metadata.metadata("jaxmed").get_all("Provides-Extra") or []
    there: list[str] = []
    lacking: list[str] = []
    for extra in sorted(extras):
        try:
            whole = all(
                importlib.metadata.version(requirement.name) in requirement.specifier
                for requirement in _requirements(extra=extra)
            )
        except importlib.metadata.PackageNotFoundError:
            whole = False
        (there if whole else lacking).append(extra)
    yield "ok", f"extras: {', '.join(there) or 'none'}; not whole: {', '.join(lacking)}"


def find_memory() -> Iterator[Finding]:
    """Memory of the host, and room on the disk of this folder."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        kind: Kind = "ok" if gib >= FEWEST_GIB else "note"
        yield kind, f"{gib:.1f} GiB of memory, {os.cpu_count()} cores"
    free = shutil.disk_usage(".").free / 2**30
    yield "ok" if free >= FEWEST_GIB else "note", f"{free:.1f} GiB free on the disk of this folder"


def find_devices() -> Iterator[Finding]:
    """Each device of JAX, and whether a convolution and its gradient come out right on it."""
    try:
        import jax

        from jaxmed.models.onednn_library import library
    except ImportError as error:
        yield "wrong", f"JAX cannot be imported: {error}"
        return
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield "wrong", f"JAX finds no device: {str(error).splitlines()[0]}"
        return
    if all(device.platform == "cpu" for device in devices):
        fast = "by oneDNN" if library() is not None else "by XLA, several times slower than oneDNN"
        yield "ok", f"no accelerator; convolutions {fast}"
        if shutil.which("nvidia-smi"):
            yield "note", "there is an NVIDIA driver: make setup EXTRAS=cuda makes JAX use the GPU"
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit")
        told = f"{device}: {device.device_kind}"
        told += f", {memory / 2**30:.1f} GiB" if memory else ""
        try:
            seconds, off = _try_convolution(device)
        except Exception as error:  # whatever a driver raises is what is to be told
            yield "wrong", f"{told}: a convolution fails: {str(error).splitlines()[0]}"
            continue
        right = off < TOLERANCE
        said = f"a convolution and its gradient take {1000 * seconds:.0f} ms"
        yield (
            ("ok", f"{told}; {said}")
            if right
            else ("wrong", f"{told}: a convolution is off by {off:.2g}; update its driver and JAX")
        )


def _try_convolution(device: object) -> tuple[float, float]:
    """Seconds once compiled, and the relative error beside NumPy's."""
    import jax
    import numpy as np

    from jaxmed.models.convolution import convolution

    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 32, 32, 8)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
    run = jax.jit(jax.value_and_grad(lambda kernel, x: (convolution(x, kernel) ** 2).sum()))
    given = jax.device_put((kernel, images), device)
    jax.block_until_ready(run(*given))
    start = time.perf_counter()
    value, gradient = jax.device_get(run(*given))
    seconds = time.perf_counter() - start
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
    )
    out = np.einsum("bhwcij,ijcd->bhwd", windows, kernel)
    expected = np.einsum("bhwcij,bhwd->ijcd", windows, 2 * out)
    off = np.abs(gradient - expected).max() / np.abs(expected).max()
    return seconds, max(float(off), float(abs(value / (out**2).sum() - 1)))


def _requirements(*, extra: str, of: str = "jaxmed") -> Iterator[Requirement]:
    """What a package asks for here, of an extra (with what its own extras ask for) or of itself."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires(of) or []):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always != (not extra) or (marker and not marker.evaluate({"extra": extra})):
            continue
        yield requirement
        for own in requirement.extras:
            yield from _requirements(extra=own, of=requirement.name)


def _import_problem(name: str) -> str:
    """Why a package cannot be imported; "" where it can."""
    owners = importlib.metadata.packages_distributions()
    modules = [
        module for module, names in owners.items() if _normalized(name) in map(_normalized, names)
    ]
    if not modules:
        return "it holds no module"
    for module in sorted(m for m in modules if m.isidentifier() and not m.startswith("_")):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary raises anything
            return f"{type(error).__name__}: {error}"
    return ""


def _normalized(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
