import dataclasses

import numpy as np
import pytest

from jaxmed.evaluation.bootstrap import holm
from jaxmed.evaluation.case_rows import (
    ScoredCases,
    load_rows,
    make_scorer,
    number_groups,
    save_rows,
    scored_cases,
    scoring_of,
)
from jaxmed.evaluation.comparison import compare_runs
from jaxmed.evaluation.evaluate import summarize_cases
from jaxmed.metrics.detection import match_detections
from jaxmed.types import DatasetInfo, UserError


def info_of(task, names=("background", "a"), **more):
    return DatasetInfo(name="", task=task, ndim=2, channels=1, class_names=names, **more)


def scored(rows, *, ids=None, groups=None, folds=None):
    ids = ids or [f"case {i}" for i in range(len(rows))]
    count = len(rows)
    groups, folds = groups or tuple(range(count)), folds or (-1,) * count
    return ScoredCases(tuple(ids), tuple(rows), tuple(groups), tuple(folds))


def dice_rows(values):
    names = ("dice", "dice/a", "size/a", "true_size/a")
    return [dict(zip(names, (v, v, 9.0, 10.0), strict=True)) for v in values.tolist()]


def rows_of(task, count=12, seed=0):
    rng = np.random.default_rng(seed)
    if task == "segmentation":
        return dice_rows(rng.random(count))
    if task == "classification":
        return [
            {"label": np.int32(i % 2), "probabilities": rng.dirichlet([1, 1]).astype("f4")}
            for i in range(count)
        ]
    rows = []
    for i in range(count):
        low = rng.uniform(0, 50, (i % 4, 2))
        boxes = np.concatenate([low, low + 20], axis=1)
        labels = rng.integers(0, 2, i % 4)
        rows.append(
            match_detections(boxes + 2, rng.random(i % 4), labels, boxes, labels, classes=2)
        )
    return rows


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_scored_cases_come_back_from_disk_as_they_were(tmp_path, task):
    cases = scored(rows_of(task), groups=(0, 0, *range(1, 11)), folds=(0, 1) * 6)
    save_rows(tmp_path / "rows.npz", cases)
    back = load_rows(tmp_path / "rows.npz")
    for field in ("ids", "groups", "folds"):
        assert getattr(back, field) == getattr(cases, field)
    for row, other in zip(cases.rows, back.rows, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_array_equal(row[name], other[name])
            assert np.shape(row[name]) == np.shape(other[name])
    scorer = make_scorer(info_of(task))
    a, b = (summarize_cases(scorer, c.by_place, folds=c.fold_places) for c in (cases, back))
    assert a == b


def test_a_file_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match="evaluate again"):
        load_rows(tmp_path / "rows.npz")
    (tmp_path / "rows.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        load_rows(tmp_path / "rows.npz")


def test_names_of_patients_stay_out():
    assert number_groups(["Mr X", "Ms Y", "Mr X"], 3) == (0, 1, 0)
    rows = {4: {"dice": 0.5}, 2: {"dice": 0.6}}
    cases = scored_cases("abcde", rows, patients=list("vwxyz"), folds={2: 1})
    assert cases.ids == ("e", "c") and cases.groups == (0, 1) and cases.folds == (-1, 1)
    assert "x" not in repr(cases)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_run_beside_itself(task):
    cases = scored(rows_of(task, 24))
    found = compare_runs({"a": cases, "b": cases}, make_scorer(info_of(task)), resamples=200)
    own = found["runs"]["b"]
    assert (own["win"], own["tie"], own["lose"]) == (0, 24, 0)
    for entry in own["differences"].values():
        assert entry["value"] in (0, None) and entry["p"] in (1, None)


def test_pairing_finds_a_small_difference_that_hard_cases_hide():
    rng = np.random.default_rng(0)
    hard = rng.beta(4, 2, 60)
    better = np.clip(hard + 0.03 + rng.normal(0, 0.02, 60), 0, 1)
    runs = {"old": scored(dice_rows(hard)), "new": scored(dice_rows(better))}
    found = compare_runs(runs, make_scorer(info_of("segmentation")), resamples=2000)
    old, new = found["runs"]["old"], found["runs"]["new"]
    assert new["metrics"]["dice"]["low"] < old["metrics"]["dice"]["high"]  # unpaired: who knows
    difference = new["differences"]["dice"]
    assert difference["low"] > 0 and difference["p"] < 0.01
    assert difference["value"] == pytest.approx((better - hard).mean())
    assert new["win"] == (better > hard).sum() and new["lose"] == (better < hard).sum()
    assert "differences" not in old and found["against"] == "old"
    assert (
        compare_runs(runs, make_scorer(info_of("segmentation")), against="best", resamples=100)[
            "against"
        ]
        == "new"
    )


def test_only_shared_cases_count_in_whatever_order():
    values = np.random.default_rng(0).random(30)
    ids = [f"case {i}" for i in range(30)]
    order = np.random.default_rng(1).permutation(30)[:20]
    runs = {
        "all": scored(dice_rows(values), ids=ids),
        "some": scored(dice_rows(values[order]), ids=[ids[i] for i in order]),
    }
    found = compare_runs(runs, make_scorer(info_of("segmentation")), resamples=100)
    assert found["cases"] == 20
    assert found["runs"]["some"]["differences"]["dice"]["value"] == pytest.approx(0, abs=1e-12)
    apart = {**runs, "other": scored(dice_rows(values), ids=[f"other {i}" for i in range(30)])}
    with pytest.raises(UserError, match="share 0 cases"):
        compare_runs(apart, make_scorer(info_of("segmentation")))


def test_another_truth_is_refused():
    rows = rows_of("segmentation", 10)
    changed = [{**row, "true_size/a": 20.0} if i == 3 else row for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="another truth for case case 3"):
        compare_runs(
            {"a": scored(rows), "b": scored(changed)}, make_scorer(info_of("segmentation"))
        )
    rows = rows_of("classification", 10)
    changed = [{**row, "label": 1 - row["label"]} for row in rows]
    with pytest.raises(UserError, match="another truth"):
        compare_runs(
            {"a": scored(rows), "b": scored(changed)}, make_scorer(info_of("classification"))
        )


def test_patients_are_drawn_and_widen_the_difference():
    rng = np.random.default_rng(0)
    effect = np.repeat(rng.normal(0.02, 0.05, 12), 6)
    base = rng.uniform(0.4, 0.6, 72)
    groups = np.repeat(np.arange(12), 6).tolist()
    width = {}
    for key, own in (("cases", None), ("patients", groups)):
        runs = {
            "a": scored(dice_rows(base), groups=own),
            "b": scored(dice_rows(base + effect), groups=own),
        }
        found = compare_runs(runs, make_scorer(info_of("segmentation")), resamples=1000)
        entry = found["runs"]["b"]["differences"]["dice"]
        width[key] = entry["high"] - entry["low"]
    assert found["groups"] == 12 and width["patients"] > 1.7 * width["cases"]


def test_correction_is_holms():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, None, 0.9]) == [0.4, None, 0.9]
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_correction_is_over_the_runs_of_a_score():
    rng = np.random.default_rng(0)
    base = rng.random(40) * 0.5
    runs = {
        name: scored(dice_rows(base + rng.normal(shift, 0.05, 40)))
        for name, shift in (("a", 0), ("b", 0.02), ("c", 0.03))
    }
    found = compare_runs(runs, make_scorer(info_of("segmentation")), resamples=500)["runs"]
    for score in ("dice", "dice/a"):
        entries = [found[name]["differences"][score] for name in "bc"]
        assert [e["p_holm"] for e in entries] == holm([e["p"] for e in entries])


