"""What runs the network: a StableHLO program through jax, or an ONNX file through onnxruntime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .contents import NETWORK, PROGRAM, Contents, ModelError

Outputs = dict[str, np.ndarray]
CALLS = {"shape_assertion", "mhlo.topk", "stablehlo.dynamic_top_k"}
"""Calls by name that XLA itself carries out."""
Run = Callable[[np.ndarray], Outputs]


def load_program(contents: Contents, description: dict[str, Any]) -> Run:
    """Float32 images (batch, *window, channels) -> outputs by name, each with a batch axis.

    Raises:
        ModelError: a part is damaged, or a library is missing or too old.
    """
    if description["format"] == "onnx":
        return _load_onnx(contents)
    if description["format"] != "stablehlo":
        raise ModelError(
            f"{contents.path}: holds weights alone; open it with jaxmed's predict.py or load_run"
        )
    return _load_stablehlo(contents, description["program"])


def _load_stablehlo(contents: Contents, rules: dict[str, Any]) -> Run:
    """The program with its weights, for the devices that jax has here."""
    import jax

    arrays = contents.weights()
    try:
        weights = [jax.numpy.asarray(arrays[name]) for name in rules["weights"]]
    except KeyError as error:
        raise ModelError(f"{contents.path}: weights {error} are missing; export again") from error
    module = contents.read(PROGRAM)
    check_calls(module, str(contents.path))
    try:
        call = jax.jit(rebuild(module, rules, weights).call)
    except Exception as error:  # a size or device that jax does not know
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"{contents.path}: its program is damaged ({told})") from error

    def run(images: np.ndarray) -> Outputs:
        try:
            return jax.device_get(call(weights, images))
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{contents.path}: the program does not run here ({told}); it was made with jax "
                f"{rules['jax']} for {', '.join(rules['platforms'])}: use that jax or a newer one"
            ) from error

    return run


def check_calls(module: bytes, where: str) -> None:
    """Refuse a program that calls native code by name: what jaxmed exports does so for shapes only.

    Raises:
        ModelError: it does, or it is no program.
    """
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo

    called: set[str] = set()

    def look(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            called.add(ir.StringAttr(operation.attributes["call_target_name"]).value)
        return ir.WalkResult.ADVANCE

    try:
        with ir.Context() as context:
            stablehlo.register_dialect(context)
            stablehlo.deserialize_portable_artifact(context, module).operation.walk(look)
    except Exception as error:
        raise ModelError(f"{where}: its program is damaged, or of a newer jax") from error
    if strange := sorted(called - CALLS):
        raise ModelError(
            f"{where}: its program calls {', '.join(strange)}, which none of ours does"
        )


def rebuild(module: bytes, rules: dict[str, Any], weights: list[Any]) -> Any:
    """A `jax.export.Exported` around a serialised module.

    jax's own file format needs flatbuffers, which jax does not install. Here a stand-in with the
    same arguments and results is exported, and its module replaced.

    Args:
        module: StableHLO, portable bytecode.
        rules: `program` of the description.
        weights: the first argument, arrays or their shapes and types.
    """
    import jax
    from jax import export
    from jax import numpy as jnp

    scope = export.SymbolicScope()
    dims = {
        name: export.symbolic_shape(", ".join(map(str, shape)), scope=scope)
        for name, (shape, _) in {"": rules["input"], **rules["outputs"]}.items()
    }

    def stand_in(weights: list[Any], images: Any) -> Any:
        # The sizes of the results are products of the images' own, whose symbols these are.
        return {name: jnp.zeros(dims[name], kind) for name, (_, kind) in rules["outputs"].items()}

    like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in weights]
    images = jax.ShapeDtypeStruct(dims[""], rules["input"][1])
    template = export.export(
        jax.jit(stand_in, keep_unused=True), platforms=tuple(rules["platforms"])
    )(like, images)
    return dataclasses.replace(
        template,
        mlir_module_serialized=module,
        calling_convention_version=rules["calling_convention"],
        uses_global_constants=True,
    )


def _load_onnx(contents: Contents) -> Run:
    try:
        import onnxruntime
    except ImportError:
        raise ModelError("onnxruntime is not installed; pip install onnxruntime") from None
    content = contents.read(NETWORK)
    onnxruntime.set_default_logger_severity(3)
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"{contents.path}: {NETWORK} is damaged; export it again") from error
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> Outputs:
        found = session.run(names, {session.get_inputs()[0].name: images})
        return dict(zip(names, found, strict=True))

    return run
