"""Fetch one published file and check that it is the one expected."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from jaxmed.types import UserError


def fetch(url: str, file: Path, *, md5: str) -> Path:
    """Download one file, check it, and only then give it its name.

    Raises:
        UserError: without a network, or if the checksum differs.
    """
    advice = f"fetch {url} elsewhere and save it as {file}"
    part: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own for each download: two processes may want the same file at once.
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        part = Path(name)
        digest = hashlib.md5(usedforsecurity=False)
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as answer:
            while block := answer.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != md5:
            raise UserError(
                f"{file}: what {url} gave has the checksum {digest.hexdigest()}, expected {md5}; "
                "try again later"
            )
        part.chmod(0o644)
        part.replace(file)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{file}: cannot be downloaded ({error}); {advice}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return file
