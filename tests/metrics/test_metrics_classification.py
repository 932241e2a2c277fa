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


def test_calibration_error_by_hand():
    # Bin (.6, .667]: two cases at .65, one right: gap .15. Bin (.933, 1]: 1., right: no gap.
    truth = np.array([True, False, True])
    ece = cl.expected_calibration_error(truth, np.array([0.65, 0.65, 1.0]), np.ones((1, 3)))
    np.testing.assert_allclose(ece, [2 * 0.15 / 3])
    labels = np.array([1, 0, 1])
    probabilities = np.array([[0.35, 0.65], [0.35, 0.65], [0.0, 1.0]])
    summary = cl.summarize_classification(
        labels, probabilities, weights=np.ones((1, 3)), class_names=["a", "b"]
    )
    np.testing.assert_allclose(summary["ece"], ece)
    three = np.array([[0.7, 0.2, 0.1], [0.8, 0.1, 0.1]])
    summary = cl.summarize_classification(
        np.array([0, 1]), three, weights=np.ones((1, 2)), class_names=["a", "b", "c"]
    )
    np.testing.assert_allclose(summary["ece"], [(0.3 + 0.8) / 2])


def test_single_class_and_single_case_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = cl.summarize_classification(
            np.array([1]), np.array([[0.2, 0.8]]), weights=np.ones((2, 1)), class_names=["a", "b"]
        )
    assert (summary["accuracy"] == 1).all() and np.isnan(summary["auroc"]).all()
