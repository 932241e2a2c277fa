import json

import numpy as np
import pytest

from jaxmed.evaluation.bootstrap import bootstrap_weights, intervals
from jaxmed.metrics import count_cases, mean_scores


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


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    weights = bootstrap_weights(60, resamples=400, seed=0)
    hits = 0
    for _ in range(300):
        values = rng.exponential(size=60)
        samples = weights.astype(float) @ values / weights.sum(axis=1)
        interval = intervals({"x": samples}, cases=60)["x"]
        assert interval["low"] <= interval["value"] <= interval["high"]
        hits += interval["low"] <= 1 <= interval["high"]
    assert 0.89 < hits / 300 < 0.98


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
