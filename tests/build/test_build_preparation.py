import numpy as np

from jaxmed.build.preparation import Prepare
from jaxmed.data.sources.base import make_example


def test_padding_does_not_count_in_an_image_s_own_statistics():
    rng = np.random.default_rng(0)
    image = rng.normal(5, 2, (40, 20, 1)).astype(np.float32)
    prepare = Prepare(channels=1, size=(40, 40), fit="pad", normalization="zscore")
    prepared = prepare(make_example(image, index=0))["image"]
    assert prepared.shape == (40, 40, 1)
    inside = prepared[:, 10:30]
    np.testing.assert_allclose([inside.mean(), inside.std()], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(prepared[:, :10], inside.min())
