"""Risk and coverage: against loops and against what is known in closed form."""

import numpy as np

from jaxmed.evaluation.bootstrap import bootstrap_weights
from jaxmed.metrics.selection import area_under_risk, risk_coverage


def naive_area(confidence, loss):
    """The mean, over cases, of the mean loss of all cases at least as sure."""
    return np.mean([loss[confidence >= sure].mean() for sure in confidence])


def test_area_is_that_of_a_loop_under_every_resample():
    rng = np.random.default_rng(0)
    confidence, loss = np.round(rng.random(60), 1), rng.random(60)  # with ties
    weights = bootstrap_weights(60, resamples=30, seed=0)
    found = area_under_risk(confidence, loss, weights=weights)
    drawn = [np.repeat(np.arange(60), row.astype(int)) for row in weights]
    np.testing.assert_allclose(found, [naive_area(confidence[d], loss[d]) for d in drawn])


def test_by_hand():
    confidence, loss = np.array([0.6, 0.9, 0.8, 0.7]), np.array([1, 0, 1, 0])
    coverage, risk = risk_coverage(confidence, loss, weights=np.ones((1, 4)))
    np.testing.assert_allclose(coverage[0], [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk[0], [0, 1 / 2, 1 / 3, 1 / 2])
    area = area_under_risk(confidence, loss, weights=np.ones((1, 4)))
    np.testing.assert_allclose(area, [(0 + 1 / 2 + 1 / 3 + 1 / 2) / 4])


def test_a_perfect_ranking_has_the_area_known_in_closed_form():
    # With a share r of mistakes, ranked last: r + (1 - r) log(1 - r) (Geifman et al. 2019).
    wrong = np.arange(20_000) >= 14_000
    ones = np.ones((1, 20_000))
    best = area_under_risk(-wrong.astype(float), wrong, weights=ones)
    # Mistakes here are all equally unsure, and decided together: .3 of the cases at risk .3.
    np.testing.assert_allclose(best, [0.3 * 0.3])
    ranked = area_under_risk(-np.arange(20_000.0), wrong, weights=ones)
    np.testing.assert_allclose(ranked, [0.3 + 0.7 * np.log(0.7)], atol=1e-4)


def test_confidence_that_says_nothing_gives_the_mean_loss():
    loss = np.random.default_rng(1).random(50)
    np.testing.assert_allclose(
        area_under_risk(np.ones(50), loss, weights=np.ones((1, 50))), [loss.mean()]
    )
