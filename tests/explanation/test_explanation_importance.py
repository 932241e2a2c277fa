import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.explanation.importance import (
    channel_players,
    permutation_importance,
    region_players,
    shapley_values,
)
from jaxmed.explanation.measurements import (
    measure,
    measurement_importance,
    summarize_mask,
)


@pytest.mark.parametrize("shape", [(12, 12, 2), (8, 8, 8, 1)])
def test_shapley_values_sum_up_to_the_difference(shape):
    rng = np.random.default_rng(0)
    image, baseline = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    players = region_players(np.asarray(image), regions=6)
    count = int(players.max()) + 1

    def score(x):
        return jnp.tanh(x.sum()) + (x**2).mean()

    for permutations in (2, 8):
        values = shapley_values(
            score,
            image,
            baseline,
            jnp.asarray(players),
            jax.random.key(1),
            count=count,
            permutations=permutations,
        )
        np.testing.assert_allclose(values.sum(), score(image) - score(baseline), atol=1e-4)


def test_shapley_values_of_a_pair_that_only_counts_together_are_equal():
    image, baseline = jnp.ones((2, 2, 3)), jnp.zeros((2, 2, 3))
    players = jnp.asarray(channel_players(image.shape))

    def score(x):
        return x[0, 0, 0] * x[0, 0, 1]  # the third channel does not count

    values = shapley_values(
        score, image, baseline, players, jax.random.key(0), count=3, permutations=2
    )
    # Of two players an order and its reverse are all there are.
    np.testing.assert_allclose(values, [0.5, 0.5, 0], atol=1e-6)


def test_permutation_importance_of_a_linear_score():
    rng = np.random.default_rng(0)
    others = jnp.asarray(rng.normal(size=(20, 3, 3, 2)), jnp.float32)
    image = others[0]
    players = jnp.asarray(channel_players(image.shape))

    def score(x):
        return 2 * x[..., 1].mean()

    found = permutation_importance(score, image, others, players, count=2)
    expected = 2 * (image[..., 1].mean() - others[..., 1].mean())
    np.testing.assert_allclose(found, [0, expected], atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 20, 1), (10, 10, 10, 3)])
def test_superpixels_are_numbered_without_a_gap_and_share_channels(shape):
    players = region_players(np.random.default_rng(0).normal(size=shape), regions=8)
    assert players.shape == shape
    assert sorted(np.unique(players)) == list(range(players.max() + 1))
    assert (players == players[..., :1]).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_measurements_are_in_millimetres(ndim):
    mask = np.zeros((20,) * ndim, np.int32)
    mask[(slice(5, 10),) * ndim] = 2
    image = np.full((*mask.shape, 1), 7.0)
    spacing = [0.5, 2.0, 3.0][:ndim]
    [row] = measure(mask, image, spacing=spacing)
    assert row["label"] == 2
    np.testing.assert_allclose(row["area"], 5**ndim * np.prod(spacing))
    assert row["intensity_mean"] == 7 and row["intensity_std"] == 0


def test_the_measurement_that_tells_the_label_is_found():
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(60)]
    table = [
        {"area": label + 0.1 * rng.normal(), "noise": rng.normal(), "absent": np.nan}
        for label in labels
    ]
    table[3]["area"] = np.nan
    found = measurement_importance(table, labels, shuffles=5, resamples=200)
    assert found["accuracy"]["value"] > 0.9
    fall, alone = found["fall"], found["alone"]
    assert fall["area"]["low"] > 0.3 > 0.1 > abs(fall["noise"]["value"])
    assert alone["area"]["value"] > 0.9 > 0.7 > alone["noise"]["value"]
    assert fall["absent"]["value"] == 0 and alone["absent"]["value"] <= 0.5
    with pytest.raises(ValueError, match="4 cases"):
        measurement_importance(table[:5], labels[:5])


def test_measurements_that_say_the_same_stand_in_for_each_other():
    table = [dict.fromkeys("abcde", float(i % 2)) for i in range(40)]
    found = measurement_importance(table, [i % 2 for i in range(40)], shuffles=2)
    assert {entry["value"] for entry in found["alone"].values()} == {1}
    assert {entry["value"] for entry in found["fall"].values()} == {0}


def test_cases_of_a_patient_do_not_tell_each_other():
    rng = np.random.default_rng(0)
    # Twenty patients of three cases: the value names the patient, and nothing tells the label.
    patients = np.repeat(np.arange(20), 3)
    values, given = rng.permutation(20).astype(float), rng.permutation(np.arange(20) % 2)
    table = [{"value": values[patient]} for patient in patients]
    labels = given[patients].tolist()
    apart = measurement_importance(table, labels, groups=patients.tolist(), shuffles=2)
    mixed = measurement_importance(table, labels, shuffles=2)
    assert mixed["accuracy"]["value"] > 0.9 > 0.75 > apart["accuracy"]["value"]


def test_a_mask_is_one_row_of_classes_or_of_instances():
    mask = np.zeros((12, 12), np.int32)
    mask[1:3, 1:3], mask[5:9, 5:9] = 1, 2
    image = np.stack([mask, 10 * mask], axis=-1).astype(np.float64)
    row = summarize_mask(mask, image, class_names=("background", "a", "b", "c"))
    assert (row["area/a"], row["area/b"], row["area/c"]) == (4, 16, 0)
    assert row["intensity_mean-1/b"] == 20 and np.isnan(row["intensity_mean-1/c"])
    row = summarize_mask(mask, image)
    assert (row["objects"], row["area mean"], row["area sd"]) == (2, 10, 6)
    empty = summarize_mask(np.zeros_like(mask), image)
    assert empty["objects"] == 0 and empty.keys() == row.keys()
    assert np.isnan(empty["area mean"])
