"""The posterior of the last layer: against the full one, and against what must hold."""

import numpy as np
import pytest
import scipy.special
import sklearn.linear_model

from jaxmed.evaluation.laplace import PRIOR_PRECISIONS, LastLayer


def full_covariance(features, logits, precision):
    """Of all weights (inputs x classes), and the inputs: the Hessian summed case by case."""
    inputs = np.append(features, np.ones((len(features), 1)), axis=1)
    size = inputs.shape[1] * logits.shape[1]
    hessian = precision * np.eye(size)
    for x, z in zip(inputs, logits, strict=True):
        p = scipy.special.softmax(z)
        hessian += np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    return np.linalg.inv(hessian)


def test_variances_are_those_of_the_full_posterior_where_it_is_a_kronecker_product():
    rng = np.random.default_rng(0)
    features, new = rng.normal(size=(40, 3)), rng.normal(size=(5, 3))
    logits = np.tile([0.3, -1.0, 0.5, 0.1], (40, 1))  # the same curvature at every case
    found = LastLayer.of(features, logits, prior_precision=0.7).variances(new)
    covariance = full_covariance(features, logits, 0.7)
    for row, x in zip(found, np.append(new, np.ones((5, 1)), axis=1), strict=True):
        jacobian = np.kron(x[None], np.eye(4) - 1 / 4)
        np.testing.assert_allclose(row, np.diag(jacobian @ covariance @ jacobian.T))


def test_of_two_classes_it_is_the_posterior_of_a_logistic_regression():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 2))
    labels = rng.random(300) < scipy.special.expit(0.5 * features[:, 0])
    # With precision t of both columns of weights, their difference has t / 2.
    fitted = sklearn.linear_model.LogisticRegression(C=1.0, tol=1e-10).fit(features, labels)
    margin = fitted.decision_function(features)
    said = scipy.special.expit(margin)
    inputs = np.append(features, np.ones((300, 1)), axis=1)
    hessian = inputs.T @ (inputs * (said * (1 - said))[:, None]) + np.eye(3)
    covariance = np.linalg.inv(hessian)
    logits = np.stack([-margin / 2, margin / 2], axis=1)
    layer = LastLayer.of(features, logits, prior_precision=2.0)
    new = rng.normal(size=(50, 2))
    x = np.append(new, np.ones((50, 1)), axis=1)
    expected = np.einsum("ni,ij,nj->n", x, covariance, x)
    # Less their mean, each of both logits is half their difference.
    difference = 4 * layer.variances(new)[:, 1]
    np.testing.assert_allclose(difference, expected, rtol=0.1)
    # The mean of a sigmoid under a normal, by quadrature.
    points, mass = np.polynomial.hermite_e.hermegauss(60)
    own = np.stack([-(m := fitted.decision_function(new)) / 2, m / 2], axis=1)
    drawn = scipy.special.expit(m[:, None] + np.sqrt(difference)[:, None] * points)
    mean = drawn @ mass / mass.sum()
    np.testing.assert_allclose(layer.predict(new, own)[:, 1], mean, atol=2e-3)


def test_variance_grows_away_from_what_was_trained_on_and_probabilities_become_even():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(200, 5))
    weights = rng.normal(size=(5, 3))
    layer = LastLayer.of(features, features @ weights)
    direction = rng.normal(size=(1, 5))
    ray = np.linspace(0, 100, 20)[:, None] * direction
    variance = layer.variances(ray)
    assert (np.diff(variance, axis=0) > 0).all()
    said = scipy.special.softmax(ray @ weights, axis=1)
    assert (layer.predict(ray, ray @ weights).max(1)[2:] < said.max(1)[2:]).all()
    # More training cases, or a stronger prior, and less is unknown.
    twice = LastLayer.of(np.tile(features, (2, 1)), np.tile(features @ weights, (2, 1)))
    assert (twice.variances(ray) < variance).all()
    sure = LastLayer.of(features, features @ weights, prior_precision=1e9)
    np.testing.assert_allclose(sure.predict(ray, ray @ weights), said, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_prior_is_chosen_by_the_likelihood(factor):
    rng = np.random.default_rng(4)
    features = rng.normal(size=(400, 4))
    logits = features @ rng.normal(size=(4, 3))
    labels = (scipy.special.softmax(logits, axis=1).cumsum(1) > rng.random((400, 1))).argmax(1)
    said = factor * logits
    layer = LastLayer.of(features, said).tune(features, said, labels)

    def loss(p):
        return -np.log(p[np.arange(400), labels]).mean()

    assert layer.prior_precision in PRIOR_PRECISIONS
    assert loss(layer.predict(features, said)) <= loss(scipy.special.softmax(said, 1)) + 1e-3
    assert factor == 1 or loss(layer.predict(features, said)) < loss(scipy.special.softmax(said, 1))
