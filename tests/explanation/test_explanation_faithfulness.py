import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.explanation.faithfulness import (
    area_under,
    compare_maps,
    deletion_curves,
    dilate,
    find_failures,
    random_ranks,
    rank_tiles,
    share_on,
)


@pytest.mark.parametrize("shape", [(20, 30), (10, 12, 14)])
def test_maps_are_like_themselves_and_unlike_others(shape):
    rng = np.random.default_rng(0)
    found, other = rng.normal(size=(2, *shape))
    assert compare_maps(found, 2 * found + 1) == pytest.approx({"correlation": 1, "ssim": 1})
    assert abs(compare_maps(found, other)["correlation"]) < 0.2
    assert compare_maps(found, np.zeros(shape)) == {}


@pytest.mark.parametrize("shape", [(16, 16, 1), (8, 8, 8, 1)])
def test_deleting_what_counts_first_is_worse_than_any_random_ranking(shape):
    spatial = shape[:-1]
    cause = np.zeros(spatial, np.float32)
    cause[(slice(2, 6),) * len(spatial)] = 1
    image, baseline = jnp.ones(shape), jnp.zeros(shape)

    def score(x):
        return (x[..., 0] * cause).sum() / cause.sum()

    best = rank_tiles(cause, tiles=4)
    worst = rank_tiles(-cause, tiles=4)
    random = random_ranks(spatial, tiles=4, count=19, seed=0)
    ranks = jnp.asarray(np.stack([best, worst, *random]))
    deleted = deletion_curves(score, image, baseline, ranks)
    inserted = deletion_curves(score, baseline, image, ranks)
    np.testing.assert_allclose(deleted[:, 0], 1, rtol=1e-6)
    np.testing.assert_allclose(deleted[:, -1], 0)
    np.testing.assert_allclose(inserted[:, 0], 0)
    np.testing.assert_allclose(inserted[:, -1], 1, rtol=1e-6)
    # What is not deleted is what was not inserted, and this score adds up.
    np.testing.assert_allclose(deleted + inserted, 1, rtol=1e-5)
    areas = area_under(np.asarray(deleted))
    assert areas[0] < areas[2:].min() and areas[1] > areas[2:].max()


def test_ranks_go_by_the_mean_of_tiles():
    values = np.zeros((8, 8))
    values[4:, :4] = 2
    values[0, 0] = 9  # alone in its tile
    ranks = rank_tiles(values, tiles=2)
    assert (ranks[4:, :4] == 0).all() and (ranks[:4, :4] == 0.25).all()
    assert sorted(np.unique(ranks)) == [0, 0.25, 0.5, 0.75]


def test_the_area_under_a_line():
    assert area_under(np.linspace(1, 0, 5)[None])[0] == pytest.approx(0.5)


def test_the_share_counts_what_is_positive():
    values, region = np.array([[3.0, 1.0], [-8.0, 0.0]]), np.array([[True, False], [True, False]])
    assert share_on(values, region) == {"share": 0.75, "pointing": 1.0, "region": 0.5}
    assert share_on(-np.ones((2, 2)), region)["share"] == 0
    single = np.zeros((9, 9), bool)
    single[4, 4] = True
    assert dilate(single, margin=1).sum() == 5
    assert not dilate(np.zeros((4, 4), bool), margin=2).any()


def test_each_rule_fails_a_map():
    good = {"correlation": 0.1, "deletion": 0.2, "deletion_random": 0.3, "empty": 0.0}
    assert find_failures(good) == []
    for bad, word in (
        ({"correlation": -0.6}, "random weights"),
        ({"deletion": 0.3}, "no better than random"),
        ({"gap": 0.02}, "incomplete"),
        ({"empty": 1.0}, "positive"),
    ):
        [told] = find_failures({**good, **bad})
        assert word in told
