"""Calibration, sets, thresholds: against simulations in which the truth is known."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
from matplotlib.figure import Figure

from jaxmed.evaluation.bootstrap import bootstrap_weights
from jaxmed.evaluation.box_decisions import BoxDecisions, score_boxes, thresholds_crosswise
from jaxmed.evaluation.calibration import (
    apply_platt,
    apply_scaling,
    apply_temperature,
    fit_platt,
    fit_scaling,
    fit_temperature,
)
from jaxmed.evaluation.calibration_curves import draw_bins
from jaxmed.evaluation.conformal import fit_sets, make_sets
from jaxmed.evaluation.decisions import (
    ClassDecisions,
    LabelDecisions,
    decide_crosswise,
    score_decided,
    score_labels,
)
from jaxmed.evaluation.operating_points import choose_score_threshold, choose_threshold, parse_rule
from jaxmed.inference.standalone.decisions import reaches
from jaxmed.metrics.classification import expected_calibration_error, summarize_classification
from jaxmed.types import UserError


def simulated(cases, classes=3, *, temperature=2.0, seed=0):
    """Labels drawn from probabilities, and what a network says that is too sure by a factor."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(cases, classes))
    true = scipy.special.softmax(logits, axis=1)
    labels = (true.cumsum(1) > rng.random((cases, 1))).argmax(1)
    return labels, scipy.special.softmax(temperature * logits, axis=1), true


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found_and_undone(temperature):
    labels, said, true = simulated(20_000, temperature=temperature)
    found = fit_temperature(labels, said)
    np.testing.assert_allclose(found, temperature, rtol=0.05)
    calibrated = apply_temperature(said, found)
    np.testing.assert_allclose(calibrated.sum(1), 1)
    assert (calibrated.argmax(1) == said.argmax(1)).all()
    assert np.abs(calibrated - true).mean() < 0.01

    def gap(p):
        ones = np.ones((1, len(labels)))
        return expected_calibration_error(p.argmax(1) == labels, p.max(1), ones)[0]

    assert gap(calibrated) < 0.02
    assert temperature == 1 or gap(said) > 0.05


def test_a_part_without_a_mistake_does_not_ask_for_certainty():
    labels = np.arange(30) % 3
    said = apply_temperature(np.eye(3)[labels] * 0.8 + 0.1, 1.0)
    assert 0.4 < fit_temperature(labels, said) < 0.6
    assert 0.4 < fit_scaling(labels, said)[0] < 0.6
    slope, intercept = fit_platt(np.arange(10) > 4, np.linspace(0.1, 0.9, 10))
    assert np.isfinite([slope, intercept]).all() and slope > 0


def test_few_cases_do_not_make_a_network_that_means_what_it_says_worse():
    rng = np.random.default_rng(0)

    def draw(count):
        logits = rng.normal(0, 1, count) + rng.choice([-5, 5], count)
        positive = scipy.special.expit(logits)
        said = np.stack([1 - positive, positive], axis=1)
        return (rng.random(count) < positive).astype(int), said

    labels, said = draw(5000)

    def loss(probabilities):
        return -np.log(probabilities[np.arange(5000), labels]).mean()

    fitted = [fit_temperature(*draw(60)) for _ in range(50)]
    after = np.mean([loss(apply_temperature(said, own)) for own in fitted])
    assert after < 1.15 * loss(said)


def test_few_positive_cases_never_turn_a_label_round():
    rng = np.random.default_rng(0)
    truth = np.arange(100) < 3
    slopes = [fit_platt(truth, scipy.special.expit(rng.normal(0.8 * truth)))[0] for _ in range(200)]
    assert min(slopes) == 0 and np.mean(np.array(slopes) > 0) > 0.8


def test_platt_is_a_logistic_regression_on_the_logit():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.01, 0.99, 5000)
    truth = rng.random(5000) < apply_platt(scores, 0.5, -1.0)
    slope, intercept = fit_platt(truth, scores)
    theirs = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-8)
    theirs.fit(scipy.special.logit(scores)[:, None], truth)
    np.testing.assert_allclose(slope, theirs.coef_[0, 0], rtol=1e-2)
    np.testing.assert_allclose(intercept, theirs.intercept_[0], rtol=1e-2)


