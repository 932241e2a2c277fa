"""The parts of an artefact, a zip file or a folder, checked before memory is taken for them."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .description import mistake_in

VERSION = 1
"""Of the layout that the description states."""
MOST_BYTES = 2**34
"""Of one part."""
MOST_INFLATED = 100
"""Times what a part takes in the file."""
MOST_WORDS = 2**24
"""Bytes of a description, or of the header of the weights."""

DESCRIPTION, WEIGHTS = "description.json", "weights.safetensors"
PROGRAM, NETWORK = "program.stablehlo", "network.onnx"

NUMBERS = {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "I32": "int32"}
"""By their name in a safetensors file."""


class ModelError(ValueError):
    """What is wrong with an artefact or with what it is given, in words for its user."""


class Contents:
    """Reads the parts by their names; nothing is unpacked to the disk.

    Args:
        path: of the zip file, or of a folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise ModelError(f"{path}: no such file or folder; check the path")
        self.is_folder = self.path.is_dir()
        if not self.is_folder and not zipfile.is_zipfile(self.path):
            raise ModelError(f"{path}: is no exported model or is damaged; export it again")

    def read(self, name: str, *, most: int = MOST_BYTES) -> bytes:
        """One part, whole.

        Raises:
            ModelError: it is missing, damaged or bigger than `most` bytes.
        """
        broken = f"{self.path}: {name} is {{}}; export or copy the model again"
        try:
            if self.is_folder:
                size = (self.path / name).stat().st_size
                content = (self.path / name).read_bytes() if size <= most else b""
            else:
                with zipfile.ZipFile(self.path) as archive:
                    told = archive.getinfo(name)
                    size = told.file_size
                    # Ours shrink to a tenth; a small file must not fill the memory. What the
                    # archive says of its parts may be a lie.
                    packed = min(told.compress_size, self.path.stat().st_size)
                    if most >= size > MOST_INFLATED * packed + 2**20:
                        raise ValueError("it inflates beyond reason")
                    # The checksum of what is read is compared by the library.
                    content = archive.read(name) if size <= most else b""
        except (KeyError, FileNotFoundError):
            raise ModelError(broken.format("missing")) from None
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise ModelError(broken.format(f"damaged ({error})")) from error
        except Exception as error:  # what inflating raises is no class of its own module
            raise ModelError(broken.format(f"damaged ({type(error).__name__})")) from error
        if size > most:
            raise ModelError(broken.format(f"{size} bytes long, more than {most}"))
        return content

    def description(self) -> dict[str, Any]:
        """What the artefact says of itself, once it is sound in every key that is used."""
        content = self.read(DESCRIPTION, most=MOST_WORDS)
        try:
            found = json.loads(content)
            version = found["version"]
            mistake = mistake_in(found) if version == VERSION else ""
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ModelError(f"{self.path}: {DESCRIPTION} is damaged; export it again") from error
        if version != VERSION:
            raise ModelError(
                f"{self.path}: is of layout {version}, this program reads {VERSION}; use the "
                "jaxmed_predict that the model holds"
            )
        if mistake:
            raise ModelError(f"{self.path}: {DESCRIPTION} is damaged ({mistake}); export it again")
        return found

    def weights(self) -> dict[str, np.ndarray]:
        """Arrays by name, of the safetensors file."""
        return unpack_arrays(self.read(WEIGHTS), where=f"{self.path}: {WEIGHTS}")


_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a header that says nonsense raises."""


def pack_arrays(arrays: dict[str, np.ndarray], *, metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file: the length of a header, the header, the numbers.

    Source: the format's own description, https://github.com/huggingface/safetensors.
    """
    names = {number: name for name, number in NUMBERS.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    parts: list[bytes] = []
    end = 0
    # The widest first, so that each array begins at a multiple of its own width.
    for name, array in sorted(arrays.items(), key=lambda pair: (-pair[1].itemsize, pair[0])):
        parts.append(np.ascontiguousarray(array).tobytes())
        begin, end = end, end + len(parts[-1])
        kind = names[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def unpack_arrays(content: bytes, *, where: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
        ModelError: the header does not fit the content.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        if len(content) < 8 or size > min(MOST_WORDS, len(content) - 8):
            raise ValueError("cut short")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        # One after another, as the format demands: memory is taken for each.
        places = sorted(tuple(map(int, entry["data_offsets"])) for entry in header.values())
        ends = [0, *(end for _, end in places)]
        if [begin for begin, _ in places] != ends[:-1] or ends[-1] != len(content) - 8 - size:
            raise ValueError("numbers overlap, or leave gaps")
        return {name: _array(content, 8 + size, entry) for name, entry in header.items()}
    except _DAMAGES as error:
        raise ModelError(f"{where} is damaged ({error}); export or copy it again") from error


def _array(content: bytes, base: int, entry: dict[str, Any]) -> np.ndarray:
    name = NUMBERS[entry["dtype"]]
    if name == "bfloat16":
        import ml_dtypes  # comes with jax

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(name)
    shape = tuple(int(side) for side in entry["shape"])
    begin, end = (int(place) for place in entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= len(content) - base:
        raise ValueError("numbers lie outside the file")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("shape and size differ")
    return np.frombuffer(content, dtype, math.prod(shape), base + begin).reshape(shape)
