"""Models trained together: which there are, and in what they differ."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed.build.checks import PROBABILITIES, check_numbers, useless_keys
from jaxmed.build.config import flatten, update
from jaxmed.types import UserError

VARIABLE = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.momentum",
    "optimizer.ema",
    "model.dropout",
    "augmentation.rotation",
    "augmentation.translation",
    *PROBABILITIES,
)
"""Keys in which models of one program may differ: plain numbers that change no shape."""

SWITCHES = ("optimizer.clip_norm", "optimizer.ema")
"""Keys whose zero leaves a part of the program out, so that it cannot be told from others."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the models that are trained together.

    Attributes:
        name: of the fold, the seed and the setting, as far as there are several.
        setting: the varied settings, in words; members of one setting are comparable.
        fold: of the cross-validation; None where all learn from the same training part.
        seed: of its weights, its order of the data and its augmentation.
        changes: keys of the config, with this model's own values.
    """

    name: str
    setting: str
    fold: int | None
    seed: int
    changes: Mapping[str, Any]


def plan_members(config: ConfigDict) -> tuple[Member, ...]:
    """Every combination of the folds, seeds and settings that the config asks for.

    Returns:
        Nothing where one model is to be trained.

    Raises:
        UserError: where `training.folds`, `seeds` or `vary` make no sense.
    """
    folds, seeds = config.training.folds, config.training.seeds
    if folds == 1:
        raise UserError("training.folds is 1; expected 0 for none, or at least 2")
    if seeds < 1:
        raise UserError(f"training.seeds is {seeds}; expected at least 1")
    settings = parse_vary(config.training.vary, known=flatten(config))
    if not folds and seeds == 1 and not config.training.vary:
        return ()
    members = []
    for changes, fold, seed in itertools.product(
        settings, range(folds) if folds else [None], range(seeds)
    ):
        setting = " ".join(f"{key.split('.')[-1]}={_word(n)}" for key, n in changes.items())
        parts = [setting] if len(settings) > 1 else []
        parts += [f"fold{fold}"] if fold is not None else []
        parts += [f"seed{config.seed + seed}"] if seeds > 1 else []
        name = " ".join(parts) or setting
        members.append(Member(name, setting, fold, config.seed + seed, changes))
    useless = set.intersection(*(set(useless_keys(member_config(config, m))) for m in members))
    for key in settings[0]:
        if key in useless:
            raise UserError(f"training.vary: {key} has no effect in this config; leave it out")
    for member in members:
        try:
            check_numbers(member_config(config, member))
        except UserError as error:
            raise UserError(f"training.vary: {error}") from None
    return tuple(members)


def _word(number: float) -> str:
    """A number, short where that is all of it."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def parse_vary(text: str, *, known: Collection[str] = ()) -> list[dict[str, float]]:
    """`"a.b=1,2; c.d=3,4"` -> every combination, one dict each; `[{}]` for an empty text.

    `"a.b=1; c.d=3 | a.b=2; c.d=4"` are just these two: what is between bars adds up.

    Args:
        text: of `training.vary`.
        known: keys of the config, which were meant as they are.

    Raises:
        UserError: for a key that cannot vary, or what is no number.
    """
    grids = text.split("|")
    settings = [
        setting
        for grid in grids
        for setting in _parse_grid(grid, text=text, known=known, is_all=len(grids) == 1)
    ]
    for i, setting in enumerate(settings):
        if setting.keys() != settings[0].keys():
            raise UserError(f"training.vary is {text!r}; expected the same keys between all bars")
        if setting in settings[:i]:
            raise UserError(f"training.vary is {text!r}; two of its settings are the same")
    for key in set(SWITCHES) & settings[0].keys():
        if 0 < sum(setting[key] > 0 for setting in settings) < len(settings):
            raise UserError(f"training.vary: {key} cannot be on in some models and off in others")
    return settings


def vary_text(settings: Sequence[Mapping[str, float]]) -> str:
    """What `parse_vary` reads as these settings, of which there are several."""
    return " | ".join("; ".join(f"{k}={v!r}" for k, v in setting.items()) for setting in settings)


