import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmed.data.splits import k_folds, split_cases
from jaxmed.types import UserError

cases = st.integers(6, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, n // 2), min_size=n, max_size=n).filter(lambda p: len(set(p)) > 4),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
        st.permutations(range(n)),
        st.integers(0, 1000),
    )
)


def names(numbers):
    return [f"p{number}" for number in numbers]


@settings(max_examples=60, deadline=None)
@given(cases)
def test_parts_hold_every_case_once_and_patients_whole(case):
    patients, labels, _, seed = case
    ids = [f"c{i}" for i in range(len(patients))]
    parts, notes = split_cases(ids, patients=names(patients), labels=labels, parts={}, seed=seed)
    assert list(parts) == ["train", "val", "test"] and not notes
    assert sorted(sum(parts.values(), [])) == list(range(len(ids)))
    assert all(rows and rows == sorted(rows) for rows in parts.values())
    groups = [{patients[row] for row in rows} for rows in parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@settings(max_examples=40, deadline=None)
@given(cases)
def test_order_of_cases_does_not_matter(case):
    patients, labels, order, seed = case
    ids = [f"c{i}" for i in range(len(patients))]
    parts, _ = split_cases(ids, patients=names(patients), labels=labels, parts={}, seed=seed)
    shuffled, _ = split_cases(
        [ids[i] for i in order],
        patients=names(patients[i] for i in order),
        labels=[labels[i] for i in order],
        parts={},
        seed=seed,
    )
    for name in parts:
        assert {ids[row] for row in parts[name]} == {ids[order[row]] for row in shuffled[name]}


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(2, 5))
def test_folds_hold_every_case_once_and_patients_whole(case, folds):
    patients, labels, _, seed = case
    ids = [f"c{i}" for i in range(len(patients))]
    found = k_folds(ids, patients=names(patients), labels=labels, folds=folds, seed=seed)
    assert sorted(sum((val for _, val in found), [])) == list(range(len(ids)))
    for train, val in found:
        assert val and sorted(train + val) == list(range(len(ids)))
        assert not {patients[row] for row in train} & {patients[row] for row in val}


@pytest.mark.parametrize("seed", range(5))
def test_classes_and_sizes_are_spread_evenly(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, 200, p=[0.7, 0.25, 0.05])
    ids = [f"c{i}" for i in range(200)]
    parts, _ = split_cases(ids, labels=labels, parts={}, seed=seed)
    for name, share in zip(("train", "val", "test"), (0.7, 0.15, 0.15), strict=True):
        assert abs(len(parts[name]) - share * 200) <= 2
        for value in range(3):
            total = (labels == value).sum()
            assert abs((labels[parts[name]] == value).sum() - share * total) <= 1.5
    for _, val in k_folds(ids, labels=labels, folds=5, seed=seed):
        assert len(val) == 40 and abs((labels[val] == 0).sum() - (labels == 0).sum() / 5) <= 1.5


def test_many_labels_at_once_are_spread():
    labels = (np.random.default_rng(0).random((300, 4)) < [0.5, 0.2, 0.1, 0.03]).astype(int)
    parts, _ = split_cases([f"c{i}" for i in range(300)], labels=labels, parts={}, seed=0)
    for rows, share in zip(parts.values(), (0.7, 0.15, 0.15), strict=True):
        assert np.abs(labels[rows].sum(0) - share * labels.sum(0)).max() <= 4


def test_seed_changes_the_cut_and_nothing_else_does():
    ids = [f"c{i}" for i in range(50)]
    first, _ = split_cases(ids, parts={}, seed=1)
    assert first == split_cases(ids, parts={}, seed=1)[0]
    assert first != split_cases(ids, parts={}, seed=2)[0]


def test_given_parts_stay_and_val_is_cut_from_train():
    ids = [f"c{i}" for i in range(40)]
    given = {"train": range(0, 34), "test": range(34, 40)}
    parts, notes = split_cases(ids, parts=given, seed=0)
    assert parts["test"] == list(range(34, 40)) and not notes
    assert sorted(parts["train"] + parts["val"]) == list(range(34))
    assert len(parts["val"]) == 6  # .15 of .85 of 34
    both = {"train": [0, 1, 2], "val": [3, 4]}
    parts, notes = split_cases(ids[:5], parts=both, seed=0)
    assert parts == both and not notes


def test_only_test_given_takes_the_rest_for_train():
    parts, notes = split_cases([f"c{i}" for i in range(20)], parts={"test": [0, 1]}, seed=0)
    assert parts["test"] == [0, 1] and sorted(parts["train"] + parts["val"]) == list(range(2, 20))
    assert "18 cases" in notes[0]


def test_patients_of_a_given_part_do_not_get_into_train():
    ids, patients = [f"c{i}" for i in range(10)], ["A"] * 5 + list("BCDEF")
    split, notes = split_cases(ids, patients=patients, parts={"test": [0, 1]}, seed=0)
    assert split["test"] == [0, 1]
    assert not {2, 3, 4} & {row for part in ("train", "val") for row in split[part]}
    assert "3 cases of patients that are in a given part are left out of train" in notes
    with pytest.raises(UserError, match="no case is left to train on"):
        split_cases(ids[:5], patients=patients[:5], parts={"test": [0, 1]}, seed=0)


def test_only_test_given_that_claims_all_is_left_alone():
    assert split_cases(["a", "b"], parts={"test": [0, 1]}, seed=0) == ({"test": [0, 1]}, [])


def test_leaks_between_given_parts_are_told_not_repaired():
    given = {"train": [0, 1], "val": [2], "test": [3]}
    parts, notes = split_cases(
        list("abcd"), patients=["Ann", "Bob", "Ann", ""], parts=given, seed=0
    )
    assert parts == given
    assert notes == ["1 patient in train and val both, as given; scores leak"]
    given = {"train": [0, 1, 2], "val": [2], "test": [3]}
    parts, notes = split_cases(list("abcd"), parts=given, seed=0)
    assert parts == given and "1 cases are in train and val" in notes[0]


def test_a_case_in_no_given_part_is_left_out_and_told():
    parts, notes = split_cases(list("abc"), parts={"train": [0], "val": [1]}, seed=0)
    assert parts == {"train": [0], "val": [1]} and "1 cases" in notes[0]


def test_folds_of_some_rows_leave_the_others_out():
    found = k_folds([f"c{i}" for i in range(20)], folds=3, seed=0, rows=range(5, 20))
    assert sorted(sum((val for _, val in found), [])) == list(range(5, 20))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": list("ab"), "parts": {}}, "too few"),
        ({"ids": list("abcd"), "patients": list("xxyy"), "parts": {}}, "2 patients are too few"),
        ({"ids": list("aab"), "parts": {}}, "more than once"),
        ({"ids": [], "parts": {}}, "no cases"),
        ({"ids": list("abc"), "parts": {"train": [0, 7]}}, "does not exist"),
        ({"ids": list("abc"), "patients": ["x"], "parts": {}}, "1 patients for 3 cases"),
        ({"ids": list("abc"), "parts": {}, "fractions": (0.5, 0.6, 0.1)}, "sum to 1"),
    ],
)
def test_mistakes_are_told(arguments, words):
    with pytest.raises(UserError, match=words):
        split_cases(**arguments, seed=0)


def test_too_many_folds():
    with pytest.raises(UserError, match="too few"):
        k_folds(list("abc"), folds=4, seed=0)
