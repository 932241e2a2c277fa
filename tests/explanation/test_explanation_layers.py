import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.explanation.grad_cam import grad_cam, grad_cam_plus, hires_cam
from jaxmed.explanation.layers import apply_and_add, default_layer, find_layer, list_layers
from jaxmed.models.detector import Detector
from jaxmed.models.resnet import ResNet, ResNetBackbone
from jaxmed.models.unet import UNet
from jaxmed.types import UserError

BACKBONE = ResNetBackbone("resnet18", width=4, stem_strides=2)


@pytest.fixture(scope="module")
def resnet():
    model = ResNet(2, BACKBONE)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))
    return model, model.init(jax.random.key(0), images), images


def test_the_default_layer_is_the_one_that_the_classifier_averages(resnet):
    model, variables, images = resnet
    layer = default_layer(list_layers(model, variables, images))
    assert layer.name == "backbone/stage3_block1"
    assert layer.shape == (2, 2, 2, 32)
    outputs, features = apply_and_add(model, variables, images, layer.name, jnp.zeros(()))
    np.testing.assert_allclose(outputs, model.apply(variables, images), rtol=1e-5)
    head = variables["params"]["head"]
    own = features.mean((1, 2)) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(own, outputs, rtol=1e-4, atol=1e-5)


def test_adding_to_a_layer_adds_to_what_follows(resnet):
    model, variables, images = resnet
    layer = default_layer(list_layers(model, variables, images))
    outputs, _ = apply_and_add(model, variables, images, layer.name, jnp.ones(()))
    kernel = variables["params"]["head"]["kernel"]
    difference = outputs - model.apply(variables, images)
    np.testing.assert_allclose(difference, np.tile(kernel.sum(0), (2, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_other_networks_have_their_bottom_and_their_pyramid(ndim):
    images = jnp.zeros((1, *(32,) * ndim, 1))
    unet = UNet(2, features=(4, 8, 8))
    layers = list_layers(unet, unet.init(jax.random.key(0), images), images)
    assert default_layer(layers).name == "encoder2"
    detector = Detector(2, BACKBONE, levels=(1, 2), features=8)
    layers = list_layers(detector, detector.init(jax.random.key(0), images), images)
    assert "class0#2" in {layer.name for layer in layers}  # the second level's run of the head
    assert default_layer(layers, grid=(8,) * ndim).name == "smooth1"


def test_a_mistyped_layer_is_told(resnet):
    with pytest.raises(UserError, match="did you mean backbone/stage3_block1"):
        find_layer(list_layers(*resnet), "backbone/stage3_blok1")


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8)])
def test_grad_cam_is_where_the_feature_is_that_counts(shape):
    features = np.zeros((1, *(4,) * len(shape), 3), np.float32)
    place = (0, *(1,) * len(shape))
    features[(*place, 1)] = 5  # counts
    features[(0, *(3,) * len(shape), 2)] = 9  # speaks against it

    def score(added):
        seen = features + added
        total = seen.sum(tuple(range(seen.ndim - 1)))
        return (total * jnp.array([0.0, 1.0, -1.0])).sum(), jnp.asarray(features)

    for method in (grad_cam, grad_cam_plus, hires_cam):
        found = method(score, (features.shape, jnp.float32), shape=shape)
        assert found.shape == shape and (found >= 0).all()
        place = np.unravel_index(int(found.argmax()), shape)
        assert all(index in (2, 3) for index in place)
        assert found[(-1,) * len(shape)] == 0