def _parse_grid(
    grid: str, *, text: str, known: Collection[str], is_all: bool
) -> list[dict[str, float]]:
    """Every combination of what is between two bars, or of the whole text."""
    axes: dict[str, list[float]] = {}
    for part in filter(None, (p.strip() for p in grid.split(";"))):
        key, equals, values = (piece.strip() for piece in part.partition("="))
        if key not in VARIABLE:
            near = [] if key in known else difflib.get_close_matches(key, VARIABLE, n=1)
            meant = f"did you mean {near[0]}?" if near else f"these can: {', '.join(VARIABLE)}"
            raise UserError(f"training.vary: {key} cannot differ between models; {meant}")
        numbers = _parse_numbers(key, values.split(",") if equals else [])
        if not numbers or key in axes:
            raise UserError(
                f"training.vary is {text!r}; expected numbers for each key once, as in "
                "optimizer.learning_rate=1e-3,3e-4;model.dropout=0,0.2"
            )
        if len(numbers) == 1 and is_all:
            raise UserError(
                f"training.vary: {key} has one value; set it for all models with --config.{key}="
                f"{values}"
            )
        axes[key] = numbers
    if text and not axes:
        raise UserError(f"training.vary is {text!r}; expected keys with numbers, or nothing")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _parse_numbers(key: str, values: Sequence[str]) -> list[float]:
    """Finite numbers, none twice."""
    numbers: list[float] = []
    for value in values:
        try:
            numbers.append(float(value))
        except ValueError:
            hint = "; put a semicolon between keys" if "=" in value else ""
            raise UserError(f"training.vary: {key}={value} is no number{hint}") from None
        if not math.isfinite(numbers[-1]) or numbers.count(numbers[-1]) > 1:
            raise UserError(
                f"training.vary: {key}={value.strip()}; expected finite numbers, none twice"
            )
    return numbers


def member_config(config: ConfigDict, member: Member) -> ConfigDict:
    """The config that this model would have if it were trained by itself."""
    config = config.copy_and_resolve_references()
    update(config, {**member.changes, "seed": member.seed}, where=f"training.vary, {member.name}")
    return config


def read_members(run: Mapping[str, Any]) -> tuple[Member, ...]:
    """Those of a run, from its config.json."""
    return tuple(Member(**stored) for stored in run.get("members", ()))


def fold_name(fold: int) -> str:
    """Of a fold's validation part in split.json."""
    return f"fold{fold}"


def rows_of(split: Mapping[str, Sequence[Any]], part: str, fold: int | None = None) -> list[Any]:
    """Rows, or ids, of a part of a split that may have folds in place of train and val.

    Args:
        split: rows or ids by part; the validation parts of folds are named by `fold_name`.
        part: "train" or "val" are, with folds, those of the given fold; with None, all that any
            model was trained on, which all folds together validate.
        fold: of which, where the split has folds.

    Raises:
        UserError: where the split has no such fold.
    """
    if fold is not None and fold_name(fold) not in split:
        raise UserError(f"{fold_name(fold)} is not in the split, which has {', '.join(split)}")
    folds = sorted((name for name in split if name.startswith("fold")), key=lambda n: int(n[4:]))
    if not folds or part not in ("train", "val"):
        return list(split.get(part, []))
    if fold is None:
        chosen = folds
    elif part == "val":
        chosen = [fold_name(fold)]
    else:
        chosen = [name for name in folds if name != fold_name(fold)]
    return sorted(row for name in chosen for row in split[name])


def setting_of_best(members: Sequence[Member], best: Mapping[str, Any]) -> list[int]:
    """Places of the members that predict: those of the setting with the highest mean score.

    A setting of which a model diverged before it had weights, or never had a score (as the AUROC
    of a fold with one class), comes after those that are whole.

    Args:
        members: all of a run.
        best: of the run's state: "score", "step" (0 where there are no trained weights), each
            (members,).

    Returns:
        Only members with weights.

    Raises:
        UserError: where no member has any.
    """
    by_setting: dict[str, list[int]] = {}
    for place, member in enumerate(members):
        by_setting.setdefault(member.setting, []).append(place)

    def rank(places: list[int]) -> tuple[int, int, float]:
        scores = [best["score"][i] for i in places if np.isfinite(best["score"][i])]
        usable = sum(int(best["step"][i] > 0) for i in places)
        return usable, len(scores), float(np.mean(scores)) if scores else -math.inf

    chosen = [i for i in max(by_setting.values(), key=rank) if best["step"][i] > 0]
    if not chosen:
        raise UserError(
            "every model diverged before its first evaluation; lower optimizer.learning_rate, or "
            "set optimizer.clip_norm, in another workdir"
        )
    return chosen
