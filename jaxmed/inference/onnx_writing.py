"""A traced function as an ONNX network: the operations that networks here are made of.

A converter of one's own, as the one that there is cannot be installed beside today's orbax, and its
versions that can know no 3-D convolution. Operations that are not known are refused by name.

Operator set 17 (https://onnx.ai/onnx/operators/), which needs no more than onnxruntime 1.12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxmed.types import UserError

OPSET = 17
_IR_VERSION = 8
_MOST_BYTES = 2**31 - 2**24
"""Of weights: a message of protobuf has less than 2 GiB."""

ELEMENTWISE = {
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "exp": "Exp",
    "log": "Log",
    "neg": "Neg",
    "abs": "Abs",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "erf": "Erf",
    "floor": "Floor",
    "logistic": "Sigmoid",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
    "eq": "Equal",
    "and": "And",
    "or": "Or",
    "not": "Not",
    "stop_gradient": "Identity",
    "copy": "Identity",
    "copy_p": "Identity",
    "pow": "Pow",
}


def write_onnx(
    function: Callable[..., Mapping[str, jax.Array]],
    weights: Mapping[str, np.ndarray],
    shape: Sequence[int],
    *,
    description: str = "",
) -> bytes:
    """An ONNX file of a function, whose batch may have any size.

    Args:
        function: (weights, images) -> arrays by name, each with the batch as its first axis.
        weights: by name, which initialisers keep.
        shape: (*spatial, channels) of an image, float32.
        description: kept in the file.

    Raises:
        UserError: an operation has no counterpart here, or `onnx` is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("onnx is not installed; make setup EXTRAS=export") from None
    size = sum(array.nbytes for array in weights.values())
    if size > _MOST_BYTES:
        raise UserError(
            f"--format=onnx: the weights have {size} bytes, an ONNX file holds {_MOST_BYTES} at "
            "most; export with --dtype=int8, or with --format=stablehlo"
        )
    (batch,) = jax.export.symbolic_shape("batch")
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    images = jax.ShapeDtypeStruct((batch, *shape), np.float32)
    traced, out_tree = jax.make_jaxpr(function, return_shape=True)(like, images)
    names = list(out_tree)
    graph = _Graph()
    flat = [graph.constant(np.asarray(weights[name]), name) for name in sorted(weights)]
    results = graph.inline(traced, [*flat, "images"])
    for name, result in zip(sorted(names), results, strict=True):
        graph.node("Identity", [result], name=name)
    image = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", *shape])
    outputs = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(out_tree[name].dtype),
            ["batch", *map(int, out_tree[name].shape[1:])],
        )
        for name in sorted(names)
    ]
    made = onnx.helper.make_graph(graph.nodes, "network", [image], outputs, graph.initializers)
    model = onnx.helper.make_model(
        made,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="jaxmed",
        doc_string=description,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


class _Graph:
    """Nodes and constants under way. A value is a name, or an array that is known already."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._count = 0

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """The name of a constant."""
        import onnx

        name = name or self._fresh()
        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, inputs: Sequence[Any], *, name: str = "", **attributes: Any) -> str:
        """The name of the result of an operation."""
        import onnx

        name = name or self._fresh()
        read = [x if isinstance(x, str) else self.constant(np.asarray(x)) for x in inputs]
        self.nodes.append(onnx.helper.make_node(kind, read, [name], **attributes))
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"x{self._count}"

    def inline(self, closed: ClosedJaxpr | Jaxpr, arguments: Sequence[Any]) -> list[Any]:
        """Write a traced function out; returns its results."""
        jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        constants = closed.consts if isinstance(closed, ClosedJaxpr) else []
        known: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {v: np.asarray(x) for v, x in zip(jaxpr.constvars, constants, strict=True)}

        def value(atom: Any) -> Any:
            return np.asarray(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [value(atom) for atom in equation.invars])
            known |= dict(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        kind, options = equation.primitive.name, equation.params
        inner = options.get("jaxpr", options.get("call_jaxpr"))
        if inner is not None and kind not in ("scan", "while"):
            return self.inline(inner, inputs)
        if not any(isinstance(x, str) for x in inputs):  # of no image and no weight
            found = equation.primitive.bind(*inputs, **options)
            many = equation.primitive.multiple_results
            return [np.asarray(x) for x in (found if many else [found])]
        if kind in ELEMENTWISE:
            return [self.node(ELEMENTWISE[kind], inputs)]
        convert = _CONVERSIONS.get(kind)
        if convert is None:
            raise UserError(
                f"--format=onnx: the network has an operation {kind!r}, which has no counterpart "
                "here; export with --format=stablehlo"
            )
        found = convert(self, equation, inputs)
        return found if isinstance(found, list) else [found]


def _sizes(shape: Sequence[Any]) -> np.ndarray:
    """Sizes for Reshape; of the batch, which is first, -1."""
    if any(not isinstance(side, int | np.integer) for side in shape[1:]):
        raise UserError(f"--format=onnx: a shape {tuple(shape)} mixes the batch with other axes")
    return np.array([s if isinstance(s, int | np.integer) else -1 for s in shape], np.int64)


def _reshape(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    return graph.node("Reshape", [inputs[0], _sizes(equation.outvars[0].aval.shape)])


def _broadcast(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    """New axes of size one; what is repeated along old or new ones is expanded."""
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    old = equation.invars[0].aval.shape
    thin: list[Any] = [1] * len(shape)
    for place, side in zip(places, old, strict=True):
        thin[place] = side
    found = graph.node("Reshape", [inputs[0], _sizes(thin)])
    if tuple(thin) == tuple(shape):
        return found
    # One where the axis is as it should be: Expand then takes the larger of the two.
    wider = [1 if a is b or a == b else b for a, b in zip(thin, shape, strict=True)]
    if not all(isinstance(side, int | np.integer) for side in wider):
        raise UserError("--format=onnx: something is repeated along the batch")
    return graph.node("Expand", [found, np.array(wider, np.int64)])


def _convolution(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    """Channels last -> channels first, the convolution, and back."""
    options = equation.params
    numbers = options["dimension_numbers"]
    if set(options["lhs_dilation"]) != {1} or options["batch_group_count"] != 1:
        raise UserError("--format=onnx: a convolution is transposed, which is not known here")
    low, high = zip(*options["padding"], strict=True)
    image = graph.node("Transpose", [inputs[0]], perm=list(numbers.lhs_spec))
    kernel = graph.node("Transpose", [inputs[1]], perm=list(numbers.rhs_spec))
    found = graph.node(
        "Conv",
        [image, kernel],
        strides=list(options["window_strides"]),
        pads=[*low, *high],
        dilations=list(options["rhs_dilation"]),
        group=options["feature_group_count"],
    )
    return graph.node("Transpose", [found], perm=np.argsort(numbers.out_spec).tolist())


def _reduction(kind: str) -> Callable[..., str]:
    def reduce(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
        axes = [int(axis) for axis in equation.params["axes"]]
        if kind == "ReduceSum":  # whose axes are an input since operator set 13
            return graph.node(kind, [inputs[0], np.array(axes, np.int64)], keepdims=0)
        return graph.node(kind, [inputs[0]], axes=axes, keepdims=0)

    return reduce


def _dot(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    """A matrix product of (..., k) with (k, n)."""
    (left, right), batch = equation.params["dimension_numbers"]
    rank = len(equation.invars[0].aval.shape)
    if tuple(left) != (rank - 1,) or tuple(right) != (0,) or any(batch):
        raise UserError("--format=onnx: a product of this kind is not known here")
    return graph.node("MatMul", inputs)


def _pad(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    low, high, inside = zip(*equation.params["padding_config"], strict=True)
    if any(inside) or min(*low, *high) < 0:
        raise UserError("--format=onnx: padding between voxels is not known here")
    return graph.node("Pad", [inputs[0], np.array([*low, *high], np.int64), inputs[1]])


def _slice(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    options, shape = equation.params, equation.invars[0].aval.shape
    steps = options["strides"] or (1,) * len(shape)
    begins, ends = options["start_indices"], options["limit_indices"]
    cut = [
        axis
        for axis, (begin, end, step, side) in enumerate(
            zip(begins, ends, steps, shape, strict=True)
        )
        if begin != 0 or step != 1 or end != side
    ]
    chosen = ([int(values[axis]) for axis in cut] for values in (begins, ends))
    begin, end = chosen
    order = [begin, end, cut, [int(steps[axis]) for axis in cut]]
    return graph.node("Slice", [inputs[0], *(np.array(x, np.int64) for x in order)])


def _reverse(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    axes = [int(axis) for axis in equation.params["dimensions"]]
    least = np.iinfo(np.int64).min
    order = [[-1] * len(axes), [least] * len(axes), axes, [-1] * len(axes)]
    return graph.node("Slice", [inputs[0], *(np.array(x, np.int64) for x in order)])


def _split(graph: _Graph, equation: Any, inputs: list[Any]) -> list[str]:
    axis, found, begin = int(equation.params["axis"]), [], 0
    for size in equation.params["sizes"]:
        order = [[begin], [begin + int(size)], [axis]]
        found.append(graph.node("Slice", [inputs[0], *(np.array(x, np.int64) for x in order)]))
        begin += int(size)
    return found


def _stack(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    axis = np.array([equation.params["axis"]], np.int64)
    parts = [graph.node("Unsqueeze", [x, axis]) for x in inputs]
    return graph.node("Concat", parts, axis=int(axis[0]))


def _cast(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    import onnx

    kind = np.dtype(equation.params["new_dtype"])
    return graph.node("Cast", inputs, to=onnx.helper.np_dtype_to_tensor_dtype(kind))


def _rsqrt(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    return graph.node("Reciprocal", [graph.node("Sqrt", inputs)])


def _power(graph: _Graph, equation: Any, inputs: list[Any]) -> str:
    power = np.asarray(equation.params["y"], equation.invars[0].aval.dtype)
    return graph.node("Pow", [inputs[0], power])


_CONVERSIONS: dict[str, Callable[..., Any]] = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "dot_general": _dot,
    "pad": _pad,
    "slice": _slice,
    "rev": _reverse,
    "split": _split,
    "stack": _stack,
    "concatenate": lambda graph, equation, inputs: graph.node(
        "Concat", inputs, axis=int(equation.params["dimension"])
    ),
    "transpose": lambda graph, equation, inputs: graph.node(
        "Transpose", inputs, perm=[int(axis) for axis in equation.params["permutation"]]
    ),
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "convert_element_type": _cast,
    "rsqrt": _rsqrt,
    "square": lambda graph, equation, inputs: graph.node("Mul", [inputs[0], inputs[0]]),
    "integer_pow": _power,
    "select_n": lambda graph, equation, inputs: graph.node(
        "Where", [inputs[0], inputs[2], inputs[1]]
    ),
}
"""From an operation of jax to one of ONNX; select_n takes its last where the condition holds."""
