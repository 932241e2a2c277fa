"""Normalising parts by gathered statistics is normalising the whole."""

import numpy as np
import pytest

from jaxmed.preprocessing import intensity
from jaxmed.preprocessing.gathered import normalization_of_whole


@pytest.mark.parametrize("name", intensity.NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("size", [(37, 23), (1300, 1000)])
def test_parts_are_normalised_as_the_whole(name, dtype, size):
    rng = np.random.default_rng(0)
    image = (rng.normal(size=(*size, 3)) * [10, 20, 0] + 100).astype(dtype)
    whole = intensity.NORMALIZATIONS[name]({"image": image})["image"]
    bands = [image[i : i + 9] for i in range(0, size[0], 9)]
    normalize = normalization_of_whole(name, lambda: bands, pixels=size[0] * size[1])
    parts = np.concatenate([normalize({"image": band})["image"] for band in bands])
    assert parts.dtype == whole.dtype
    if name == "zscore":
        np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(parts, whole)


def test_a_large_offset_does_not_cost_the_digits_of_the_deviation():
    rng = np.random.default_rng(0)
    image = (1e7 + rng.normal(size=(100, 30, 1))).astype(np.float32)
    bands = [image[i : i + 7] for i in range(0, 100, 7)]
    normalize = normalization_of_whole("zscore", lambda: bands, pixels=3000)
    whole = intensity.zscore({"image": image})["image"]
    np.testing.assert_allclose(normalize({"image": image})["image"], whole, rtol=1e-5, atol=1e-5)


def test_a_window_needs_no_pass():
    normalize = normalization_of_whole("window", lambda: 1 / 0, pixels=1, level=0.0, width=2.0)
    np.testing.assert_allclose(normalize({"image": np.zeros((1, 1, 1))})["image"], 0.5)
