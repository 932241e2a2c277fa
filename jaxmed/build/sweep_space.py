"""The search space of a sweep: which keys of the config take which values."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from jaxmed.build.checks import check_numbers, useless_keys
from jaxmed.build.config import flatten, nearest, update
from jaxmed.build.members import SWITCHES, VARIABLE
from jaxmed.build.workdir import is_free
from jaxmed.types import UserError

LARGEST_FILE = 2**20
"""Bytes of a space's file; anything larger is another file."""

UNCOMPARABLE = (
    "task",
    "seed",
    *("data.layout", "data.path", "data.name", "data.label_column", "data.class_names"),
    *("data.masks", "data.invalid", "data.fractions", "data.kind", "data.ndim", "data.count"),
    *("data.extent", "evaluation.nsd_tolerance"),
    "model.init",  # of a run that may have learnt cases of the validation part
)
"""Keys that change the validation part, or what its score means."""
UNRANKED = (
    *("evaluation.coverage", "evaluation.calibration", "evaluation.operating_point"),
    "evaluation.score_threshold",
)
"""Keys of what is decided after the ranking."""

Value = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Dimension:
    """The values that one key takes.

    Attributes:
        key: of the config.
        choices: values; or, where there are none,
        low, high: the range, both ends within it.
        step: between values; 0 of numbers that are any in the range.
        log: whether each factor, not each difference, is as likely.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    log: bool = False

    @property
    def names(self) -> list[Value]:
        """The choices as plain values; of a tuple its JSON."""
        return [json.dumps(c) if isinstance(c, tuple) else c for c in self.choices]

    def value(self, name: Any) -> Any:
        """The value of the config that a name of `names`, or a number of the range, stands for."""
        return self.choices[self.names.index(name)] if self.choices else name

    @property
    def is_whole(self) -> bool:
        """Whether the range is of whole numbers."""
        return isinstance(self.low, int)

    @property
    def count(self) -> float:
        """How many values there are; infinite of a range without steps."""
        if self.choices:
            return len(self.choices)
        if not self.step:
            return math.inf
        low, high, step = (Decimal(str(x)) for x in (self.low, self.high, self.step))
        return int((high - low) // step) + 1

    def grid(self) -> list[Any]:
        """All values, as `names` has them, where `count` is finite."""
        if self.choices:
            return self.names
        # As they are written, so that no rounding leads beyond the range.
        low, step, kind = Decimal(str(self.low)), Decimal(str(self.step)), type(self.low)
        return [kind(low + i * step) for i in range(int(self.count))]

    def told(self) -> str:
        """In words."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        how = f" in steps of {self.step:g}" if self.step and self.step != 1 else ""
        return f"{self.low:g} to {self.high:g}{how}{', logarithmic' if self.log else ''}"


