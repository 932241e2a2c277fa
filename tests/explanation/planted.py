"""CT-like sections of which half hold a bright planted lesion, and a classifier of them.

The phantoms' own lesions come with look-alikes elsewhere whose absence tells as much, so that of
them nobody knows what a classifier goes by. Of a lesion planted at random it is known.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.models.resnet import ResNet, ResNetBackbone

SIDE = 48


def planted_lesions(count, *, ndim=2, side=SIDE):
    """Images (count, *spatial, 1) about 0, labels, and where the lesions are."""
    source = Phantoms("body", task="classification", ndim=ndim, size=side, count=count)
    rng = np.random.default_rng(0)
    images, labels, causes = [], [], []
    for row in range(count):
        scene = source.draw(row)
        image = np.clip(scene.image / 200.0, -1, 2).astype(np.float32)
        cause = np.zeros(image.shape, bool)
        if row % 2:
            inside = ndimage.binary_erosion(scene.image > -200, iterations=side // 8)
            centre = rng.choice(np.argwhere(inside))
            grid = np.indices(image.shape).reshape(ndim, -1).T
            away = np.linalg.norm(grid - centre, axis=1).reshape(image.shape)
            cause = away < rng.uniform(4.0, 6.5)
            image = np.where(cause, 1.2 + 0.6 * np.cos(2 * away), image).astype(np.float32)
        images.append(image[..., None])
        labels.append(row % 2)
        causes.append(cause)
    return np.stack(images), np.array(labels), causes


def train_classifier(images, labels, others, other_labels, *, steps=250, batch=32):
    """A network, its variables, those that it began with, and its accuracy on the others."""
    model = ResNet(2, ResNetBackbone("resnet18", width=8, stem_strides=1))
    start = model.init(jax.random.key(0), jnp.asarray(images[:1]))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params, stats, state, x, y):
        def loss(params):
            logits, changed = model.apply(
                {"params": params, **stats}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats = start["params"], {"batch_stats": start["batch_stats"]}
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.choice(len(images), batch, replace=False)
        params, stats, state, _ = step(params, stats, state, images[rows], labels[rows])
    variables = {"params": params, **stats}
    logits = jax.jit(model.apply)(variables, jnp.asarray(others))
    return model, variables, start, float((np.asarray(logits).argmax(1) == other_labels).mean())
