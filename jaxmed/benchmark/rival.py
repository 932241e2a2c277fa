"""Another process that does the same work with other libraries, turn by turn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxmed.types import UserError

ROOT = Path(__file__).resolve().parents[2]


class Rival:
    """One case in PyTorch and MONAI; call it to run once. Use it in a `with` statement.

    Args:
        case: its name; XLA variants of ours meet the same rival.
        python: the interpreter that has the libraries; empty is this one.

    Attributes:
        versions: of the libraries; empty where they have no such case.

    Raises:
        UserError: where the libraries are not there.
    """

    def __init__(self, case: str, *, python: str = ""):
        self._case = case.removesuffix("_xla")
        self._python = python or sys.executable
        self.versions = ""

    def __enter__(self) -> Rival:
        # The other interpreter may lack jax and jaxmed: what it runs needs NumPy and nibabel only.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("GLIBC_TUNABLES", None)  # our scripts' choice; theirs start without it
        self._process = subprocess.Popen(
            [self._python, "-W", "ignore", "-m", "jaxmed.benchmark.torch_cases", self._case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            first = self._answer()
        except UserError:
            self.__exit__()
            raise
        self.versions = "" if first == "-" else first
        return self

    def __call__(self) -> float:
        """Run once; the seconds that it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines()
            raise UserError(
                f"--against=torch: {said[-1] if said else 'the other process ended'}; it needs "
                "PyTorch and MONAI: make setup EXTRAS=torch, or --rival_python=INTERPRETER"
            )
        return line.strip()

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
