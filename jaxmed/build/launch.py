"""Start as one of several processes: flags, clusters, and a parent that speaks if JAX aborts."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxmed.types import UserError

COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where several processes train together."
)
PROCESSES = flags.DEFINE_integer("processes", 0, "How many processes, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", -1, "Number of this process, with --coordinator.")

_CHILD = "JAXMED_CHILD"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
LOST = 75
"""Exit code where another process was lost: try again (EX_TEMPFAIL)."""


def use_huge_pages() -> None:
    """On Linux, start this program anew with memory in pages of 2 MiB, unless it has a choice.

    XLA asks for the memory of each call anew and gives it back. In pages of 4 KiB the kernel then
    hands out half a million of them a step, which is a sixth of the time of a 2-D U-Net's (2.60
    instead of 3.08 s, 8 x 256 x 256 on two cores). The C library reads this setting only when a
    program starts. GLIBC_TUNABLES, even empty, is a choice.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled() -> None:
    """Keep compiled programs in the user's cache, so that a second start need not compile again.

    Programs for a CPU hold its instructions, so each kind of CPU has a folder of its own: homes
    are shared by unlike machines. JAX_COMPILATION_CACHE_DIR is another choice; empty is none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kind = hashlib.sha256(f"{platform.machine()} {_processor()}".encode()).hexdigest()[:12]
    folder = Path(home, "jaxmed", "compiled", f"jax-{jax.__version__}-{kind}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK) and _is_private(folder.resolve()):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _is_private(folder: Path) -> bool:
    """Whether nobody else can put programs there, which would be run without a question."""
    if not hasattr(os, "getuid"):
        return True
    told = folder.stat()
    if told.st_uid != os.getuid() or told.st_mode & 0o022:
        return False
    for parent in folder.parents:
        told = parent.stat()
        shared = told.st_mode & stat.S_IWOTH and not told.st_mode & stat.S_ISVTX
        if shared or told.st_uid not in (0, os.getuid()):
            return False
    return True


def _processor() -> str:
    """What tells one kind of CPU from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    # The first of each: all cores of a machine are alike.
    told = {line.split(":")[0].strip(): line for line in reversed(lines)}
    return "".join(told.get(name, "") for name in ("model name", "flags", "Features"))


def start() -> None:
    """Join the other processes, where there are any.

    Where there are, this process becomes the parent of one that does the work: when a peer is lost
    JAX ends a program at once, without an exception, and someone must say what happened.

    Raises:
        UserError: where the flags do not fit, or the others cannot be joined.
    """
    check(COORDINATOR.value, processes=PROCESSES.value, process=PROCESS.value)
    if not (COORDINATOR.value or in_cluster()):
        return
    if _CHILD not in os.environ:
        sys.exit(_supervise())
    if sys.platform.startswith("linux"):
        # Where the parent is killed, save and stop.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
    from jaxmed.training import processes

    try:
        processes.connect(
            coordinator=COORDINATOR.value, processes=PROCESSES.value, process=PROCESS.value
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({str(error).splitlines()[0]}); check --coordinator, "
            "and that all of them are started"
        ) from error
    if not processes.is_first():
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the first one speaks for all


def check(coordinator: str, *, processes: int, process: int) -> None:
    """Raise a UserError where the flags do not fit each other."""
    if not coordinator:
        if processes or process >= 0:
            raise UserError("--processes and --process need --coordinator=HOST:PORT of process 0")
        return
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT, the same for all")
    if not 0 <= process < processes:
        raise UserError(
            f"--process={process} of --processes={processes}: expected 0 to one less than their "
            "number"
        )


def in_cluster() -> bool:
    """Whether a cluster's launcher started this as one of several processes."""
    environment = os.environ

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else 0

    slurm = (
        "SLURM_PROCID" in environment
        and (number("SLURM_STEP_NUM_TASKS") or number("SLURM_NTASKS")) > 1
    )
    mpi = number("OMPI_COMM_WORLD_SIZE") > 1
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return slurm or mpi or pod or kubernetes


def _supervise() -> int:
    """Do the work in a child, hand signals on to it, and say so where it was aborted."""
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env={**os.environ, _CHILD: "1"})

    def hand_on(number: int, frame: Any) -> None:
        del frame
        child.send_signal(number)  # which a terminal may have done already, see StopSignal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    code = child.wait()
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"error: this process was ended by {name}, as when another process of the run is lost "
            "or the machine runs out of memory (its last words are above); the same command goes "
            "on from the last checkpoint, with as many processes or with fewer",
            file=sys.stderr,
        )
        return LOST
    return code
