import json
import tracemalloc

import numpy as np
import pytest
from scipy.stats import norm, t

from jaxmed.evaluation.bootstrap import bootstrap_weights, intervals, two_sided_p
from jaxmed.evaluation.evaluate import summarize_cases
from jaxmed.metrics import count_cases, mean_scores, weighted_sums
from jaxmed.metrics.classification import (
    expected_calibration_error,
    ranking_scores,
    summarize_classification,
)
from jaxmed.metrics.detection import summarize_detection
from jaxmed.tasks.segmentation import Segmentation


def test_first_row_is_the_set_and_every_resample_has_its_size():
    weights = bootstrap_weights(40, resamples=20, seed=0)
    assert weights.shape == (21, 40) and (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 40).all() and weights[1:].std() > 0.5
    np.testing.assert_array_equal(weights, bootstrap_weights(40, resamples=20, seed=0))
    assert (weights[1:] != bootstrap_weights(40, resamples=20, seed=1)[1:]).any()


def test_patients_are_drawn_with_all_their_cases():
    groups = ["p", "q", "p", "r", "q", "p"]
    weights = bootstrap_weights(6, groups=groups, resamples=50, seed=0)
    for name in set(groups):
        mine = weights[:, [g == name for g in groups]]
        assert (mine == mine[:, :1]).all()
    first = [groups.index(name) for name in "pqr"]
    assert (weights[:, first].sum(axis=1) == 3).all()
    with pytest.raises(ValueError, match="5 groups for 6 cases"):
        bootstrap_weights(6, groups=groups[:5], seed=0)


def test_clusters_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    rows = [{"score": v} for v in values]
    width = {}
    for key, groups in (("case", None), ("patient", np.repeat(np.arange(20), 10).tolist())):
        weights = bootstrap_weights(200, groups=groups, seed=0)
        interval = intervals(mean_scores(rows, weights=weights), cases=200)["score"]
        width[key] = interval["high"] - interval["low"]
    assert width["patient"] > 2 * width["case"]


def draw_accuracy(rng, groups):
    return (rng.random(groups) < 0.8).astype(float), 0.8


def draw_dice(rng, groups):
    """A skewed score, as Dice is."""
    return rng.beta(8, 1.5, groups), 8 / 9.5


def draw_dice_with_failures(rng, groups):
    """The same, of which one case in 25 is missed."""
    values, mean = draw_dice(rng, groups)
    values[rng.random(groups) < 0.04] = 0
    return values, 0.96 * mean


def mean_samples(values, weights):
    return weights @ values / weights.sum(axis=1)


def auroc_samples(cases, weights):
    return ranking_scores(*cases, weights)[0]


def draw_auroc(rng, groups):
    truth = rng.random(groups) < 0.4
    return (truth, rng.normal(size=groups) + 1.2 * truth), norm.cdf(1.2 / np.sqrt(2))