def test_known_biases_of_classes_are_found_and_undone():
    labels, _, true = simulated(20_000)
    biases = np.array([1.0, -1.5, 0.5])
    # What must be said for the scaling with 1 / 0.5 and these biases to give the truth.
    said = scipy.special.softmax(2 * (np.log(true) - biases), axis=1)
    temperature, found = fit_scaling(labels, said)
    np.testing.assert_allclose(temperature, 2, rtol=0.05)
    np.testing.assert_allclose(found, biases, atol=0.06)
    assert np.abs(apply_scaling(said, temperature, found) - true).mean() < 0.01
    # Without biases it is the temperature's own scaling.
    np.testing.assert_allclose(apply_scaling(said, 3.0, (0.0,)), apply_temperature(said, 3.0))
    fixed = ClassDecisions.fit(labels, said, biased=True)
    truth = np.eye(3)[labels]
    plain = ClassDecisions.fit(labels, said)
    loss = [-np.log(f.decide(said).probabilities[truth > 0]).mean() for f in (fixed, plain)]
    assert loss[0] < loss[1] - 0.1
    assert (fixed.decide(said).predicted == labels).mean() > (
        plain.decide(said).predicted == labels
    ).mean()


def test_scaling_is_a_logistic_regression_where_there_are_two_classes():
    labels, said, _ = simulated(5000, classes=2)
    temperature, biases = fit_scaling(labels, said)
    theirs = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-8)
    theirs.fit(scipy.special.logit(said[:, 1])[:, None], labels)
    np.testing.assert_allclose(1 / temperature, theirs.coef_[0, 0], rtol=1e-2)
    np.testing.assert_allclose(biases[1] - biases[0], theirs.intercept_[0], atol=1e-2)


def test_biases_of_a_class_without_a_case_are_finite():
    labels, said, _ = simulated(40)
    temperature, biases = fit_scaling(np.where(labels == 2, 0, labels), said)
    assert 0.05 <= temperature <= 20 and np.abs(biases).max() < 30