def test_folds_are_summarised_one_by_one():
    rows = rows_of("classification", 40)
    folds = tuple(i % 4 // 2 for i in range(40))
    cases = scored(rows, folds=folds)
    scorer = make_scorer(info_of("classification"))
    found = compare_runs({"a": cases, "b": cases}, scorer, resamples=50)["runs"]["a"]["metrics"]
    each = [
        summarize_cases(scorer, {i: rows[i] for i in range(40) if folds[i] == n})["auroc"]["value"]
        for n in (0, 1)
    ]
    assert found["auroc"]["value"] == pytest.approx(np.mean(each))
    bare = dataclasses.replace(cases, folds=(-1,) * 40)
    alone = compare_runs({"a": bare, "b": bare}, scorer, resamples=50)["runs"]["a"]["metrics"]
    assert alone["auroc"]["value"] != found["auroc"]["value"]


def test_runs_are_summarised_in_one_way():
    rows = rows_of("classification", 40)
    apart = scored(rows, folds=tuple(i % 4 // 2 for i in range(40)))
    whole, scorer = scored(rows), make_scorer(info_of("classification"))
    found = compare_runs({"folds": apart, "whole": whole}, scorer, resamples=50)
    for name in ("folds", "whole"):
        scores = found["runs"][name]["metrics"]
        assert {"accuracy", "brier", "recall", "ece"} <= scores.keys()
        assert not [s for s in scores if s.startswith(("auroc", "average_precision", "aurc"))]
    # The very same predictions, so that there is no difference.
    for entry in found["runs"]["whole"]["differences"].values():
        assert entry["value"] == 0 and entry["p"] == 1
    assert "same folds" in found["notes"][0]
    with pytest.raises(UserError, match="best needs auroc"):
        compare_runs({"folds": apart, "whole": whole}, scorer, against="best", resamples=50)
    # Folds by other numbers are the same ones.
    other = scored(rows, folds=tuple(5 - i % 4 // 2 for i in range(40)))
    found = compare_runs({"a": apart, "b": other}, scorer, resamples=50)
    assert found["notes"] == [] and found["runs"]["b"]["differences"]["auroc"]["value"] == 0
    boxes = rows_of("detection", 20)
    pair = {"a": scored(boxes, folds=(0, 1) * 10), "b": scored(boxes)}
    with pytest.raises(UserError, match="no score is left"):
        compare_runs(pair, make_scorer(info_of("detection")), resamples=50)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_patients_are_those_of_the_runs_that_know_them(order):
    rows, patients = dice_rows(np.random.default_rng(0).random(24)), [i // 4 for i in range(24)]
    scorer = make_scorer(info_of("segmentation"))
    runs = {"a": scored(rows), "b": scored(rows, groups=patients)}
    found = compare_runs({name: runs[name] for name in order}, scorer, resamples=50)
    assert found["groups"] == 6
    renamed = scored(rows, groups=[9 - p for p in patients])
    found = compare_runs({**runs, "c": renamed}, scorer, resamples=50)
    assert found["groups"] == 6
    for wrong in ([i // 8 for i in range(24)], [i // 2 for i in range(24)]):
        with pytest.raises(UserError, match="b and c do not agree on whether case"):
            compare_runs({**runs, "c": scored(rows, groups=wrong)}, scorer, resamples=50)


def test_boxes_won_are_those_from_each_runs_own_threshold():
    def row(score, hit):
        return {
            "score": np.array([score]),
            "label": np.array([0]),
            "matched": np.full((10, 1), hit),
            "truths": np.array([1, 0]),
        }

    info = info_of("detection")
    runs = {"misses": scored([row(0.5, False)] * 10), "hits": scored([row(0.2, True)] * 10)}
    scorers = {"misses": make_scorer(info), "hits": make_scorer(info, score_threshold=0.1)}
    plain = compare_runs(runs, make_scorer(info), resamples=50)["runs"]["hits"]
    assert (plain["win"], plain["tie"]) == (0, 10)
    own = compare_runs(runs, make_scorer(info), scorers=scorers, resamples=50)["runs"]["hits"]
    assert (own["win"], own["tie"]) == (10, 0)
    assert scoring_of(scorers["hits"]) == {"score_threshold": 0.1}


def test_a_rare_structure_is_compared_by_the_cases_that_have_it():
    rng = np.random.default_rng(0)
    few = rng.random((2, 5))
    pairs = [
        {
            name: scored(dice_rows(np.concatenate([v, np.full(extra, np.nan)])))
            for name, v in zip("ab", few, strict=True)
        }
        for extra in (0, 55)
    ]
    small, large = (
        compare_runs(pair, make_scorer(info_of("segmentation")), resamples=4000)["runs"]["b"]
        for pair in pairs
    )
    width = [e["high"] - e["low"] for e in (r["differences"]["dice"] for r in (small, large))]
    assert width[1] > 0.85 * width[0]
