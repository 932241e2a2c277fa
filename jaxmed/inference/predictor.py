"""Predict whole cases with a network whose input has one shape."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.inference.sliding_window import Blend, extract, window_regions
from jaxmed.types import Example, NotFiniteError, Region

Forward = Callable[[dict[str, np.ndarray]], Any]


def check_finite(prediction: Any, where: str = "") -> Any:
    """The prediction of one case, if it is made of numbers.

    Args:
        prediction: any pytree.
        where: the case, for the error.

    Raises:
        NotFiniteError: it holds NaN.
    """
    if any(np.isnan(array).any() for array in jax.tree.leaves(prediction)):
        raise NotFiniteError(
            f"{where + ': ' if where else ''}the network predicts what is no number (NaN): where "
            "others fare alike, its training diverged (lower optimizer.learning_rate); where they "
            "do not, the image holds extreme values"
        )
    return prediction


class Pace:
    """Says every half a minute how far a case is that takes long.

    Args:
        clock: seconds.
    """

    EVERY = 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._done = math.inf  # what comes first is another case
        self._begun, self._told = (0, 0.0), 0.0

    def __call__(self, done: int, total: int) -> None:
        """Note that so many windows of a case are done, of as many as it has."""
        now = self._clock()
        if done <= self._done:  # another case
            self._begun, self._told = (done, now), now
        self._done = done
        if done >= total or now - self._told < self.EVERY:
            return
        self._told = now
        before, since = self._begun
        left = (total - done) * (now - since) / (done - before)
        print(f"  {done} of {total} windows, about {math.ceil(left / 60)} min to go", flush=True)


class Predictor:
    """Cuts cases into windows, fills batches with windows of several cases, puts results together.

    All batches have one shape, so the network is compiled once. Classification and detection see
    an image as one window; predictions of a segmentation are blended.

    Args:
        forward: batch of `image` (batch_size, *window, channels) -> predictions with a batch axis:
            an array (batch_size, *window, classes) where `blend`, any pytree otherwise.
        window: spatial shape that the network was built for.
        batch_size: windows a batch.
        blend: whether predictions are dense and to be blended over windows.
        overlap: share of a window that neighbours have in common.
        fill: what a window sees beyond the image.

    Attributes:
        watch: called after each batch with how many windows of the last case in it are done, and
            how many it has.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        window: Sequence[int],
        batch_size: int,
        blend: bool,
        overlap: float = 0.5,
        fill: float = 0.0,
    ):
        self.forward = forward
        self.window = tuple(window)
        self.batch_size = batch_size
        self.blend = blend
        self.overlap = overlap
        self.fill = fill
        self.watch: Callable[[int, int], None] = lambda done, total: None

    def __call__(self, examples: Iterable[Example]) -> Iterator[tuple[Example, Any]]:
        """Yield each preprocessed example with its prediction on the same grid, in order.

        Raises:
            ValueError: where an image that must be one window has another shape.
        """
        waiting: list[_Case] = []
        queue: list[tuple[_Case, Region]] = []
        for example in examples:
            case = _Case(example["image"], self._regions(example["image"].shape[:-1]), example)
            waiting.append(case)
            queue += [(case, region) for region in case.regions]
            while len(queue) >= self.batch_size:
                self._run(queue[: self.batch_size])
                del queue[: self.batch_size]
            while waiting and waiting[0].done:
                yield waiting.pop(0).result()
        if queue:
            self._run(queue)
        while waiting:
            yield waiting.pop(0).result()

    def bands(self, image: Any) -> Iterator[np.ndarray]:
        """Yield the blended prediction of one image from its first rows to its last.

        The image and the prediction need not fit the memory. All bands together are what
        `__call__` gives for the image.

        Args:
            image: (*spatial, channels), an array or a `BandedImage`.
        """
        case = _Case(image, self._regions(image.shape[:-1]), {}, rows=self.window[0])
        for start in range(0, len(case.regions), self.batch_size):
            batch = case.regions[start : start + self.batch_size]
            self._run([(case, region) for region in batch])
            while case.finished:
                yield check_finite(case.finished.pop(0))
        yield check_finite(case.result()[1])

    def _regions(self, shape: Sequence[int]) -> list[Region]:
        if self.blend:
            return window_regions(shape, self.window, overlap=self.overlap)
        if tuple(shape) != self.window:
            raise ValueError(f"image has shape {tuple(shape)}; the network takes {self.window}")
        return [tuple(slice(0, n) for n in shape)]

    def _run(self, queue: Sequence[tuple[_Case, Region]]) -> None:
        images = np.stack([extract(case.image, region, fill=self.fill) for case, region in queue])
        # The last batch is filled up, so that its shape is the others'.
        padding = [(0, self.batch_size - len(queue))] + [(0, 0)] * (images.ndim - 1)
        predictions = jax.device_get(self.forward({"image": np.pad(images, padding)}))
        for i, (case, region) in enumerate(queue):
            case.add(region, jax.tree.map(lambda x, i=i: x[i], predictions), blend=self.blend)
        last = queue[-1][0]
        self.watch(len(last.regions) - last.missing, len(last.regions))


class _Case:
    """One case on its way: what of it is still to be predicted.

    With `rows`, only so many of the prediction are held; those before them become `finished`.
    """

    def __init__(
        self, image: Any, regions: list[Region], example: Example, *, rows: int | None = None
    ):
        self.image = image
        self.example = example
        self.finished: list[np.ndarray] = []
        self._rows = rows
        self.regions = regions
        self.missing = len(regions)
        self._blend: Blend | None = None
        self._whole: Any = None

    @property
    def done(self) -> bool:
        return self.missing == 0

    def add(self, region: Region, prediction: Any, *, blend: bool) -> None:
        self.missing -= 1
        if not blend:
            self._whole = prediction
            return
        if self._blend is None:
            shape = self.image.shape[:-1]
            self._blend = Blend(shape, prediction.shape[-1], rows=self._rows)
        if self._rows is not None and region[0].start > self._blend.first:
            self.finished.append(self._blend.take(region[0].start))
        self._blend.add(region, prediction)

    def result(self) -> tuple[Example, Any]:
        return self.example, self._whole if self._blend is None else self._blend.result()
