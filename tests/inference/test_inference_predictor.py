"""Sliding windows and the predictor: the identity stays the identity, batches have one shape."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxmed.inference.banded_image import BandedImage
from jaxmed.inference.predictor import Pace, Predictor, check_finite
from jaxmed.inference.sliding_window import Blend, extract, importance, window_regions
from jaxmed.preprocessing.patches import random_patch
from jaxmed.types import NotFiniteError


def example(index, shape, channels=2):
    rng = np.random.default_rng(index)
    return {
        "image": rng.normal(size=(*shape, channels)).astype(np.float32),
        "index": np.int32(index),
    }


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 16)), min_size=2, max_size=3),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_windows_cover_every_voxel_and_overlap_enough(sides, overlap):
    shape, window = zip(*sides, strict=True)
    regions = window_regions(shape, window, overlap=overlap)
    seen = np.zeros(shape, int)
    for region in regions:
        assert [s.stop - s.start for s in region] == list(window)
        seen[tuple(slice(max(0, s.start), s.stop) for s in region)] += 1
    assert seen.min() >= 1
    for axis, width in enumerate(window):
        starts = sorted({r[axis].start for r in regions})
        assert all(
            b - a <= max(1, width * (1 - overlap)) for a, b in zip(starts, starts[1:], strict=False)
        )


@pytest.mark.parametrize("shape", [(30, 41), (7, 30), (5, 6), (20, 9, 11), (3, 4, 30)])
def test_the_identity_over_windows_is_the_identity(shape):
    sizes = []

    def forward(batch):
        sizes.append(batch["image"].shape)
        return batch["image"]

    window = (8,) * len(shape)
    predictor = Predictor(forward, window=window, batch_size=4, blend=True)
    given = [example(i, shape) for i in range(3)]
    results = list(predictor(iter(given)))
    assert [int(e["index"]) for e, _ in results] == [0, 1, 2]
    for original, (_, predicted) in zip(given, results, strict=True):
        np.testing.assert_allclose(predicted, original["image"], atol=1e-5)
    assert set(sizes) == {(4, *window, 2)}, "one shape, so one compilation"


def test_whole_images_of_several_cases_share_batches():
    calls = []

    def forward(batch):
        calls.append(len(batch["image"]))
        return {"mean": batch["image"].mean((1, 2, 3))}

    predictor = Predictor(forward, window=(6, 6), batch_size=4, blend=False)
    given = [example(i, (6, 6)) for i in range(6)]
    results = list(predictor(iter(given)))
    assert calls == [4, 4]
    for original, (_, predicted) in zip(given, results, strict=True):
        np.testing.assert_allclose(predicted["mean"], original["image"].mean(), rtol=1e-4)


def test_an_image_of_the_wrong_shape_is_refused():
    predictor = Predictor(lambda b: b["image"], window=(6, 6), batch_size=2, blend=False)
    with pytest.raises(ValueError, match=r"\(5, 6\)"):
        list(predictor([example(0, (5, 6))]))


def test_cases_are_given_out_as_soon_as_they_are_done():
    taken = []

    def stream():
        for i in range(10):
            taken.append(i)
            yield example(i, (6, 6))

    predictor = Predictor(lambda b: b["image"], window=(6, 6), batch_size=2, blend=True)
    next(predictor(stream()))
    assert len(taken) == 2, "memory holds a batch, not the whole set"


def test_a_case_that_takes_long_is_told_of_now_and_then(capsys):
    now = [0.0]

    def forward(batch):
        now[0] += 20.0
        return batch["image"]

    predictor = Predictor(forward, window=(4, 4), batch_size=1, blend=True, overlap=0)
    predictor.watch = Pace(clock=lambda: now[0])
    list(predictor([example(0, (4, 20)), example(1, (4, 4)), example(2, (4, 16))]))
    assert capsys.readouterr().out.splitlines() == [
        "  3 of 5 windows, about 1 min to go",
        "  3 of 4 windows, about 1 min to go",
    ]


def test_padding_beyond_the_image_is_the_fill_value():
    part = extract(np.ones((3, 3, 1), np.float32), (slice(1, 5), slice(0, 3)), fill=7.0)
    np.testing.assert_array_equal(part[..., 0], [[1] * 3, [1] * 3, [7] * 3, [7] * 3])


@pytest.mark.parametrize("shape", [(5, 9), (8, 3), (1, 8), (7, 7)])
def test_a_small_image_is_predicted_where_it_was_trained_on(shape):
    given = {"image": np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)}
    trained = random_patch(given, shape=(8, 10), rng=np.random.default_rng(0), value=7.0)
    [region] = window_regions(shape, (8, 10))
    np.testing.assert_array_equal(extract(given["image"], region, fill=7.0), trained["image"])


def test_windows_count_most_in_their_middle():
    weight = importance((9, 9))
    assert weight.argmax() == 40
    assert weight.min() > 0
    np.testing.assert_allclose(weight, weight[::-1, ::-1])


def test_blend_is_a_weighted_mean():
    blend = Blend((4,), 1)
    blend.add((slice(0, 4),), np.full((4, 1), 1.0, np.float32))
    blend.add((slice(0, 4),), np.full((4, 1), 3.0, np.float32))
    np.testing.assert_allclose(blend.result(), 2.0)


@pytest.mark.parametrize("shape", [(130, 41), (7, 60), (5, 6), (61, 8), (9, 90)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_bands_are_the_whole_bit_for_bit(shape, overlap):
    def forward(batch):
        image = batch["image"]
        ramp = np.arange(12, dtype=np.float32)[:, None, None]
        return np.concatenate([image * ramp, image[:, ::-1]], -1)

    predictor = Predictor(
        forward, window=(12, 8), batch_size=5, blend=True, overlap=overlap, fill=3.0
    )
    given = example(0, shape)
    [(_, whole)] = predictor([given])
    read = []

    def rows(part):
        read.append(part)
        return given["image"][part]

    image = BandedImage(rows, given["image"].shape)
    bands = list(predictor.bands(image))
    np.testing.assert_array_equal(np.concatenate(bands), whole)
    assert max(map(len, bands)) <= 12
    assert sum(part.stop - part.start for part in read) == shape[0], "each row is read once"


def test_predictions_that_are_no_numbers_are_refused_one_by_one():
    """As of an image with extreme values; what fills up the last batch is nobody's."""
    predictor = Predictor(
        lambda batch: {"p": np.where(batch["image"].sum((1, 2)) > 0, 1.0, np.nan)},
        window=(4, 4),
        batch_size=3,
        blend=False,
    )
    ones, zeros = ({"image": np.full((4, 4, 1), x, np.float32)} for x in (1, 0))
    found = [prediction for _, prediction in predictor([ones, zeros, ones, ones])]
    for place in (0, 2, 3):
        assert check_finite(found[place]) is found[place]
    with pytest.raises(NotFiniteError, match=r"^case 1: .*NaN"):
        check_finite(found[1], "case 1")
    dense = Predictor(
        lambda batch: np.where(batch["image"] > 0, 1.0, np.nan),
        window=(4, 4),
        batch_size=3,
        blend=True,
    )
    with pytest.raises(NotFiniteError):
        list(dense.bands(np.zeros((9, 9, 1), np.float32)))
