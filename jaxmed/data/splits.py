"""Cut a data set into parts or folds: by patient, stratified by label, the same every time."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.types import UserError, count_of

PARTS = ("train", "val", "test")


def split_cases(
    ids: Sequence[str],
    *,
    patients: Sequence[str] | None = None,
    labels: Sequence[Any] | np.ndarray | None = None,
    parts: Mapping[str, Sequence[int]],
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int,
) -> tuple[dict[str, list[int]], list[str]]:
    """The rows of every part, and notes on what is odd about them.

    Given parts stay as they are, and nothing in them is repaired. A missing validation part is cut
    from train, in the proportion that `fractions` gives these two. Where neither train nor any
    other part claims a row, it counts as train. With no part given, all three are cut. A case is
    put into the same part whatever the order of the cases. A patient whom another part claims is
    kept out of train.

    Args:
        ids: unique name of each case.
        patients: patient, or other group that must stay whole, of each case; "" where unknown.
        labels: class of each case, or (cases, classes) of 0 and 1, to be spread evenly.
        parts: rows of the parts that the data set comes with; {} if none.
        fractions: of train, val and test; that of test may be 0.
        seed: another seed gives another cut.

    Returns:
        Sorted rows by part, and notes; a note names no patient.

    Raises:
        UserError: too few patients for the parts, rows that do not exist, or names used twice.

    >>> patients = ["a", "a", "b", "c", "c", "d"]
    >>> ids = [f"image{i}" for i in range(6)]
    >>> parts, notes = split_cases(
    ...     ids, patients=patients, parts={}, fractions=(0.5, 0.25, 0.25), seed=0
    ... )
    >>> {name: sorted({patients[row] for row in rows}) for name, rows in parts.items()}
    {'train': ['c', 'd'], 'val': ['a'], 'test': ['b']}
    """
    _check(ids, patients, labels, range(len(ids)))
    if min(fractions[:2]) <= 0 or fractions[2] < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions {fractions}: expected train, val and test parts that sum to 1")
    given = {name: [int(row) for row in rows] for name, rows in parts.items() if len(rows)}
    _check_given(given, len(ids))
    claimed = set(itertools.chain.from_iterable(given.values()))
    free = [row for row in range(len(ids)) if row not in claimed]

    def cut(rows: Sequence[int], names: Sequence[str]) -> dict[str, list[int]]:
        shares = np.array([fractions[PARTS.index(name)] for name in names], np.float64)
        groups = _assign(ids, patients, labels, rows, shares, seed=seed, names=names)
        return dict(zip(names, groups, strict=True))

    if not given:
        return cut(free, PARTS if fractions[2] else PARTS[:2]), []
    result = {name: sorted(rows) for name, rows in given.items()}
    notes = []
    if free and "train" in given:
        notes.append(f"{len(free)} cases belong to none of the given parts and are left out")
    elif free:
        tested = {patients[row] for row in claimed} - {""} if patients is not None else set()
        known = [row for row in free if patients is not None and patients[row] in tested]
        result["train"] = [row for row in free if row not in set(known)]
        left = len(result["train"])
        notes.append(f"{left} cases that belong to no given part are taken for train")
        if known:
            notes.append(
                f"{len(known)} cases of patients that are in a given part are left out of train"
            )
        if not left:
            raise UserError("no case is left to train on: all are, or their patients, in a part")
    notes += _overlaps(result, patients)
    if "val" not in result and "train" in result:
        result |= cut(result["train"], PARTS[:2])
    return result, notes


def k_folds(
    ids: Sequence[str],
    *,
    patients: Sequence[str] | None = None,
    labels: Sequence[Any] | np.ndarray | None = None,
    folds: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Train and validation rows of each fold of a cross-validation.

    Every row is in the validation part of exactly one fold; patients are kept whole.

    Args:
        ids: unique name of each case.
        patients: patient, or other group that must stay whole, of each case; "" where unknown.
        labels: class of each case, or (cases, classes) of 0 and 1, to be spread evenly.
        folds: how many, at least 2.
        seed: another seed gives another cut.
        rows: the rows to take part, all by default; leave the test part out of them.

    Raises:
        UserError: fewer patients than folds, or names used twice.
    """
    rows = range(len(ids)) if rows is None else rows
    _check(ids, patients, labels, rows)
    if folds < 2:
        raise UserError(f"folds is {folds}; expected at least 2")
    names = [f"fold {fold}" for fold in range(folds)]
    shares = np.full(folds, 1 / folds)
    held_out = _assign(ids, patients, labels, rows, shares, seed=seed, names=names)
    return [
        (sorted(itertools.chain(*held_out[:fold], *held_out[fold + 1 :])), held_out[fold])
        for fold in range(folds)
    ]


