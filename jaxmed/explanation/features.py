"""Features of a layer: what a network makes of a set of cases, and which of them are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxmed.explanation.layers import Layer, apply_and_add


def make_features(model: nn.Module, layer: Layer) -> Callable[[Any, jax.Array], jax.Array]:
    """A jitted function `(variables, images) -> (batch, channels)`, the means of a layer.

    Args:
        model: the network.
        layer: of `jaxmed.explanation.layers.list_layers`; its batch size does not matter.
    """

    @jax.jit
    def features(variables: Any, images: jax.Array) -> jax.Array:
        zero = jnp.zeros((), layer.dtype)
        _, found = apply_and_add(model, variables, images, layer.name, zero)
        return found.astype(jnp.float32).mean(tuple(range(1, found.ndim - 1)))

    return features


def principal_components(
    fitted: np.ndarray, *others: np.ndarray, components: int = 2
) -> tuple[list[np.ndarray], np.ndarray]:
    """Places of cases on the principal components of the first set, each feature scaled to one.

    Args:
        fitted: (cases, features) that the components are fitted to.
        *others: more cases, which are only placed.
        components: number of them; fewer where there are not so many cases or features.

    Returns:
        places (cases, components) of each set, and the share of the variance a component.
    """
    components = min(components, *fitted.shape)
    scale = StandardScaler().fit(fitted)
    pca = PCA(components, svd_solver="full").fit(scale.transform(fitted))
    places = [pca.transform(scale.transform(x)) for x in (fitted, *others)]
    return places, pca.explained_variance_ratio_


def nearest_cases(
    known: np.ndarray, asked: np.ndarray, *, count: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """The cases of `known` most like each of `asked`: "it looks like these".

    Distances are Euclidean, each feature scaled by its deviation over `known`.

    Returns:
        rows of `known` (asked, count), the nearest first, and their distances.
    """
    scale = StandardScaler().fit(known)
    neighbours = NearestNeighbors(n_neighbors=min(count, len(known))).fit(scale.transform(known))
    distances, rows = neighbours.kneighbors(scale.transform(asked))
    return rows, distances


def linear_probe(
    known: np.ndarray, labels: Sequence[int], asked: np.ndarray, *, classes: int
) -> np.ndarray:
    """Probabilities by a logistic regression of labels on features (Alain & Bengio 2016).

    Args:
        known: (cases, features) to fit to.
        labels: one a case.
        asked: (cases, features) to be classified.
        classes: number of them; a class without a case in `known` gets 0.

    Returns:
        (asked, classes).

    Raises:
        ValueError: the known cases are all of one class.
    """
    regression = LogisticRegression(max_iter=2000)
    fitted = make_pipeline(StandardScaler(), regression).fit(known, np.asarray(labels))
    probabilities = np.zeros((len(asked), classes), np.float32)
    probabilities[:, regression.classes_] = fitted.predict_proba(asked)
    return probabilities
