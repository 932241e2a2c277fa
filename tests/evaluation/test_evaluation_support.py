import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxmed.evaluation.calibration_curves import draw_risk
from jaxmed.evaluation.curves import GRID, draw_curves, roc_band
from jaxmed.evaluation.evaluate import summarize_cases
from jaxmed.evaluation.size_agreement import limits_of_agreement
from jaxmed.evaluation.subgroups import summarize_subgroups
from jaxmed.evaluation.support import find_limits, summarize_prevalence
from jaxmed.tasks.classification import Classification
from jaxmed.tasks.segmentation import Segmentation
from jaxmed.types import DatasetInfo, UserError


def info_of(task, names=("a", "b"), ndim=2, **more):
    return DatasetInfo(name="set", task=task, ndim=ndim, channels=1, class_names=names, **more)


def classified(labels, right, seed=0):
    """Rows of a binary classification whose decisions are right or wrong as told."""
    rng = np.random.default_rng(seed)
    rows = {}
    for place, (label, hit) in enumerate(zip(labels, right, strict=True)):
        p = np.float32(rng.uniform(0.55, 0.99))
        last = p if (label == 1) == bool(hit) else 1 - p
        rows[place] = {"label": np.int32(label), "probabilities": np.array([1 - last, last], "f4")}
    return rows