@pytest.mark.parametrize("groups", [30, 200])
@pytest.mark.parametrize(
    "draw, summarize",
    [(draw_accuracy, mean_samples), (draw_dice, mean_samples), (draw_auroc, auroc_samples)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(draw, summarize, groups):
    # 400 draws tell a share of .95 to within .02.
    assert 0.92 <= coverage(draw, summarize, groups) <= 0.985


def test_failures_that_a_small_set_never_saw_are_beyond_any_interval():
    """With 30 cases a third of all sets hold no such failure, as the docstring says."""
    few, many = (coverage(draw_dice_with_failures, mean_samples, n) for n in (30, 200))
    assert 0.7 < few < 0.9 <= many


def draw_calibrated(rng, groups):
    """A network that means what it says, and its calibration error."""
    said = to_probability(rng.normal(0, 2, groups))
    return (rng.random(groups) < said, said), 0


def draw_overconfident(rng, groups):
    """Logits twice too large; the error of 2 million cases."""
    logits = rng.normal(0, 2, groups)
    return (rng.random(groups) < to_probability(logits), to_probability(2 * logits)), 0.093


def to_probability(logits):
    return 1 / (1 + np.exp(-logits))


def calibration_samples(cases, weights):
    return expected_calibration_error(*cases, weights)


@pytest.mark.parametrize("groups", [30, 200])
@pytest.mark.parametrize("draw", [draw_calibrated, draw_overconfident])
def test_intervals_of_calibration_errors_cover(draw, groups):
    """The plain error is too large in small sets, twice so in resamples: those cover 0 to 40 %."""
    assert coverage(draw, calibration_samples, groups, sets=150, resamples=300) >= 0.88


def coverage(draw, summarize, groups, *, sets=400, resamples=1000):
    """How often intervals of many sets hold the truth."""
    rng = np.random.default_rng(0)
    weights = bootstrap_weights(groups, resamples=resamples, seed=0).astype(float)
    hits = []
    for _ in range(sets):
        cases, truth = draw(rng, groups)
        interval = intervals({"x": summarize(cases, weights)}, cases=groups)["x"]
        if interval["low"] is not None:  # where all resamples agree nothing is claimed
            hits.append(interval["low"] <= truth <= interval["high"])
    assert len(hits) > 0.97 * sets
    return np.mean(hits)


@pytest.mark.parametrize("groups", [30, 200])
def test_intervals_of_clustered_cases_cover_where_patients_are_drawn(groups):
    rng = np.random.default_rng(0)
    each, hits = 5, {"patients": [], "cases": []}
    names = np.repeat(np.arange(groups), each).tolist()
    weights = {
        "patients": bootstrap_weights(groups * each, groups=names, resamples=1000, seed=0),
        "cases": bootstrap_weights(groups * each, resamples=1000, seed=0),
    }
    weights = {key: drawn.astype(float) for key, drawn in weights.items()}
    for _ in range(300):
        values = 0.8 + np.repeat(rng.normal(0, 0.08, groups), each)
        values += rng.normal(0, 0.05, groups * each)
        for key, drawn in weights.items():
            count = groups if key == "patients" else groups * each
            found = intervals({"x": mean_samples(values, drawn)}, cases=len(values), groups=count)
            hits[key].append(found["x"]["low"] <= 0.8 <= found["x"]["high"])
    assert 0.92 <= np.mean(hits["patients"]) <= 0.985
    assert np.mean(hits["cases"]) < 0.8  # what drawing patients is for


def test_more_groups_bring_the_interval_to_the_plain_percentiles():
    samples = np.random.default_rng(0).normal(size=4001)
    plain = np.quantile(samples[1:], [0.025, 0.975])
    width = []
    for groups in (5, 30, 10**6):
        entry = intervals({"x": samples}, cases=10, groups=groups)["x"]
        width.append(entry["high"] - entry["low"])
    assert width[0] > width[1] > width[2]
    assert width[2] == pytest.approx(np.ptp(plain), rel=1e-3)
    # Of normal samples with deviation 1 that is Student's t, and the n - 1 that resamples miss.
    assert width[1] == pytest.approx(2 * t.isf(0.025, 29) * np.sqrt(30 / 29), rel=0.05)


def test_resamples_that_all_agree_give_no_interval():
    weights = bootstrap_weights(30, resamples=100, seed=0)
    entry = intervals(mean_scores([{"x": 1.0}] * 30, weights=weights), cases=30)["x"]
    assert entry == {"value": 1.0, "low": None, "high": None, "n": 30, "no_spread": True}
    lonely = bootstrap_weights(3, groups="ppp", resamples=100, seed=0)
    rows = [{"x": 0.1}, {"x": 0.5}, {"x": 0.7}]
    entry = intervals(mean_scores(rows, weights=lonely), cases=3, groups=1)["x"]
    assert entry["low"] is None and entry["no_spread"]


def test_p_is_below_a_twentieth_where_the_interval_leaves_zero_out():
    rng = np.random.default_rng(0)
    for shift in np.linspace(-3.5, 3.5, 61):
        samples = rng.normal(shift, 1, 4001)
        samples[0] = shift
        entry = intervals({"x": samples}, cases=30)["x"]
        outside = not entry["low"] <= 0 <= entry["high"]
        p = two_sided_p(samples, groups=30)
        assert outside == (p < 0.05) or abs(p - 0.05) < 0.004
    assert two_sided_p(np.zeros(100), groups=30) == 1
    assert 2 / 1000 <= two_sided_p(np.full(1000, 0.3), groups=30) < 0.01
    assert two_sided_p(np.full(100, np.nan), groups=30) is None


@pytest.mark.parametrize("groups", [30, 200])
def test_equal_systems_are_told_apart_as_rarely_as_the_test_says(groups):
    rng = np.random.default_rng(1)
    weights = bootstrap_weights(groups, resamples=1000, seed=0).astype(float)
    found = []
    for _ in range(400):
        hard = rng.beta(8, 2, groups)
        a, b = (np.clip(hard + rng.normal(0, 0.05, groups), 0, 1) for _ in range(2))
        found.append(two_sided_p(mean_samples(a - b, weights), groups=groups) < 0.05)
    assert 0.02 <= np.mean(found) <= 0.08


def test_ten_thousand_resamples_stay_small():
    """Weights are single bytes; arrays of resamples by cases or detections are never held whole."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "score": rng.random(30),
            "label": np.zeros(30, int),
            "matched": rng.random((10, 30)) < 0.3,
            "truths": np.array([12]),
        }
        for _ in range(200)
    ]
    tracemalloc.start()
    weights = bootstrap_weights(200, resamples=10_000, seed=0)
    summarize_detection(rows, weights=weights, class_names=["a"])
    _, most = tracemalloc.get_traced_memory()
    assert most < 200e6  # 10,000 x 6,000 numbers would be 480 MB
    tracemalloc.reset_peak()
    groups = np.repeat(np.arange(750), 2).tolist()
    weights = bootstrap_weights(1500, groups=groups, resamples=10_000, seed=0)
    means = mean_scores([{"x": x} for x in rng.random(1500)], weights=weights)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert means["x"].std() > 0
    assert most < 110e6  # 15 MB of bytes; 10,000 x 1,500 float64 would be 120 MB


def test_counts_are_those_of_a_multinomial_draw():
    weights = bootstrap_weights(50, resamples=4000, seed=0)[1:].astype(float)
    # Each of 50 cases is drawn a binomial number of times: 50 draws at 1/50.
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(0.98, abs=0.01)
    assert (weights == 0).mean() == pytest.approx(0.98**50, abs=0.005)
    assert np.corrcoef(weights[:, 0], weights[:, 1])[0, 1] == pytest.approx(-1 / 49, abs=0.05)


def test_sums_over_cases_do_not_overflow():
    weights = bootstrap_weights(700, resamples=20, seed=0)
    flags = np.arange(700) % 2 == 0
    wide = weights.astype(float)
    np.testing.assert_array_equal(weighted_sums(weights, flags), wide @ flags)
    means = mean_scores([{"x": float(flag)} for flag in flags], weights=weights)["x"]
    np.testing.assert_allclose(means, wide @ flags / 700)
    labels, p = flags.astype(int), np.full((700, 2), 0.5)
    scores = [
        summarize_classification(labels, p, weights=w, class_names="ab") for w in (weights, wide)
    ]
    for name, values in scores[0].items():
        np.testing.assert_allclose(values, scores[1][name])


def test_intervals_of_a_rare_structure_are_of_the_cases_that_have_it():
    rng = np.random.default_rng(0)
    task, truth, hits = Segmentation(["background", "x"]), 8 / 9.5, []
    for _ in range(150):
        found = [{"dice/x": v} for v in rng.beta(8, 1.5, 5)]
        rows = dict(enumerate(found + [{"dice/x": np.nan}] * 45))
        entry = summarize_cases(task, rows, resamples=300)["dice/x"]
        hits.append(entry["low"] <= truth <= entry["high"])
    assert np.mean(hits) >= 0.92
    few = summarize_cases(task, dict(enumerate(found)), resamples=4000)["dice/x"]
    many = summarize_cases(task, rows, resamples=4000)["dice/x"]
    assert many["n"] == 5
    assert many["high"] - many["low"] > 0.9 * (few["high"] - few["low"])
    # Of one patient nothing can be told, however many there are without the structure.
    patients = ["p"] * 5 + [f"q{i}" for i in range(45)]
    assert summarize_cases(task, rows, patients=patients, resamples=50)["dice/x"]["no_spread"]


def test_undefined_is_none_counted_and_valid_json():
    nan = float("nan")
    rows = [{"a": 1.0, "b": nan}, {"a": nan, "b": nan}, {"a": 3.0, "b": nan}]
    weights = bootstrap_weights(3, resamples=200, seed=0)
    samples = mean_scores(rows, weights=weights)
    table = intervals(samples, cases=3, counts=count_cases(rows))
    assert table["b"] == {"value": None, "low": None, "high": None, "n": 0, "undefined": 200}
    assert table["a"]["value"] == 2 and table["a"]["n"] == 2
    # Only the resamples of case 1 alone, one in 27, have no value.
    assert 0 < table["a"]["undefined"] < 30
    json.dumps(table, allow_nan=False)
    plain = intervals({"c": np.array([0.5, 0.4, 0.6])}, cases=9)["c"]
    assert plain["n"] == 9 and set(plain) == {"value", "low", "high", "n"}
