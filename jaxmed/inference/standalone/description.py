"""What an artefact may say of itself: each key with what is expected of it.

Whoever made the file chose its numbers, and memory is taken by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

MOST_VALUES = 2**30
"""Of what the network is given at once: an image of one size, or a batch of windows."""

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and in words what is."""


def mistake_in(description: Any) -> str:
    """The first key that is missing or wrong, and what is expected; "" where all is well."""
    for rules in (_general, _particular):
        for key, (is_right, expected) in rules(description).items():
            value = description
            for part in key.split("."):
                if not isinstance(value, dict) or part not in value:
                    return f"{key} is missing, expected {expected}"
                value = value[part]
            if not is_right(value):
                return f"{key} is {value!r:.60}, expected {expected}"
    return ""


def _one_of(*values: Any) -> Rule:
    return lambda x: x in values, " or ".join(map(repr, values))


def _number(least: float = -1e30, most: float = 1e30, *, whole: bool = False) -> Rule:
    def is_right(x: Any) -> bool:
        is_number = isinstance(x, int if whole else int | float) and not isinstance(x, bool)
        return is_number and least <= x <= most  # NaN is not

    return is_right, f"a {'whole ' * whole}number from {least} to {most}"


def _list(item: Rule, *lengths: int) -> Rule:
    """Of any length where none is given."""
    is_right, expected = item
    return (
        lambda x: isinstance(x, list) and len(x) in (lengths or [len(x)]) and all(map(is_right, x)),
        f"a list, of length {' or '.join(map(str, lengths)) or 'any'}, each {expected}",
    )


def _sides(*lengths: int, values: int) -> Rule:
    """Of a shape with so many values a voxel."""
    is_right, expected = _list(_number(1, MOST_VALUES, whole=True), *lengths)
    return (
        lambda x: is_right(x) and math.prod(x) * values <= MOST_VALUES,
        f"{expected}, for {MOST_VALUES} values at most",
    )


def _pairs(*names: str) -> Rule:
    """Of each name and a number, in this order."""
    are_pairs, _ = _list(_list((lambda _: True, "of any kind"), 2), len(names))
    is_number, _ = _number()

    def is_right(x: Any) -> bool:
        return (
            are_pairs(x) and [name for name, _ in x] == [*names] and all(is_number(v) for _, v in x)
        )

    return is_right, f"a list of {names}, each with a number"


def _or_none(rule: Rule) -> Rule:
    is_right, expected = rule
    return lambda x: x is None or is_right(x), f"null or {expected}"


_TEXT: Rule = (lambda x: isinstance(x, str), "a text")
_TEXTS = _list(_TEXT)
_FLAG, _COUNT, _POSITIVE = _one_of(True, False), _number(1, 2**20, whole=True), _number(1e-9)
_SHARE = _number(0, 1)
_DIFFERENT: Rule = (lambda x: _TEXTS[0](x) and len(set(x)) == len(x), "a list of different texts")
_ARRAY: Rule = (
    lambda x: isinstance(x, list) and len(x) == 2 and _TEXTS[0](x[0]) and _TEXT[0](x[1]),
    "a list of a shape and a type",
)


def _general(description: Any) -> dict[str, Rule]:
    """What is expected of every description."""
    return {
        "format": _one_of("stablehlo", "onnx", "safetensors"),
        "task": _one_of("classification", "detection", "segmentation"),
        "ndim": _one_of(2, 3),
        "class_names": _TEXTS,
        "multilabel": _FLAG,
        "instances": _FLAG,
        "prepare.channels": _COUNT,
        "prepare.fit": _one_of("", "stretch", "pad"),
        "prepare.normalization": _TEXT,
        "windows.overlap": _number(0, 0.99),
        "windows.fill": _number(),
        "windows.batch": _COUNT,
        "trained_on.name": _TEXT,
        "trained_on.channels": _COUNT,
        "trained_on.gray_only": _FLAG,
        "trained_on.dtypes": _TEXTS,
        "step": _number(0, 2**53, whole=True),
        "parameters_sha256": _TEXT,
        "columns": _TEXTS,
        "decisions": _or_none((lambda x: isinstance(x, dict), "numbers by name")),
    }


def _particular(description: dict[str, Any]) -> dict[str, Rule]:
    """What is expected beside the general, which must be right."""
    ndim, task = description["ndim"], description["task"]
    classes, prepare = len(description["class_names"]), description["prepare"]
    channels, batch = prepare["channels"], description["windows"]["batch"]
    window = prepare["normalization"] == "window"
    rules = {
        "prepare.size": _sides(0, ndim, values=channels),
        "prepare.spacing": _list(_POSITIVE, 0, ndim),
        "prepare.options": _pairs(*("level", "width") * window),
        "windows.size": _sides(ndim, values=channels * batch),
    }
    if description["instances"]:
        rules["smallest"] = _number(0, 2**31, whole=True)
    if task == "detection":
        rules |= {
            "score_threshold": _SHARE,
            "suppression.iou_threshold": _SHARE,
            "suppression.max_boxes": _COUNT,
            "suppression.candidates": _COUNT,
        }
    if description["format"] == "stablehlo":
        outputs = ("boxes", "scores", "labels") if task == "detection" else ("probabilities",)
        rules |= {
            "program.jax": _TEXT,
            "program.platforms": _TEXTS,
            "program.calling_convention": _COUNT,
            "program.input": _ARRAY,
            "program.weights": _DIFFERENT,
            **{f"program.outputs.{name}": _ARRAY for name in outputs},
        }
    if description["decisions"] is not None:
        each = _list(_number(), classes)
        fixed: dict[str, Rule] = {"temperature": _POSITIVE}
        if task == "detection":
            fixed = {"slope": _number(), "intercept": _number()}
        elif description["multilabel"]:
            fixed = {"slopes": each, "intercepts": each, "thresholds": each}
        elif task == "classification":
            fixed |= {"threshold": _or_none(_number()), "set_threshold": _number()}
            fixed["biases"] = _list(_number(), 1, classes)
        rules |= {f"decisions.{name}": rule for name, rule in fixed.items()}
    return rules
