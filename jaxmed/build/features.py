"""Features of cases, as a trained run makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from jaxmed.build import preparation
from jaxmed.build.explained import RunToExplain
from jaxmed.explanation.features import make_features
from jaxmed.explanation.layers import default_layer
from jaxmed.inference.sliding_window import extract, window_regions
from jaxmed.types import Example

_MOST_WINDOWS = 8
"""Of a case; a large volume would take as long as its prediction."""


class FeatureReader:
    """The means of a layer over the windows of cases, or over whole cases.

    Args:
        explained: the run, and which of its models.
    """

    def __init__(self, explained: RunToExplain):
        self._explained = explained
        self._config = explained.config
        self._fill = preparation.fill_value(explained.config)
        self.layer = explained.layer or default_layer(explained.layers)
        self._run = make_features(explained.model, self.layer)

    def __call__(self, examples: Iterable[Example]) -> Iterator[tuple[Example, np.ndarray]]:
        """Yield each preprocessed example with its features (channels,), in order."""
        for example, windows in self.windows(examples):
            yield example, windows.mean(axis=0)

    def windows(self, examples: Iterable[Example]) -> Iterator[tuple[Example, np.ndarray]]:
        """Yield each preprocessed example with those of its windows (windows, channels)."""
        size = self._config.evaluation.batch_size or self._config.data.batch_size
        cases: list[Example] = []
        parts: list[list[np.ndarray]] = []
        for example in examples:
            cases.append(example)
            parts.append(self._windows(example))
            if sum(map(len, parts)) >= size:
                yield from self._read(cases, parts, size)
                cases, parts = [], []
        yield from self._read(cases, parts, size)

    def _read(
        self, cases: list[Example], parts: list[list[np.ndarray]], size: int
    ) -> Iterator[tuple[Example, np.ndarray]]:
        queue = [image for part in parts for image in part]
        found = [
            values
            for start in range(0, len(queue), size)
            for values in self._batch(queue[start : start + size], size)
        ]
        ends = np.cumsum([len(part) for part in parts])
        for example, part, end in zip(cases, parts, ends, strict=True):
            yield example, np.stack(found[end - len(part) : end])

    def _windows(self, example: Example) -> list[np.ndarray]:
        image = example["image"]
        regions = window_regions(
            image.shape[:-1], preparation.input_shape(self._config), overlap=0.0
        )
        few = min(len(regions), _MOST_WINDOWS)
        chosen = np.linspace(0, len(regions) - 1, few).round().astype(int)
        return [extract(image, regions[i], fill=self._fill) for i in chosen]

    def _batch(self, images: list[np.ndarray], size: int) -> np.ndarray:
        # Filled up, so that all batches have one shape.
        batch = np.pad(np.stack(images), [(0, size - len(images))] + [(0, 0)] * images[0].ndim)
        seen = self._explained.normalize({"image": jnp.asarray(batch)})["image"]
        return np.asarray(self._run(self._explained.variables, seen))[: len(images)]
