"""What a case becomes before the network sees it, and what of its mirror images it does see."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import prepared_experiment

from jaxmed.build.forward import make_forward
from jaxmed.build.preparation import Prepare
from jaxmed.data.sources.base import make_example
from jaxmed.training.state import network_variables


def test_padding_does_not_count_in_an_image_s_own_statistics():
    rng = np.random.default_rng(0)
    image = rng.normal(5, 2, (40, 20, 1)).astype(np.float32)
    prepare = Prepare(channels=1, size=(40, 40), fit="pad", normalization="zscore")
    prepared = prepare(make_example(image, index=0))["image"]
    assert prepared.shape == (40, 40, 1)
    inside = prepared[:, 10:30]
    np.testing.assert_allclose([inside.mean(), inside.std()], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(prepared[:, :10], inside.min())


def forward_of(experiment):
    own = experiment.config, experiment.info, experiment.model, experiment.task
    return make_forward(*own, ensemble=False, uncertain=False)


@pytest.mark.parametrize(("given", "mirrored"), [((), [(), (2,)]), ((0,), [(), (1,)])])
def test_predictions_are_averaged_over_the_mirrorings_of_training_only(given, mirrored):
    settings = {"augmentation.flip_axes": given}
    plain, source, _ = prepared_experiment("segmentation", **settings)
    both, _, _ = prepared_experiment("segmentation", **settings, **{"evaluation.flips": True})
    state = plain.fresh_state(plain.lift())
    variables = network_variables(plain.lift().global_state(state))
    batch = {"image": jnp.asarray(source[0]["image"], jnp.float32)[None]}

    def predict(axes):
        image = jnp.flip(batch["image"], axes)
        return jnp.flip(forward_of(plain)(variables, {}, {**batch, "image": image}), axes)

    expected = sum(predict(axes) for axes in mirrored) / len(mirrored)
    found = forward_of(both)(variables, {}, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert float(jnp.abs(found - predict(())).max()) > 1e-4
