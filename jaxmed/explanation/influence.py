"""What single examples do to a network: how much they pull at it, and for or against which others.

By gradients of the last layer, which a sum over all layers follows closely (Katharopoulos and
Fleuret 2018, arXiv 1803.00942, section 3.2) at the cost of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.types import Batch


def split_head(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a network's last layers, those with "head" in their names, and the rest.

    Raises:
        ValueError: where there are none.
    """
    head = {name: value for name, value in params.items() if "head" in name}
    if not head:
        raise ValueError(f"no layer with 'head' in its name among {', '.join(params)}")
    return head, {name: value for name, value in params.items() if name not in head}


def example_gradients(
    loss: Callable[[Any, Batch], jax.Array], head: Any, batch: Batch
) -> tuple[Float[Array, " batch"], Float[Array, "batch parameters"]]:
    """The loss of each example, and its gradient with respect to the head.

    Args:
        loss: (head, batch of one) -> (); jittable.
        head: parameters.
        batch: of examples, each treated by itself.
    """

    def one(example: Batch) -> tuple[jax.Array, jax.Array]:
        alone = jax.tree.map(lambda x: x[None], example)
        value, gradient = jax.value_and_grad(loss)(head, alone)
        return value, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

    return jax.vmap(one)(batch)


def influences(
    cases: Float[np.ndarray, "cases parameters"], training: Float[np.ndarray, "train parameters"]
) -> Float[np.ndarray, "cases train"]:
    """By how much a small step on each training example lowers the loss of each case.

    The product of their gradients (TracIn, Pruthi et al. 2020, arXiv 2002.08484, of the last
    checkpoint alone), a unit of learning rate. Above 0 the example supports the case; below, it
    opposes it.
    """
    return np.asarray(cases) @ np.asarray(training).T
