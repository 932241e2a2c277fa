"""Locks that the system frees when their process ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from jaxmed.types import UserError


class Lock:
    """Held by one process at a time; the system frees it when that process ends, however it does.

    Args:
        path: of a file, made where missing; it stays empty.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Whether it could be had; with `wait` it always can."""
        file = self._path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:
            file.close()
            raise UserError(
                f"{self._path}: cannot be locked ({error.strerror}); put --output on a file system "
                "that has locks, as local ones and NFS 4 do"
            ) from error
        self._file = file
        return True

    def free(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None
