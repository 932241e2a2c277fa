"""Instances found band by band are those of the whole image."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import scipy.ndimage

from jaxmed.tasks.separation import separate_bands, separate_instances


def blobs(seed, shape, *, smooth):
    """Probabilities of background, inside and border that make objects of odd shapes."""
    rng = np.random.default_rng(seed)
    noise = [scipy.ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(3)]
    logits = np.stack(noise, -1) / np.std(noise) * 3
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def in_bands(whole, cuts):
    return np.split(whole, sorted(cuts))


def assert_same_objects(one, other):
    """Equal up to the numbers."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert ((pairs[0] == 0) == (pairs[1] == 0)).all()


@hypothesis.given(
    st.integers(0, 10**6),
    st.sampled_from([1.0, 2.0, 5.0]),
    st.lists(st.integers(1, 699), max_size=8, unique=True),
)
@hypothesis.settings(deadline=None, max_examples=25)
def test_objects_of_bands_are_those_of_the_whole(seed, smooth, cuts):
    whole = blobs(seed, (700, 40), smooth=smooth)
    rows = list(separate_bands(iter(in_bands(whole, cuts)), tallest=10**6))
    assert_same_objects(np.concatenate(rows), separate_instances(whole))


def test_memory_holds_few_rows_and_a_taller_object_is_cut():
    whole = np.zeros((4000, 8, 3), np.float32)
    whole[..., 0] = 1
    whole[50:3900, 2:5] = [0, 1, 0]  # goes on and on
    whole[60:70, 6:8] = [0, 1, 0]
    taken = given = 0

    def bands():
        nonlocal taken
        for start in range(0, 4000, 100):
            taken += 100
            yield whole[start : start + 100]

    found = []
    for rows in separate_bands(bands(), tallest=500):
        found.append(rows)
        given += len(rows)
        assert taken - given <= 500 + 300
    found = np.concatenate(found)
    assert len(found) == 4000
    assert ((found > 0) == (whole[..., 1] > 0)).all()
    numbers = np.unique(found[50:3900, 2:5])
    assert 3850 / 800 <= len(numbers) <= 3850 / 500 + 1
    assert len(np.unique(found[60:70, 6:8])) == 1
    assert not np.isin(found[60, 6], numbers)


def test_a_taller_object_cuts_no_other():
    whole = np.zeros((600, 60, 3), np.float32)
    whole[..., 0] = 1
    whole[20:580, 2:6] = (0, 1, 0)  # taller than may be waited for
    for row in range(4, 580, 11):
        whole[row : row + 9, 20:29] = (0, 1, 0)
    found = np.concatenate(
        list(separate_bands(iter(in_bands(whole, range(64, 600, 64))), tallest=100))
    )
    assert_same_objects(found[:, 15:], separate_instances(whole)[:, 15:])
    assert len(np.unique(found[:, :10])) > 2, "the tall one is cut"