def read_space(path: str | Path, config: ConfigDict) -> tuple[Dimension, ...]:
    """The space of a YAML file, each value of which has been tried on the config.

    `key: [value, value]` are choices, `key: {low: 1.0e-4, high: 0.1, log: true}` is a range, with
    `step: 8` of multiples; of a key for whole numbers it has whole numbers.

    Args:
        path: of the file; read as data, nothing in it is run.
        config: as given on the command line, of which the keys and their types are taken.

    Raises:
        UserError: naming the file and the key.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"--space={path}: larger than 1 MiB, so it is no search space")
        content = _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--space={path}: cannot be read ({said})") from error
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"--space={path}: expected lines such as "
            "optimizer.learning_rate: {low: 1.0e-4, high: 0.1, log: true}"
        )
    known = flatten(config)
    dimensions = []
    for key, given in content.items():
        where = f"--space={path}"
        if key not in known:
            near = nearest(str(key), list(known))
            meant = f"did you mean {near}?" if near else "train.py --dry_run lists the keys"
            raise UserError(f"{where}: no such key {key!r}; {meant}")
        _check_key(where, key, known)
        dimensions.append(_dimension(where, key, given, type(known[key])))
    _try_values(str(path), config, dimensions)
    return tuple(dimensions)


def _parse(text: str) -> Any:
    """The content of a YAML file without its traps.

    Raises:
        ValueError: for aliases, with which a short file could hold any amount, and for a key that
            is there twice, of which the last would count.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it has aliases (*name); write the values out")
    nodes = [yaml.compose(text, yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise ValueError(f"{twice[0]} is there twice")
            nodes += [value for _, value in node.value]
    return yaml.safe_load(text)


def is_of_numbers(space: Sequence[Dimension]) -> bool:
    """Whether models with all settings of the space can be trained as one program."""
    return all(dimension.key in VARIABLE for dimension in space)


def mixed_switch(space: Sequence[Dimension]) -> str | None:
    """A key that can be both 0 and more, which models of one program cannot be."""
    for dimension in space:
        ends = dimension.choices or (dimension.low, dimension.high)
        if dimension.key in SWITCHES and 0 in ends and any(ends):
            return dimension.key
    return None


def settings_of(space: Sequence[Dimension], params: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's parameters set in the config."""
    return {dimension.key: dimension.value(params[dimension.key]) for dimension in space}


def _check_key(where: str, key: str, known: Mapping[str, Any]) -> None:
    if key in UNCOMPARABLE:
        raise UserError(
            f"{where}: {key} changes what the score means, so that trials could not be compared; "
            "sweep over it by hand"
        )
    if is_free(key) or key.endswith("_every") or key in UNRANKED:
        raise UserError(
            f"{where}: {key} does not change the score that trials are ranked by; leave it out"
        )
    if key == "training.epochs" and known["training.steps"]:
        raise UserError(
            f"{where}: {key} has no effect beside training.steps; leave one of them out"
        )
    if key in ("training.folds", "training.seeds", "training.vary"):
        raise UserError(f"{where}: {key} is not for a search; see --seeds and --together")


def _dimension(where: str, key: str, given: Any, kind: type) -> Dimension:
    if isinstance(given, list):
        choices = tuple(_typed(where, key, value, kind) for value in given)
        if len(choices) < 2 or any(choice in choices[:i] for i, choice in enumerate(choices)):
            raise UserError(f"{where}: {key} is {given!r}; expected two or more different values")
        return Dimension(key, choices)
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= _RANGE:
        raise UserError(
            f"{where}: {key} is {given!r}; expected a list of values, or a range such as "
            "{low: 1, high: 9}, perhaps with step or log"
        )
    if kind not in (int, float):
        raise UserError(f"{where}: {key} takes no numbers; give its values as a list")
    low, high = (_typed(where, key, given[end], kind) for end in ("low", "high"))
    step = _typed(where, key, given.get("step", kind(kind is int)), kind)
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: {key} has log={log!r}; expected true or false")
    stepped = "step" in given
    if not low < high or step < 0 or (stepped and not 0 < step <= high - low):
        raise UserError(f"{where}: {key} is {given!r}; expected low < high, and a step between")
    if log and (low <= 0 or stepped):
        raise UserError(f"{where}: {key} is {given!r}; log needs low > 0, and takes no step")
    return Dimension(key, (), low, high, step, log)


_RANGE = {"low", "high", "step", "log"}


def _typed(where: str, key: str, value: Any, kind: type) -> Any:
    """A value of the type of the key's default."""
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML takes 1e-3 for a word
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is not kind or not is_finite:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        expected = wanted.get(kind, "a list")
        raise UserError(f"{where}: {key} has the value {value!r}; expected {expected}")
    return value


def _try_values(path: str, config: ConfigDict, space: Sequence[Dimension]) -> None:
    """Set each choice and each end of a range, and check the config it makes."""
    where = f"--space={path}"
    for dimension in space:
        for value in _tried(dimension):
            tried = config.copy_and_resolve_references()
            update(tried, {dimension.key: value}, where=where)
            try:
                check_numbers(tried)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        if not _helps(dimension, space, config, where=where):
            raise UserError(f"{where}: {dimension.key} has no effect here; leave it out")


def _helps(
    dimension: Dimension, space: Sequence[Dimension], config: ConfigDict, *, where: str
) -> bool:
    """Whether a key matters, perhaps only beside the values of another one."""
    for value in _tried(dimension):
        for other in space:
            tried = config.copy_and_resolve_references()
            for of_other in _tried(other):
                update(tried, {other.key: of_other, dimension.key: value}, where=where)
                if dimension.key not in useless_keys(tried):
                    return True
    return False


def _tried(dimension: Dimension) -> tuple[Any, ...]:
    return dimension.choices or (dimension.low, dimension.high)
