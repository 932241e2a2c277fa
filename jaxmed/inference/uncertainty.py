"""How unsure a prediction is, and whether the data or the network are to blame."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def entropy(probabilities: Any, *, multilabel: bool = False) -> Any:
    """Entropy of predicted probabilities, from 0 (sure) to 1 (knows nothing).

    H(p) / log(classes), with H(p) = -sum p log p; of several labels at once the mean over them of
    the entropy of each. Works for arrays of NumPy and of JAX.

    Args:
        probabilities: (..., classes).
        multilabel: whether several classes may hold at once.

    Returns:
        (...).
    """
    xp: Any = np if isinstance(probabilities, np.ndarray) else jnp
    if multilabel:
        both = xp.stack([probabilities, 1 - probabilities], axis=-1)
        return entropy(both).mean(-1)
    p = xp.clip(probabilities, 1e-12, 1.0)
    classes = probabilities.shape[-1]
    return -(p * xp.log(p)).sum(-1) / np.log(classes) if classes > 1 else 0 * p[..., 0]


def split_uncertainty(
    prediction: np.ndarray, *, multilabel: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of a prediction of `Experiment.predictor(uncertain=True)`.

    Samples of the network are those of its models, mirrored views and dropout. The entropy of
    their mean is the mean of their entropies, which the image leaves open, and their mutual
    information, on which the samples disagree; it is 0 of a single one. Sources: Gal & Ghahramani
    2016 (arXiv 1506.02142), Depeweg et al. 2018 (arXiv 1710.07283).

    Args:
        prediction: (..., classes + 1): mean probabilities, and last the mean of the entropies.
        multilabel: as of `entropy`.

    Returns:
        probabilities (..., classes), their entropy (...) and the mutual information (...).
    """
    probabilities, expected = prediction[..., :-1], prediction[..., -1]
    total = np.asarray(entropy(probabilities, multilabel=multilabel))
    # Below 0 by rounding alone.
    return probabilities, total, np.asarray(np.maximum(total - expected, 0.0))
