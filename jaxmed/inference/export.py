"""A network as a file of its own: weights by name, StableHLO for every platform, and the artefact.

An artefact is a zip file (or a folder) that holds all parts and the programs that read it, a copy
of `jaxmed.inference.standalone`; Python runs it as it is.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxmed.models.convolution import use_onednn
from jaxmed.types import UserError

PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = ("float32", "bfloat16", "int8")
SCALE = ".scale"
"""After the name of an array of int8: what its numbers are to be multiplied by."""
LOADER = "jaxmed_predict"
"""What the copy of `standalone` is called."""
_LARGEST = 127
_MAIN = '''"""`python model.zip --output=DIR IMAGE_OR_FOLDER...` predicts image files."""

import sys
from pathlib import Path

from jaxmed_predict.__main__ import main

if __name__ == "__main__":
    sys.exit(main(model=str(Path(__file__).parent)))
'''


def name_arrays(variables: Any) -> dict[str, np.ndarray]:
    """Variables of a network by their path, such as params/encoder0/conv0/conv/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(str(entry.key) for entry in path): np.asarray(leaf) for path, leaf in leaves}


def reduce_arrays(
    arrays: Mapping[str, np.ndarray], dtype: str, *, ensemble: bool
) -> dict[str, np.ndarray]:
    """Weights of fewer bits.

    Args:
        arrays: by name, float32.
        dtype: "float32" keeps them; "bfloat16" rounds all parameters; "int8" makes kernels whole
            numbers from -127 to 127, symmetric, with a scale an output channel (the last axis)
            beside them, as in Jacob et al. 2018 (arXiv 1712.05877) without the zero point.
        ensemble: the first axis is of models, each with scales of its own.
    """
    if dtype == "float32":
        return dict(arrays)
    if dtype == "bfloat16":
        return {
            name: array.astype(jnp.bfloat16) if name.startswith("params/") else array
            for name, array in arrays.items()
        }
    if dtype != "int8":
        raise UserError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    reduced = {}
    for name, array in arrays.items():
        if not name.endswith("/kernel"):
            reduced[name] = array
            continue
        axes = tuple(range(int(ensemble), array.ndim - 1))
        scale = np.abs(array).max(axes, keepdims=True) / np.float32(_LARGEST)
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        reduced[name] = np.rint(array / scale).astype(np.int8)
        reduced[name + SCALE] = scale
    return reduced


def expand_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a network, float32, from what `reduce_arrays` made of them; traceable."""
    variables: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.endswith(SCALE):
            continue
        value = array.astype(np.float32)
        if name + SCALE in arrays:
            value = value * arrays[name + SCALE]
        *folders, last = name.split("/")
        place = variables
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return variables


def export_program(
    function: Callable[[list[jax.Array], jax.Array], Mapping[str, jax.Array]],
    weights: Sequence[np.ndarray],
    shape: Sequence[str],
) -> tuple[bytes, dict[str, Any]]:
    """StableHLO of a function for `PLATFORMS`, and what `standalone.programs` must know of it.

    Args:
        function: (weights, images) -> arrays by name, each with the batch as its first axis.
        weights: arguments, so that the program is small and they are stored once.
        shape: of the images, sizes as text, which may hold symbols: ("batch", "4*rows", "1").
    """
    sizes = export.symbolic_shape(", ".join(shape))
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in weights]
    with use_onednn(False), _without_folders():
        exported = export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS)(
            like, jax.ShapeDtypeStruct(sizes, jnp.float32)
        )
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    rules = {
        "jax": jax.__version__,
        "platforms": list(exported.platforms),
        "calling_convention": exported.calling_convention_version,
        "input": [list(shape), "float32"],
        "outputs": {
            name: [[str(side) for side in aval.shape], str(aval.dtype)]
            for name, aval in outputs.items()
        },
    }
    return bytes(exported.mlir_module_serialized), rules


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Keep the folders of this machine out of the places in the code that programs name."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*[/\\\\]")
    try:
        yield
    finally:
        jax.config.update(name, before)


def loader_parts() -> dict[str, bytes]:
    """The programs that read an artefact, by their names in it."""
    folder = Path(__file__).parent / "standalone"
    parts = {f"{LOADER}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.py"))}
    return {"__main__.py": _MAIN.encode(), **parts}


def zip_parts(parts: Mapping[str, bytes]) -> bytes:
    """A zip file, the same for the same parts."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in parts.items():
            entry = zipfile.ZipInfo(name)  # of 1980, whenever it is made
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return stream.getvalue()
