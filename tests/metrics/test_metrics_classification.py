import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from jaxmed.metrics import classification as cl

RESAMPLES = 6


def make_case(kind, n=120, seed=0):
    """Labels, probabilities with ties, and weights with zeros."""
    rng = np.random.default_rng(seed)
    classes = {"binary": 2, "multiclass": 4, "multilabel": 3}[kind]
    weights = rng.integers(0, 4, (RESAMPLES, n)).astype("f4")
    weights[0] = 1
    if kind == "multilabel":
        labels = rng.integers(0, 2, (n, classes)).astype("i4")
        probabilities = (0.4 * labels + 0.6 * rng.random((n, classes))).round(1)
    else:
        labels = rng.integers(0, classes, n).astype("i4")
        probabilities = np.eye(classes)[labels] * 0.5 + rng.random((n, classes))
        probabilities = (probabilities / probabilities.sum(1, keepdims=True)).round(1)
        if kind == "binary":
            probabilities[:, 0] = 1 - probabilities[:, 1]
    names = [f"c{i}" for i in range(classes)]
    return labels, probabilities.astype("f4"), weights, names


def sklearn_scores(truth, predicted, scores, weight):
    """Scores of one class against the rest."""
    kw = {"sample_weight": weight}
    return {
        "recall": sk.recall_score(truth, predicted, **kw),
        "precision": sk.precision_score(truth, predicted, zero_division=0, **kw),
        "f1": sk.f1_score(truth, predicted, **kw),
        "auroc": sk.roc_auc_score(truth, scores, **kw),
        "average_precision": sk.average_precision_score(truth, scores, **kw),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted, **kw),
        "accuracy": sk.accuracy_score(truth, predicted, **kw),
    }


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_equals_scikit_learn(kind):
    labels, probabilities, weights, names = make_case(kind)
    summary = cl.summarize_classification(labels, probabilities, weights=weights, class_names=names)
    if kind == "multilabel":
        truth, predicted = labels == 1, probabilities >= 0.5
    else:
        eye = np.eye(len(names), dtype=bool)
        truth, predicted = eye[labels], eye[probabilities.argmax(1)]
    for r, w in enumerate(weights):
        each = [
            sklearn_scores(truth[:, c], predicted[:, c], probabilities[:, c], w)
            for c in range(len(names))
        ]
        if kind == "binary":
            expected = each[-1]
        else:
            expected = {name: np.mean([e[name] for e in each]) for name in each[0]}
        if kind == "multiclass":
            guess = probabilities.argmax(1)
            expected["accuracy"] = sk.accuracy_score(labels, guess, sample_weight=w)
            expected["balanced_accuracy"] = sk.balanced_accuracy_score(
                labels, guess, sample_weight=w
            )
        for name, value in expected.items():
            assert summary[name][r] == pytest.approx(value, abs=1e-6), name
        for c, class_name in enumerate(names):
            for name in cl.PER_CLASS:
                got = summary[f"{name}/{class_name}"][r]
                assert got == pytest.approx(each[c][name], abs=1e-6), (name, class_name)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_weights_equal_repeated_cases(kind):
    labels, probabilities, weights, names = make_case(kind)
    whole = cl.summarize_classification(labels, probabilities, weights=weights, class_names=names)
    rows = np.repeat(np.arange(len(labels)), weights[3].astype(int))
    repeated = cl.summarize_classification(
        labels[rows], probabilities[rows], weights=np.ones((1, len(rows))), class_names=names
    )
    for name in whole:
        if name == "ece":
            continue  # a case drawn twice tells no more of chance than once: see its own tests
        assert whole[name][3] == pytest.approx(repeated[name][0], abs=1e-6), name


def test_threshold_moves_the_decision_and_nothing_else():
    labels, probabilities, weights, names = make_case("binary")
    kw = {"weights": weights, "class_names": names}
    low = cl.summarize_classification(labels, probabilities, threshold=0.0, **kw)
    high = cl.summarize_classification(labels, probabilities, threshold=1.1, **kw)
    assert (low["recall"] == 1).all() and (high["recall"] == 0).all()
    assert (high["precision"] == 0).all()
    np.testing.assert_allclose(low["balanced_accuracy"], 0.5)
    np.testing.assert_array_equal(low["auroc"], high["auroc"])
    labels, probabilities, weights, names = make_case("multilabel")
    kw = {"weights": weights, "class_names": names}
    each = cl.summarize_classification(
        labels, probabilities, threshold=np.array([0.0, 0.5, 1.1]), **kw
    )
    assert (each["recall/c0"] == 1).all() and (each["recall/c2"] == 0).all()
    labels, probabilities, weights, names = make_case("multiclass")
    with pytest.raises(ValueError, match="two classes"):
        cl.summarize_classification(
            labels, probabilities, threshold=0.5, weights=weights, class_names=names
        )


def test_class_missing_in_a_resample_is_undefined_there_only():
    labels, probabilities, weights, names = make_case("multiclass")
    weights[2, labels == 1] = 0
    summary = cl.summarize_classification(labels, probabilities, weights=weights, class_names=names)
    for name in ("auroc", "recall", "f1", "precision", "average_precision", "auroc/c1"):
        assert np.isnan(summary[name][2]) and np.isfinite(np.delete(summary[name], 2)).all(), name
    assert np.isfinite(summary["accuracy"]).all() and np.isfinite(summary["auroc/c0"]).all()