def simulated_labels(cases, seed=0):
    """Several labels at once, each said too surely and one of them too often; some unknown."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(cases, 3)) - 0.5
    labels = (rng.random((cases, 3)) < scipy.special.expit(logits)).astype(int)
    labels[rng.random((cases, 3)) < 0.1] = -1
    said = scipy.special.expit(logits * [1, 2, 3] + [0, 0, 1.5])
    return labels, said, scipy.special.expit(logits)


def test_several_labels_are_calibrated_each_for_itself():
    labels, said, true = simulated_labels(20_000)
    fixed = LabelDecisions.fit(labels, said, rule="sensitivity=0.9")
    np.testing.assert_allclose(fixed.slopes, [1, 1 / 2, 1 / 3], rtol=0.05)
    np.testing.assert_allclose(fixed.intercepts, [0, 0, -0.5], atol=0.06)
    decided = fixed.decide(said)
    assert np.abs(decided.probabilities - true).mean() < 0.01
    found = score_labels(labels, decided, weights=np.ones((1, len(labels))))
    assert abs(found["sensitivity"][0] - 0.9) < 0.005 and found["ece"][0] < 0.02
    expected = []
    for c in range(3):
        own = labels[:, c] >= 0
        expected.append(
            sklearn.metrics.brier_score_loss(labels[own, c], decided.probabilities[own, c])
        )
    np.testing.assert_allclose(found["brier"][0], np.mean(expected))
    # Unknown labels change nothing.
    other = np.where(labels < 0, -1, 1 - labels)
    assert LabelDecisions.fit(other, said).slopes[0] == 0
    crosswise = decide_crosswise(labels[:200], said[:200], LabelDecisions.fit)
    assert crosswise.probabilities.shape == crosswise.predicted.shape == (200, 3)
    assert crosswise.sets is None


def test_a_label_without_both_kinds_stays_as_the_network_says():
    labels, said, _ = simulated_labels(300)
    labels[:, 1] = np.where(labels[:, 1] == 1, -1, labels[:, 1])
    fixed = LabelDecisions.fit(labels, said, rule="youden")
    assert (fixed.slopes[1], fixed.intercepts[1], fixed.thresholds[1]) == (1, 0, 0.5)
    np.testing.assert_allclose(fixed.decide(said).probabilities[:, 1], said[:, 1])
    found = score_labels(labels, fixed.decide(said), weights=bootstrap_weights(300, seed=0))
    assert np.isfinite(found["sensitivity"]).all() and np.isfinite(found["specificity"]).all()


def test_brier_score_is_scikit_learn_s():
    labels, said, _ = simulated(200, classes=2)
    ones = np.ones((1, 200))
    found = summarize_classification(labels, said, weights=ones, class_names=["a", "b"])
    expected = sklearn.metrics.brier_score_loss(labels, said[:, 1])
    np.testing.assert_allclose(found["brier"], expected, rtol=1e-6)
    labels, said, _ = simulated(200, classes=4)
    found = summarize_classification(labels, said, weights=ones, class_names=list("abcd"))
    np.testing.assert_allclose(found["brier"], ((said - np.eye(4)[labels]) ** 2).sum(1).mean() / 2)


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_the_truth_as_often_as_they_promise(coverage):
    held = []
    for seed in range(300):
        labels, said, _ = simulated(150, seed=seed)
        threshold = fit_sets(labels[:100], said[:100], coverage=coverage)
        sets = make_sets(said[100:], threshold)
        held.append(sets[np.arange(50), labels[100:]].mean())
    # At least what is promised, and by at most 1 / (n + 1) more.
    assert coverage - 0.01 < np.mean(held) < coverage + 0.02


def test_sets_of_too_few_cases_hold_all_classes():
    labels, said, _ = simulated(8)
    assert make_sets(said, fit_sets(labels, said, coverage=0.9)).all()
    assert not make_sets(said, fit_sets(labels, said, coverage=0.8)).all()


def test_thresholds_keep_what_the_rule_asks_for():
    rng = np.random.default_rng(0)
    truth = rng.random(500) < 0.3
    scores = np.round(np.clip(rng.normal(0.4 + 0.3 * truth, 0.2), 0, 1), 2)  # with ties

    def rates(threshold):
        called = scores >= threshold
        return called[truth].mean(), (~called)[~truth].mean()

    every = np.unique(scores)
    for share in (0.8, 0.95, 0.999):
        high = choose_threshold(truth, scores, f"sensitivity={share}")
        assert rates(high)[0] >= share and all(rates(t)[0] < share for t in every[every > high])
        low = choose_threshold(truth, scores, f"specificity={share}")
        assert rates(low)[1] >= share and all(rates(t)[1] < share for t in every[every < low])
    best = choose_threshold(truth, scores, "youden")
    assert np.isclose(sum(rates(best)), max(sum(rates(t)) for t in every))
    best = choose_threshold(truth, scores, "f1")
    f1 = [sklearn.metrics.f1_score(truth, scores >= t) for t in every]
    assert np.isclose(sklearn.metrics.f1_score(truth, scores >= best), max(f1))
    with pytest.raises(UserError, match="expected youden, f1"):
        parse_rule("sensitivity=95")


def test_nothing_is_positive_where_the_surest_case_would_be_one_too_many():
    truth, scores = np.array([False, True, True]), np.array([0.9, 0.5, 0.4])
    assert choose_threshold(truth, scores, "specificity=0.99") > 0.9


def test_the_score_threshold_of_boxes_is_that_of_the_best_f1():
    rng = np.random.default_rng(1)
    scores = np.round(rng.random(300), 2)
    hits = rng.random(300) < scores
    objects = int(hits.sum()) + 20

    def f1(threshold):
        called = scores >= threshold
        return 2 * (called & hits).sum() / (called.sum() + objects)

    best = choose_score_threshold(scores, hits, objects=objects)
    assert np.isclose(f1(best), max(f1(t) for t in np.unique(scores)))


def test_decisions_are_applied_unchanged_and_judged_as_scikit_learn_does():
    labels, said, _ = simulated(3000, classes=2)
    fixed = ClassDecisions.fit(labels[:1500], said[:1500], rule="sensitivity=0.9", coverage=0.9)
    decided = fixed.decide(said[1500:])
    labels = labels[1500:]
    weights = bootstrap_weights(len(labels), resamples=50, seed=0)
    found = score_decided(labels, decided, weights=weights)
    assert all(values.shape == (51,) for values in found.values())
    recall = sklearn.metrics.recall_score(labels, decided.predicted)
    assert np.isclose(found["sensitivity"][0], recall) and abs(recall - 0.9) < 0.04
    np.testing.assert_allclose(
        [found[name][0] for name in ("accuracy", "specificity", "precision")],
        [
            sklearn.metrics.accuracy_score(labels, decided.predicted),
            sklearn.metrics.recall_score(labels, decided.predicted, pos_label=0),
            sklearn.metrics.precision_score(labels, decided.predicted),
        ],
    )
    assert abs(found["set_coverage"][0] - 0.9) < 0.03 and 1 <= found["set_size"][0] < 2
    assert found["ece"][0] < 0.04
    calibrated = decided.probabilities[:, 1]
    expected = sklearn.metrics.brier_score_loss(labels, calibrated)
    np.testing.assert_allclose(found["brier"][0], expected)


def test_crosswise_no_case_is_decided_by_itself():
    labels, said, _ = simulated(100, classes=2)
    patients = [f"p{i // 2}" for i in range(100)]
    seen = []

    def fit(own_labels, own_said):
        seen.append({tuple(row) for row in own_said})
        return ClassDecisions.fit(own_labels, own_said, rule="youden")

    found = decide_crosswise(labels, said, fit, patients=patients)
    assert len(seen) == 5 and np.allclose(found.probabilities.sum(1), 1)
    for row in range(100):
        # Of each pair of a patient, both were left out of one fit, the same.
        without = [i for i, own in enumerate(seen) if tuple(said[row]) not in own]
        partner = [i for i, own in enumerate(seen) if tuple(said[row ^ 1]) not in own]
        assert len(without) == 1 and without == partner


def test_boxes_are_counted_from_the_threshold_on():
    rows = [
        {
            "score": np.array([0.9, 0.8, 0.2]),
            "matched": np.array([[True, False, True]]),
            "truths": np.array([2, 1]),
        },
        {"score": np.zeros(0), "matched": np.zeros((1, 0), bool), "truths": np.array([0, 0])},
    ]
    found = score_boxes(rows, np.full(2, 0.5), weights=np.ones((1, 2)))
    assert found["sensitivity"][0] == 1 / 3 and found["precision"][0] == 1 / 2
    assert found["false_positives_an_image"][0] == 1 / 2
    fixed = BoxDecisions.fit(rows)
    assert fixed.score_threshold == 0.2 and 0 < fixed.probability(np.array([0.9]))[0] < 1
    assert BoxDecisions.fit(rows[1:]) is None


def test_thresholds_of_boxes_are_judged_by_what_other_images_chose():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(20):
        hits = rng.random(6) < 0.4
        scores = np.sort(rng.beta(2 + 2 * hits, 3))[::-1]
        rows.append({"score": scores, "matched": hits[None], "truths": np.array([3, 0])})
    patients = [str(i // 2) for i in range(20)]
    own = thresholds_crosswise(rows, patients=patients)
    assert len(set(own)) > 1 and (own[::2] == own[1::2]).all()
    changed = [dict(row) for row in rows]
    changed[0]["score"] = changed[0]["score"] * 0.1
    again = thresholds_crosswise(changed, patients=patients)
    assert again[0] == own[0], "an image's own boxes must not choose its threshold"


def test_shares_of_bins_have_their_intervals_where_they_are_of_cases():
    """Those of Clopper and Pearson, also where all or none of a bin came true."""
    score = np.repeat([0.05, 0.55, 0.95], [10, 40, 3])
    truth = np.repeat([0, 1, 0, 1], [10, 20, 20, 3])
    axis = Figure().subplots()
    draw_bins(axis, "class", truth, score)
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[0.05, 0], [0.55, 0.5], [0.95, 1]])
    for segment, (hits, count) in zip(
        axis.collections[0].get_segments(), [(0, 10), (20, 40), (3, 3)], strict=True
    ):
        exact = scipy.stats.binomtest(hits, count).proportion_ci()
        np.testing.assert_allclose(segment[:, 1], [exact.low, exact.high], atol=1e-9)
    axis = Figure().subplots()
    draw_bins(axis, "voxels", truth, score, are_cases=False)
    assert len(axis.lines) == 1 and not axis.collections


def test_what_reaches_a_threshold_is_told_by_odds():
    """As two programs differ in these: near 0, in the middle, and where a network is very sure."""
    for threshold in (1e-4, 0.3, 0.9, 0.9999):
        odds = threshold / (1 - threshold)
        for factor, holds in ((1 - 1e-6, True), (1 - 5e-3, False)):
            near = odds * factor / (1 + odds * factor)
            assert reaches(near, threshold) == holds, (threshold, factor)
    assert reaches(threshold, threshold)
    assert not reaches(1 - 3e-6, 1.0)
