"""What is to be explained: one number of a network's outputs, as log-odds.

Softmax knows differences of logits only, so that of a class alone is no property of the network;
its log-odds are. They are the logit of the probability, and do not saturate where that does.

A target has two parts: a function of the outputs, which is compiled, and arrays that say which
class, box or region is meant, which are traced. One program then serves all cases and classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.boxes import clip_boxes, pairwise_iou

What = Mapping[str, Any]
"""Which class, box or region: arrays."""

Target = Callable[[Any, What], jax.Array]
"""Outputs of a network for one image, without a batch axis, and what is meant -> log-odds ()."""


def log_odds(
    logits: Float[Array, "*batch classes"], label: Any, *, multilabel: bool = False
) -> Float[Array, "*batch"]:
    """Logit of the probability of a class, under softmax or (`multilabel`) sigmoid.

    >>> float(log_odds(jnp.array([1.0, 3.0]), 1))
    2.0
    """
    own = jnp.take(logits, label, axis=-1)
    if multilabel:
        return own
    others = jnp.arange(logits.shape[-1]) != label
    return own - jax.nn.logsumexp(logits, axis=-1, where=others)


def class_target(outputs: Any, what: What) -> jax.Array:
    """Log-odds of the class `what["label"]` of an image."""
    return log_odds(outputs, what["label"])


def sign_target(outputs: Any, what: What) -> jax.Array:
    """The same where several classes may hold at once."""
    return log_odds(outputs, what["label"], multilabel=True)


def cell_target(outputs: Any, what: What) -> jax.Array:
    """Log-odds of the class `what["label"]` at the cell `what["cell"]` of a dense detector."""
    return outputs["logits"][what["cell"], what["label"]]


def region_target(outputs: Any, what: What) -> jax.Array:
    """Mean log-odds of the class `what["label"]` over the voxels of `what["region"]` (*spatial).

    After Vinogradova et al. 2020 (arXiv 2002.11434), who sum logits: of two regions the mean is
    comparable, the sum is not.
    """
    region = jnp.asarray(what["region"], jnp.float32)
    values = log_odds(outputs, what["label"])
    return (values * region).sum() / jnp.maximum(region.sum(), 1.0)


def cell_of_box(
    logits: np.ndarray, boxes: np.ndarray, box: np.ndarray, label: int, *, shape: tuple[int, ...]
) -> int:
    """The cell of a dense detector that gave a box, or of any other box comes nearest to it.

    It has the largest product of overlap and score, as in D-RISE (Petsiuk et al. 2021,
    arXiv 2006.03204, equation 4).

    Args:
        logits: (points, classes) of one image.
        boxes: (points, 2 * ndim), likewise.
        box: (2 * ndim,) on the same grid.
        label: its class.
        shape: spatial shape of the image.
    """
    clipped = clip_boxes(jnp.asarray(boxes), shape)
    overlap = pairwise_iou(jnp.asarray(box, jnp.float32)[None], clipped)[0]
    return int(jnp.argmax(overlap * jax.nn.sigmoid(jnp.asarray(logits)[:, label])))
