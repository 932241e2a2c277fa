"""Locks that the system frees when their process ends, however it does."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import TextIO

from jaxmed.types import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Held by one process at a time.

    Args:
        path: of a file, made where missing; it says who holds the lock, or held it last.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Whether it could be had; with `wait` it always can.

        Raises:
            UserError: the system, or this file system, has no locks.
        """
        if fcntl is None:
            raise UserError(f"{self._path}: this system has no locks")
        file = self._path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:
            file.close()
            raise UserError(
                f"{self._path}: cannot be locked ({error.strerror}); choose a folder on a file "
                "system that has locks, as local ones and NFS 4 do"
            ) from error
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {platform.node()}, since {now}\n")
        file.flush()
        self._file = file
        return True

    def holder(self) -> str:
        """Who holds it, in words."""
        return self._path.read_text(encoding="utf-8")[:200].strip()

    def free(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None
