"""How unsure the last layer of a classifier is of its own weights (Laplace approximation).

About the trained weights the posterior of the last dense layer is taken to be normal, its precision
the generalised Gauss-Newton matrix of the log-likelihood, as a Kronecker product, plus that of the
prior (Ritter et al. 2018, ICLR; Daxberger et al. 2021, arXiv 2106.14806). Far from what was trained
on, features are such as the posterior knows nothing of, and the logits' variance grows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.special
from jaxtyping import Float, Integer

PRIOR_PRECISIONS = tuple(float(t) for t in np.logspace(-3, 4, 29))
"""Among which `LastLayer.tune` chooses."""

PAIRS = 256
"""Of draws, over which predictions are averaged."""


@dataclasses.dataclass(frozen=True)
class LastLayer:
    """The posterior of a dense layer, by the eigenvectors of both Kronecker factors.

    Attributes:
        feature_axes: (features + 1, features + 1) in columns; the last feature is the bias's 1.
        feature_values: eigenvalues of the sum of the features' outer products.
        class_axes: (classes, classes) in columns.
        class_values: eigenvalues of the mean of diag(p) - p p^T.
        prior_precision: of every weight.
    """

    feature_axes: Float[np.ndarray, "features features"]
    feature_values: Float[np.ndarray, " features"]
    class_axes: Float[np.ndarray, "classes classes"]
    class_values: Float[np.ndarray, " classes"]
    prior_precision: float = 1.0

    @classmethod
    def of(
        cls,
        features: Float[np.ndarray, "cases features"],
        logits: Float[np.ndarray, "cases classes"],
        *,
        prior_precision: float = 1.0,
    ) -> LastLayer:
        """The posterior, from the cases that the layer was trained on.

        Args:
            features: what the layer is given.
            logits: what it makes of them.
            prior_precision: of every weight.
        """
        inputs, said = _with_one(features), scipy.special.softmax(logits, axis=1)
        curvature = np.diag(said.mean(axis=0)) - said.T @ said / len(said)
        feature_values, feature_axes = np.linalg.eigh(inputs.T @ inputs)
        class_values, class_axes = np.linalg.eigh(curvature)
        return cls(
            feature_axes,
            np.maximum(feature_values, 0),
            class_axes,
            np.maximum(class_values, 0),
            prior_precision,
        )

    def tune(
        self,
        features: Float[np.ndarray, "cases features"],
        logits: Float[np.ndarray, "cases classes"],
        labels: Integer[np.ndarray, " cases"],
    ) -> LastLayer:
        """The same with the prior precision of the highest likelihood on cases of validation."""

        def loss(precision: float) -> float:
            tried = dataclasses.replace(self, prior_precision=precision)
            said = tried.predict(features, logits)[np.arange(len(labels)), labels]
            return -float(np.log(np.maximum(said, 1e-12)).mean())

        return dataclasses.replace(self, prior_precision=min(PRIOR_PRECISIONS, key=loss))

    def variances(
        self, features: Float[np.ndarray, "cases features"]
    ) -> Float[np.ndarray, "cases classes"]:
        """Of each logit under the posterior, less the mean of all logits.

        The data say nothing of that mean, which changes no probability.
        """
        axes = self.class_axes - self.class_axes.mean(axis=0)
        return self._along_axes(features) @ (axes**2).T

    def predict(
        self,
        features: Float[np.ndarray, "cases features"],
        logits: Float[np.ndarray, "cases classes"],
    ) -> Float[np.ndarray, "cases classes"]:
        """Probabilities, the mean over `2 * PAIRS` draws of the logits from the posterior.

        The draws are the same in every call, each with its mirror image about the logits.
        """
        spread = np.sqrt(self._along_axes(features))
        total = np.zeros(logits.shape)
        for drawn in np.random.default_rng(0).normal(size=(PAIRS, logits.shape[1])):
            change = (spread * drawn) @ self.class_axes.T
            total += scipy.special.softmax(logits + change, axis=1)
            total += scipy.special.softmax(logits - change, axis=1)
        return total / (2 * PAIRS)

    def _along_axes(self, features: np.ndarray) -> np.ndarray:
        """Variances of the logits along `class_axes`, in which they do not covary."""
        squares = (_with_one(features) @ self.feature_axes) ** 2
        precision = np.outer(self.feature_values, self.class_values) + self.prior_precision
        return squares @ (1 / precision)


def _with_one(features: np.ndarray) -> np.ndarray:
    """Features with the 1 that the bias is multiplied with."""
    return np.append(np.asarray(features, np.float64), np.ones((len(features), 1)), axis=1)
