import numpy as np
import pytest

from jaxmed.preprocessing.intensity import NORMALIZATIONS, percentile, value_range, window, zscore
from jaxmed.types import UserError

# A float32 mean of many equal large values differs from the value by rounding.
CONSTANTS = [(np.uint8, 0), (np.uint8, 200), (np.int16, -1024), (np.float32, 123456.789)]


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize(("dtype", "value"), CONSTANTS)
def test_constant_images_stay_finite(name, dtype, value):
    image = np.full((50, 40, 2), value, dtype)
    scaled = NORMALIZATIONS[name]({"image": image})["image"]
    assert scaled.dtype == np.float32
    assert scaled.shape == image.shape
    assert np.isfinite(scaled).all()
    if name in ("zscore", "percentile"):
        assert (scaled == 0).all()
    assert image.dtype == dtype
    assert (image == image[0, 0, 0]).all()  # the input is not written to


@pytest.mark.parametrize("shape", [(20, 30, 3), (8, 9, 10, 2)])
def test_zscore_a_channel(shape):
    image = np.random.default_rng(0).normal(1e5, 20, shape).astype(np.float32)
    scaled = zscore({"image": image, "label": np.asarray(1)})
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(scaled["image"].mean(axes), 0, atol=1e-4)
    np.testing.assert_allclose(scaled["image"].std(axes), 1, atol=1e-4)
    assert scaled["label"] == 1


def test_zscore_of_the_foreground():
    image = np.zeros((10, 10, 1), np.float32)
    image[2:5, 2:5, 0] = np.arange(1, 10).reshape(3, 3)
    scaled = zscore({"image": image}, foreground=True)["image"]
    inside = scaled[2:5, 2:5]
    np.testing.assert_allclose([inside.mean(), inside.std()], [0, 1], atol=1e-6)
    assert np.abs(scaled).sum() == pytest.approx(np.abs(inside).sum())


def test_percentiles_resist_a_bright_voxel():
    image = np.random.default_rng(0).uniform(0, 100, (64, 64, 1)).astype(np.float32)
    image[0, 0] = 1.7e6
    scaled = percentile({"image": image})["image"]
    assert scaled.min() == 0
    assert scaled.max() == 1
    assert scaled.mean() == pytest.approx(0.5, abs=0.02)


def test_window_and_range():
    hounsfield = np.asarray([-1000, -160, 40, 240, 3000], np.int16).reshape(1, 5, 1)
    scaled = window({"image": hounsfield}, level=40.0, width=400.0)["image"]
    np.testing.assert_allclose(scaled.ravel(), [0, 0, 0.5, 1, 1])
    grey = np.asarray([10, 255], np.uint8).reshape(1, 2, 1)
    scaled = value_range({"image": grey})["image"].ravel()
    np.testing.assert_allclose(scaled, [20 / 255 - 1, 1], rtol=1e-5)
    scaled = value_range({"image": hounsfield})["image"]
    assert (scaled.min(), scaled.max()) == (-1, 1)


def test_mistakes_are_named():
    example = {"image": np.zeros((2, 2, 1), np.float32)}
    with pytest.raises(UserError, match="percentiles 99.0 to 1.0"):
        percentile(example, low=99.0, high=1.0)
    with pytest.raises(UserError, match="width is 0.0"):
        window(example, width=0.0)