def test_class_missing_in_the_set_is_left_out_of_the_mean():
    labels, probabilities, weights, names = make_case("multiclass")
    keep = labels != 1
    labels, probabilities, weights = labels[keep], probabilities[keep], weights[:, keep]
    summary = cl.summarize_classification(labels, probabilities, weights=weights, class_names=names)
    assert np.isnan(summary["recall/c1"]).all()
    others = np.mean([summary[f"recall/c{c}"] for c in (0, 2, 3)], axis=0)
    np.testing.assert_allclose(summary["recall"], others)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_unknown_labels_are_left_out(kind):
    labels, probabilities, weights, names = make_case(kind)
    plain = cl.summarize_classification(labels, probabilities, weights=weights, class_names=names)
    more = cl.summarize_classification(
        np.concatenate([labels, np.full_like(labels[:7], -1)]),
        np.concatenate([probabilities, probabilities[:7]]),
        weights=np.concatenate([weights, weights[:, :7] + 1], axis=1),
        class_names=names,
    )
    for name in plain:
        np.testing.assert_allclose(plain[name], more[name], atol=1e-9)


def plain_gaps(truth, confidences, weights):
    """Guo's gaps in 15 bins, as shares of all cases; the sum of their sizes is the plain error."""
    inside = (confidences[:, None] > np.arange(15) / 15) & (
        confidences[:, None] <= np.arange(1, 16) / 15
    )
    return weights @ (inside * (confidences - truth)[:, None]) / weights.sum()


def test_calibration_error_by_hand():
    # Nothing varies: all cases are .35 too low.
    ece = cl.expected_calibration_error(np.ones(3, bool), np.full(3, 0.65), np.ones((2, 3)))
    np.testing.assert_allclose(ece, 0.35)
    # Right as often as said, but for what a set of three can be: no error is shown.
    truth, said = np.array([True, False, True]), np.array([0.65, 0.65, 1.0])
    assert cl.expected_calibration_error(truth, said, np.ones((1, 3))) == 0
    # Of two classes of the last one, of more of the likeliest, of several labels the mean.
    rng = np.random.default_rng(0)
    labels, ones = rng.integers(0, 2, 400), np.ones((1, 400))
    p = rng.dirichlet([1, 1, 1], 400)
    two = cl.summarize_classification(labels, p[:, :2], weights=ones, class_names="ab")["ece"]
    assert two == cl.expected_calibration_error(labels == 1, p[:, 1], ones)
    three = cl.summarize_classification(labels, p, weights=ones, class_names="abc")["ece"]
    assert three == cl.expected_calibration_error(p.argmax(1) == labels, p.max(1), ones)
    several = np.stack([labels, labels], 1)
    both = cl.summarize_classification(
        several, np.stack([p[:, 1]] * 2, 1), weights=ones, class_names="ab"
    )
    np.testing.assert_allclose(both["ece"], two)


def test_calibration_error_is_without_what_chance_adds():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    said, ones = 1 / (1 + np.exp(-logits)), np.ones(20_000)
    for stretch in (1, 0.5):
        really = 1 / (1 + np.exp(-stretch * logits))
        error = np.abs(plain_gaps(really, said, ones)).sum()
        truth = rng.random(20_000) < really
        whole = cl.expected_calibration_error(truth, said, ones[None])[0]
        assert whole == pytest.approx(error, abs=0.01)
        sets = np.arange(20_000).reshape(-1, 200)
        few = [cl.expected_calibration_error(truth[s], said[s], np.ones((1, 200))) for s in sets]
        plain = [np.abs(plain_gaps(truth[s], said[s], np.ones(200))).sum() for s in sets]
        assert abs(np.mean(few) - error) < 0.6 * (np.mean(plain) - error)


def test_calibration_error_shrinks_the_gaps_by_one_factor():
    rng = np.random.default_rng(1)
    said = rng.random(150)
    truth = rng.random(150) < said**2
    weights = rng.multinomial(150, np.full(150, 1 / 150), 8).astype(float)
    weights[0] = 1
    found = cl.expected_calibration_error(truth, said, weights)
    own = plain_gaps(truth, said, weights[0])
    total = np.abs(own).sum()
    for value, row in zip(found[1:], weights[1:], strict=True):
        deviation = plain_gaps(truth, said, row) - own
        sums = np.abs(value / total * own + deviation).sum()
        assert np.isclose(sums, total) if value > 0 else np.abs(deviation).sum() >= total
    # The set itself: in sets drawn about the shrunken gaps the plain error is on average as found.
    residuals = said - truth
    place = np.ceil(said * 15).astype(int) - 1
    square = np.bincount(place, residuals**2, minlength=15) / 150 - own**2
    drawn = found[0] / total * own + rng.normal(size=(20_000, 15)) * np.sqrt(square / 150)
    assert 0 < found[0] < total
    np.testing.assert_allclose(np.abs(drawn).sum(1).mean(), total, rtol=0.01)


def test_single_class_and_single_case_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = cl.summarize_classification(
            np.array([1]), np.array([[0.2, 0.8]]), weights=np.ones((2, 1)), class_names=["a", "b"]
        )
    assert (summary["accuracy"] == 1).all() and np.isnan(summary["auroc"]).all()