def test_prevalence_and_the_rate_of_saying_always_the_same():
    rows = list(classified([0] * 30 + [1] * 10, [1] * 40).values())
    told = summarize_prevalence(info_of("classification"), rows)
    assert told == {"prevalence": {"a": 0.75, "b": 0.25}, "no_information_rate": 0.75}
    many = [{"label": np.array(label), "probabilities": None} for label in ([1, 0], [1, 1], [0, 0])]
    told = summarize_prevalence(info_of("classification", multilabel=True), many)
    assert told["no_information_rate"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert summarize_prevalence(info_of("detection"), []) == {}


def limits_of(labels, right):
    info, rows = info_of("classification"), classified(labels, right)
    metrics = summarize_cases(Classification(info.class_names), rows)
    rate = summarize_prevalence(info, list(rows.values()))["no_information_rate"]
    options = {"groups": len(rows), "no_information_rate": rate}
    return " ".join(find_limits(info, list(rows.values()), metrics, **options))


def test_what_a_small_set_cannot_tell_is_said():
    told = limits_of([0] * 8 + [1] * 7, [1, 0] * 7 + [1])
    assert "of 15 cases" in told and "a (8), b (7)" in told and "wider than 0.2" in told
    told = limits_of([0] * 180 + [1] * 20, [1] * 175 + [0] * 5 + [0] * 10 + [1] * 10)
    assert "always saying the commonest class" in told and "fewer" not in told
    told = limits_of([0, 1] * 30, [1] * 60)
    assert "rule of three" in told and "5.0%" in told and "commonest" not in told
    assert limits_of([0, 1] * 200, [place % 9 > 0 for place in range(400)]) == ""


def test_objects_and_structures_count_as_positives():
    row = {"truths": np.array([12, 3]), "score": np.zeros(0)}
    told = find_limits(info_of("detection"), [row], {}, groups=50)
    assert told == ["fewer than 10 objects of b (3): too few for a score of that class"]
    rows = [{"true_size/b": 5.0 * (i < 4)} for i in range(50)]
    told = find_limits(info_of("segmentation"), rows, {}, groups=50)
    assert "cases of b (4)" in told[0]


def test_a_distance_is_no_share_however_short():
    entry = {"value": 0.5, "low": 0.3, "high": 0.9, "n": 50}
    rows = [{"true_size/b": 5.0}] * 50
    found = {"hd95": entry, "dice": entry}
    told = find_limits(info_of("segmentation"), rows, found, groups=50)
    assert told == ["intervals wider than 0.2 of dice: too few cases to tell"]


def test_subgroups_have_the_scores_of_their_cases_alone():
    rng = np.random.default_rng(0)
    labels, right = rng.integers(0, 2, 120), rng.random(120) < 0.8
    rows, task = classified(labels, right), Classification(("a", "b"))
    values = {row: ("x" if row % 3 else "y") if row > 4 else "" for row in rows}
    found = summarize_subgroups(task, rows, values, column="scanner", resamples=300)
    assert found["reference"] == "x" and list(found["groups"]) == ["(unknown)", "x", "y"]
    for name, group in found["groups"].items():
        own = {r: s for r, s in rows.items() if (values[r] or "(unknown)") == name}
        alone = summarize_cases(task, own)
        assert group["n"] == len(own) and group["few"] == (name == "(unknown)")
        for score, entry in group["metrics"].items():
            assert entry["value"] == alone[score]["value"] and "/" not in score
    difference = found["groups"]["y"]["differences"]["accuracy"]
    x, y = (found["groups"][name]["metrics"]["accuracy"]["value"] for name in "xy")
    assert difference["value"] == pytest.approx(y - x)
    assert difference["low"] < difference["value"] < difference["high"]
    assert "differences" not in found["groups"]["x"]


def test_a_difference_between_subgroups_is_found_and_none_is_not():
    labels = [0, 1] * 100
    values = {row: "old" if row < 100 else "new" for row in range(200)}
    task = Classification(("a", "b"))
    worse = classified(labels, ([1] * 100 + [1, 1, 0, 0] * 25))
    found = summarize_subgroups(task, worse, values, column="age", resamples=300)
    other = "new" if found["reference"] == "old" else "old"
    entry = found["groups"][other]["differences"]["accuracy"]
    assert entry["high"] < 0 or entry["low"] > 0
    same = classified(labels, [1, 1, 1, 0] * 50)
    found = summarize_subgroups(task, same, values, column="age", resamples=300)
    other = "new" if found["reference"] == "old" else "old"
    entry = found["groups"][other]["differences"]["accuracy"]
    assert entry["low"] <= 0 <= entry["high"]


def test_a_column_of_names_is_refused():
    rows = classified([0, 1] * 20, [1] * 40)
    with pytest.raises(UserError, match="--subgroups=date: has 40 different values"):
        summarize_subgroups(
            Classification(("a", "b")), rows, {r: str(r) for r in rows}, column="date"
        )


def test_sizes_are_in_millimetres_and_are_no_scores():
    truth, prediction = np.zeros((2, 8, 8, 4), np.int32)
    truth[:4], prediction[:2] = 1, 1
    truth[0, 0, 0] = -1
    spacing = np.array([0.5, 2.0, 3.0], np.float32)
    task = Segmentation(("background", "a"))
    row = task.score(prediction, {"mask": truth, "spacing": spacing})
    assert row["true_size/a"] == 3 * (4 * 32 - 1) and row["size/a"] == 3 * (2 * 32 - 1)
    assert not any("size" in name for name in task.summarize([row], weights=np.ones((1, 1))))


def test_limits_of_agreement_by_hand():
    bias, low, high = limits_of_agreement(np.array([-1.0, 0.0, 4.0]))
    assert bias == 1 and high - bias == pytest.approx(1.96 * np.sqrt(7))
    assert bias - low == pytest.approx(high - bias)


def test_band_holds_the_curve_and_narrows_with_cases():
    rng = np.random.default_rng(0)
    width = []
    for count in (40, 1000):
        truth = rng.random(count) < 0.5
        low, high = roc_band(truth, rng.normal(size=count) + 1.2 * truth, resamples=200)
        assert (low <= high).all() and high[-1] == 1 and (np.diff(low) >= 0).all()
        width.append((high - low)[10:60].mean())
        # That of two normal distributions, whose curve is known.
    from scipy.stats import norm

    curve = norm.cdf(norm.ppf(GRID) + 1.2)
    assert ((low <= curve + 0.02) & (curve - 0.02 <= high)).mean() > 0.9
    assert width[1] < 0.4 * width[0]


def test_bands_are_wider_where_patients_have_several_cases():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(10), 12)
    truth = rng.random(120) < 0.5
    score = rng.normal(size=120) + 1.2 * truth + 2 * truth * rng.normal(size=10)[patients]
    width = []
    for groups in (None, patients.tolist()):
        low, high = roc_band(truth, score, groups=groups, resamples=200)
        width.append((high - low)[10:60].mean())
    assert width[1] > 1.5 * width[0]
    spans = []
    for groups in (None, patients.tolist()):
        axis = Figure().subplots()
        draw_risk(axis, score, np.repeat(rng.random(10), 12), name="loss", groups=groups)
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        spans.append(np.ptp(band[-60:]))
        Figure.clear(axis.figure)
    assert spans[1] > spans[0]


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_names_of_classes_are_no_formulas(tmp_path, task):
    names = ("$a^$", "US$ b $_{$", "c")
    info = info_of(task, names)
    rng = np.random.default_rng(0)
    row = {
        "classification": lambda i: {"label": i % 3, "probabilities": rng.dirichlet([1, 1, 1])},
        "detection": lambda i: {
            "score": rng.random(3),
            "label": np.arange(3),
            "matched": rng.random((10, 3)) < 0.5,
            "truths": np.ones(3, int),
        },
        "segmentation": lambda i: {
            "dice": 0.5,
            f"dice/{names[1]}": rng.random(),
            f"size/{names[1]}": 5 + rng.random(),
            f"true_size/{names[1]}": 5.0,
        },
    }[task]
    for patients in (None, ["p"] * 12, [f"p{i // 3}" for i in range(12)]):
        found = draw_curves(info, {i: row(i) for i in range(12)}, tmp_path, patients=patients)
        assert all(figure["picture"].is_file() for figure in found)


@pytest.mark.parametrize("ndim", [2, 3])
def test_sizes_are_drawn_where_a_class_is_there(tmp_path, ndim):
    rng = np.random.default_rng(0)
    info = info_of("segmentation", ("background", "$a", "b"), ndim=ndim)
    scores = {
        i: {"dice": 0.5, "dice/$a": 0.5, "dice/b": float("nan"), "size/$a": 2e5 * rng.random()}
        | {"true_size/$a": 2e5, "size/b": 0.0, "true_size/b": 0.0}
        for i in range(5)
    }
    names = [figure["picture"].name for figure in draw_curves(info, scores, tmp_path)]
    assert names == ["curves.png", "sizes.png"]
    few = {i: scores[i] for i in range(2)}
    assert len(draw_curves(info, few, tmp_path)) == 1
