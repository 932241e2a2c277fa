"""Whether an image is of the kind that a network was trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from sklearn.covariance import LedoitWolf

FALSE_ALARMS = 0.05
"""Share of cases like those of the validation part that would be called unfamiliar, at most."""

Windows: TypeAlias = Sequence[Float[np.ndarray, "windows features"]]
"""Features of cases, of each a line a window of the network's input."""


@dataclasses.dataclass(frozen=True)
class Familiarity:
    """Mahalanobis distance to the training cases in the space of a layer's features.

    A Gaussian of all classes together, with a shrunken covariance, as there may be more features
    than cases. What the network is sure of plays no part: it may be sure of anything. Sources: Lee
    et al. 2018 (arXiv 1807.03888); of all classes together Kamoi & Kobayashi 2020 (arXiv
    2003.00402); Ledoit & Wolf 2004 (doi 10.1016/S0047-259X(03)00096-4).

    An image larger than the network's input has features of several windows, and as its distance
    the root of the mean of theirs squared. That of their mean would be small for every large image:
    what differs between windows is averaged away, whatever they show.

    Attributes:
        mean: (features,) of the windows of training cases.
        precision: (features, features), the inverse of their covariance.
        threshold: distance beyond which an image is called unfamiliar.
    """

    mean: Float[np.ndarray, " features"]
    precision: Float[np.ndarray, "features features"]
    threshold: float

    @classmethod
    def fit(
        cls, train: Windows, held_out: Windows, *, false_alarms: float = FALSE_ALARMS
    ) -> Familiarity:
        """Fit the Gaussian to training cases, and choose the threshold on others of their kind.

        Args:
            train: features of training cases, of each (windows, features).
            held_out: of cases that were not trained on, to which the network is less used.
            false_alarms: share of new cases of their kind that is beyond the threshold, at most, as
                of conformal prediction (`jaxmed.evaluation.conformal`); of fewer than
                1 / false_alarms - 1 cases the threshold is the farthest, and promises less.
        """
        gaussian = LedoitWolf().fit(np.concatenate(train).astype(np.float64))
        found = cls(gaussian.location_, gaussian.get_precision(), np.inf)
        distances = np.sort(found.distance(held_out))
        place = min(math.ceil((len(distances) + 1) * (1 - false_alarms)), len(distances))
        return dataclasses.replace(found, threshold=float(distances[place - 1]))

    def distance(self, cases: Windows) -> Float[np.ndarray, " cases"]:
        """Of each case, in standard deviations of the training cases along its direction."""
        return np.array([self._distance(case) for case in cases])

    def _distance(self, windows: Float[np.ndarray, "windows features"]) -> float:
        away = windows.astype(np.float64) - self.mean
        squares = np.einsum("wi,ij,wj->w", away, self.precision, away, optimize=True)
        return float(np.sqrt(max(squares.mean(), 0.0)))

    def is_unfamiliar(self, cases: Windows) -> Bool[np.ndarray, " cases"]:
        """Whether each case is beyond the threshold."""
        return self.distance(cases) > self.threshold