def _check(
    ids: Sequence[str],
    patients: Sequence[str] | None,
    labels: Sequence[Any] | np.ndarray | None,
    rows: Sequence[int],
) -> None:
    if not len(ids):
        raise UserError("the data set has no cases; check data.path")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if list(ids).count(name) > 1)
        raise UserError(f"case {twice!r} is listed more than once; give every case its own name")
    for what, values in (("patients", patients), ("labels", labels)):
        if values is not None and len(values) != len(ids):
            raise UserError(f"{len(values)} {what} for {len(ids)} cases; give one a case")
    if len(set(rows)) < len(rows) or not all(0 <= row < len(ids) for row in rows):
        raise UserError(f"rows must be different numbers from 0 to {len(ids) - 1}")


def _check_given(given: Mapping[str, Sequence[int]], count: int) -> None:
    for name, rows in given.items():
        if len(set(rows)) < len(rows) or not all(0 <= row < count for row in rows):
            raise UserError(
                f"part {name!r} lists a case twice or one that does not exist; expected different "
                f"rows from 0 to {count - 1}"
            )


def _overlaps(parts: Mapping[str, Sequence[int]], patients: Sequence[str] | None) -> list[str]:
    """A note for every two parts that share cases or patients: scores would be too good."""
    notes = []
    for first, second in itertools.combinations(parts, 2):
        cases = len(set(parts[first]) & set(parts[second]))
        if cases:
            notes.append(f"{cases} cases are in {first} and {second} both, as given; scores leak")
        if patients is not None:
            shared = {patients[r] for r in parts[first]} & {patients[r] for r in parts[second]}
            shared.discard("")
            if shared:
                notes.append(
                    f"{count_of(len(shared), 'patient')} in {first} and {second} both, as given; "
                    "scores leak"
                )
    return notes


def _class_counts(labels: Sequence[Any] | np.ndarray | None, rows: Sequence[int]) -> np.ndarray:
    """(rows, 1 + classes) int64: a column of ones, that sizes are balanced too, and the classes."""
    ones = np.ones((len(rows), 1), np.int64)
    if labels is None:
        return ones
    values = np.asarray(labels)[np.asarray(rows, np.int64)]
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 1:
        classes, number = np.unique(values, return_inverse=True)
        held = np.eye(len(classes), dtype=np.int64)[number]
    else:
        held = (values > 0).astype(np.int64)
        held = held[:, held.any(axis=0)]
    return np.concatenate([ones, held], axis=1)


def _assign(
    ids: Sequence[str],
    patients: Sequence[str] | None,
    labels: Sequence[Any] | np.ndarray | None,
    rows: Sequence[int],
    shares: np.ndarray,
    *,
    seed: int,
    names: Sequence[str],
) -> list[list[int]]:
    """Put whole groups of rows into parts, so that each nears its share of every class.

    Greedy: groups that hold most of a class come first (a rare class leaves the least choice),
    equal ones in the order of a hash of seed and name. Each goes where it lowers most
    sum((count - share * total)^2 / (share * total)) over parts and classes (chi-squared).
    """
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        patient = patients[row] if patients is not None else ""
        key = f"patient {patient}" if patient else f"case {ids[row]}"
        groups.setdefault(key, []).append(place)
    if len(groups) < len(shares):
        what = "patients" if patients is not None else "cases"
        raise UserError(
            f"{len(groups)} {what} are too few for {len(shares)} parts ({', '.join(names)}); "
            "add cases, or give the parts yourself in split.csv"
        )
    counts = _class_counts(labels, rows)
    totals = counts.sum(axis=0)
    # Shares are relative to each other: train and val alone are .7 and .15 of .85.
    target = (shares / shares.sum())[:, None] * totals
    held = {key: counts[places].sum(axis=0) for key, places in groups.items()}
    weight = {key: round(float(((held[key] / totals) ** 2).sum()), 12) for key in groups}
    order = sorted(groups, key=lambda key: (-weight[key], _hash(seed, key)))
    filled = np.zeros_like(target)
    result: list[list[int]] = [[] for _ in shares]
    for number, key in enumerate(order):
        cost = ((2 * (filled - target) + held[key]) * held[key] / target).sum(axis=1)
        empty = np.array([not part for part in result])
        if empty.sum() == len(order) - number:  # every part gets at least one group
            cost = np.where(empty, cost, np.inf)
        part = int(np.argmin(np.round(cost, 9)))  # of equal ones the first, despite rounding
        filled[part] += held[key]
        result[part] += [int(rows[place]) for place in groups[key]]
    return [sorted(part) for part in result]


def _hash(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()
