"""Faults of the machine, told from bugs by what the error says: a full disk, too little memory."""

from __future__ import annotations

import errno
import re

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk cannot be written",
    errno.EFBIG: "the file is larger than is allowed here (ulimit -f)",
    errno.EIO: "the disk failed",
}
# What libraries that write by themselves make of the same.
_SAID = {
    r"No space left on device|ENOSPC|database or disk is full": errno.ENOSPC,
    r"quota exceeded|EDQUOT": errno.EDQUOT,
    r"Read-only file system|EROFS|attempt to write a readonly database": errno.EROFS,
    r"File too large|EFBIG": errno.EFBIG,
    r"Input/output error|\bEIO\b|disk I/O error": errno.EIO,
}
_MEMORY = r"RESOURCE_EXHAUSTED|[Oo]ut of memory"


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk, in words; None where the error is of another kind."""
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number not in _DISK:
            said = str(seen)
            found = (own for pattern, own in _SAID.items() if re.search(pattern, said))
            number = next(found, None)
        if number is not None:
            name = getattr(seen, "filename", None)
            return f"{name}: {_DISK[number]}" if name else _DISK[number]
        seen = seen.__cause__ or seen.__context__
    return None


def memory_fault(error: BaseException) -> str | None:
    """What could not be allocated, in the words of the error; None where it is of another kind."""
    if isinstance(error, MemoryError):
        return "the computer's memory is used up"
    # Disks say so too (RESOURCE_EXHAUSTED: ... ENOSPC), and are asked first.
    if disk_fault(error) or not re.search(_MEMORY, str(error)):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"out of memory on the device ({lines[0][:160]})"
