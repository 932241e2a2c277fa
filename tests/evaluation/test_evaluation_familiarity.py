import numpy as np
import pytest
import scipy.stats

from jaxmed.evaluation.familiarity import Familiarity


def draw(cases, *, seed, shift=0.0, features=6):
    rng = np.random.default_rng(seed)
    mixed = np.linalg.qr(np.random.default_rng(0).normal(size=(features, features)))[0]
    scales = np.geomspace(0.3, 3, features)
    found = rng.normal(size=(cases, features)) * scales @ mixed + shift
    return list(found.astype(np.float32)[:, None])  # of one window each


def test_distance_is_that_of_mahalanobis():
    """Of a Gaussian known by many cases the squares are chi-squared, whatever its shape."""
    found = Familiarity.fit(draw(20_000, seed=1), draw(1000, seed=2))
    squares = found.distance(draw(5000, seed=3)) ** 2
    assert scipy.stats.kstest(squares, scipy.stats.chi2(6).cdf).pvalue > 0.01
    assert found.distance([found.mean[None]])[0] == 0


def test_as_many_of_the_same_kind_are_flagged_as_asked_for():
    shares = []
    for seed in range(20):
        found = Familiarity.fit(draw(200, seed=seed), draw(200, seed=100 + seed))
        shares.append(found.is_unfamiliar(draw(500, seed=200 + seed)).mean())
    assert np.mean(shares) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("cases", range(19, 62))
def test_never_more_are_expected_than_asked_for(cases):
    """Of exchangeable cases the next is beyond the k-th of n with probability 1 - k / (n + 1)."""
    held_out = draw(cases, seed=2)
    found = Familiarity.fit(draw(50, seed=1), held_out)
    place = (~found.is_unfamiliar(held_out)).sum()
    assert 0.05 - 1 / (cases + 1) < 1 - place / (cases + 1) <= 0.05 + 1e-9


def test_a_change_where_training_cases_hardly_differ_is_seen():
    found = Familiarity.fit(draw(300, seed=1), draw(300, seed=2))
    # Small beside the whole spread, large along the direction in which nothing varied.
    assert found.is_unfamiliar(draw(200, seed=3, shift=1.5)).mean() > 0.9


def test_more_features_than_cases_are_no_trouble():
    rng = np.random.default_rng(0)
    found = Familiarity.fit(
        list(rng.normal(size=(30, 1, 200))), list(rng.normal(size=(30, 1, 200)))
    )
    far = found.distance(list(rng.normal(size=(10, 1, 200)) + 3))
    assert np.isfinite(far).all() and (far > found.threshold).all()


def test_features_that_never_vary_are_no_trouble():
    train, held_out = draw(50, seed=1), draw(50, seed=2)
    for case in (*train, *held_out):
        case[:, 0] = 1
    found = Familiarity.fit(train, held_out)
    assert np.isfinite(found.distance(held_out)).all() and np.isfinite(found.threshold)


def test_images_of_many_windows_are_judged_as_those_of_one():
    """Their mean would lie nearer to that of the training cases, whatever they show."""
    found = Familiarity.fit(draw(300, seed=1), draw(300, seed=2))
    alike = list(np.reshape(draw(800, seed=3), (100, 8, -1)))
    assert found.distance(alike).mean() == pytest.approx(6**0.5, rel=0.1)
    assert found.is_unfamiliar(alike).mean() <= 0.05
    # Windows that are all far off, each in another direction.
    away = list(np.reshape(draw(800, seed=4), (100, 8, -1)) * 3)
    assert found.is_unfamiliar(away).mean() > 0.95
    assert not found.is_unfamiliar([case.mean(axis=0, keepdims=True) for case in away]).all()
