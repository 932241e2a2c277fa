"""Named cases of explanation: a map of one picture by a ResNet-18, compiled before."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxmed.benchmark import networks
from jaxmed.benchmark.timing import Work
from jaxmed.explanation.explainer import METHODS, Explainer, blurred_baseline
from jaxmed.explanation.layers import default_layer, list_layers
from jaxmed.explanation.targets import class_target
from jaxmed.models.resnet import ResNet, ResNetBackbone
from jaxmed.training.state import network_variables

SHAPE = (224, 224)


def _map_work(method: str) -> Work:
    # The usual stem for pictures of this size.
    model = ResNet(2, ResNetBackbone(stem_strides=4))
    image = np.random.default_rng(0).normal(size=(*SHAPE, 3)).astype(np.float32)
    variables = network_variables(networks.make_state(model, {"image": image[None]})[0])
    shape = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    layer = default_layer(list_layers(model, variables, shape))
    explainer = Explainer(model, class_target, layer=layer)
    what, blank = {"label": np.int32(0)}, blurred_baseline(image)
    explainer.attribute(method, variables, image, blank, what)  # compiles
    return Work(lambda: explainer.attribute(method, variables, image, blank, what), unit="maps")


EXPLANATION_CASES: dict[str, Callable[[], Work]] = {
    f"explain_{method}": functools.partial(_map_work, method) for method in METHODS
}
