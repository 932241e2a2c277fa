"""Segmentation: which voxels belong to what, by class or by instance?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmed.losses import cross_entropy, dice_loss, dice_statistics, ignore_invalid, label_weights
from jaxmed.metrics import instances, mean_scores
from jaxmed.metrics.segmentation import score_masks
from jaxmed.metrics.selection import area_under_risk
from jaxmed.metrics.voxels import mask_confidence, sample_voxels, score_voxels
from jaxmed.preprocessing.spatial import restore_mask, restore_probabilities
from jaxmed.tasks.separation import separate_bands, separate_instances
from jaxmed.types import Batch, Example, Row

OBSERVED = ("confidence", "voxel_probabilities", "voxel_labels")
"""What `Segmentation.observe` notes."""

INSTANCE_CLASSES = ("background", "inside", "border")
"""What the network learns of instance masks."""

SIZES = ("size/", "true_size/")
"""Measures of a case that are no scores of it: see `measure_sizes`."""


class Segmentation:
    """Semantic masks, or instance masks through their insides and borders.

    Of instances the network learns three classes: background, inside and border. Insides that do
    not touch are the seeds from which a watershed regrows the instances over all foreground
    (the scheme of Caicedo et al. 2019, doi 10.1002/cyto.a.23863).

    Args:
        class_names: with the background first.
        instances: whether masks hold instance numbers.
        class_weights: of the cross-entropy, one a class that the network learns.
        surface_scores: whether to compute `hd95` and `nsd`, which take time.
        nsd_tolerance: mm.
        smallest: voxels; smaller predicted instances are noise and dropped.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        instances: bool = False,
        class_weights: Sequence[float] | None = None,
        surface_scores: bool = True,
        nsd_tolerance: float = 1.0,
        smallest: int = 10,
    ):
        self.class_names = tuple(class_names)
        self.instances = instances
        self.class_weights = class_weights
        self.surface_scores = surface_scores
        self.nsd_tolerance = nsd_tolerance
        self.smallest = smallest

    main_score = "dice"

    @property
    def output_classes(self) -> tuple[str, ...]:
        """The classes of the network's output."""
        return INSTANCE_CLASSES if self.instances else self.class_names

    def loss(
        self,
        apply: Callable[..., tuple[Any, Any]],
        batch: Batch,
        *,
        key: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Cross-entropy plus soft Dice of the global batch (Isensee et al. 2021).

        With deep supervision, coarser outputs learn the mask at their own resolution, each with
        half the weight of the next finer one.
        """
        outputs, model_state = apply(batch["image"], key=key)
        labels = ignore_invalid(batch["mask"], batch["valid"])
        if self.instances:
            labels = instance_targets(labels)
        levels = outputs if isinstance(outputs, list) else [outputs]
        loss, weight = jnp.zeros(()), 0.0
        for i, logits in enumerate(levels):
            level_labels = shrink_labels(labels, logits.shape[1:-1])
            loss += 0.5**i * self._level_loss(logits, level_labels, total)
            weight += 0.5**i
        return loss / weight, {"model_state": model_state, "metrics": {}}

    def _level_loss(
        self, logits: jax.Array, labels: jax.Array, total: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        class_weights = None if self.class_weights is None else jnp.array(self.class_weights)
        losses = cross_entropy(logits, labels, class_weights=class_weights)
        weights = label_weights(labels, class_weights)
        entropy = total(losses.sum()) / jnp.maximum(total(weights.sum()), 1e-6)
        intersection, denominator = dice_statistics(jax.nn.softmax(logits), labels)
        return entropy + dice_loss(total(intersection.sum(0)), total(denominator.sum(0)))

    def predict(self, outputs: Any, batch: Batch) -> jax.Array:
        """Probabilities (batch, *spatial, classes)."""
        return jax.nn.softmax(outputs)

    def combine(self, predictions: jax.Array) -> jax.Array:
        """The mean over models: (models, batch, *spatial, classes) -> without the first axis."""
        return predictions.mean(0)

    def restore(self, prediction: Any, example: Example) -> np.ndarray:
        """Mask (*spatial) int32 in the file's own grid: classes, or instance numbers."""
        predicted = np.asarray(prediction)
        if self.instances:
            predicted = separate_instances(predicted, smallest=self.smallest)
        return restore_mask(
            predicted,
            scale=example["scale"],
            offset=example["offset"],
            shape=example["shape"].tolist(),
        )

    def restore_probabilities(self, prediction: Any, example: Example) -> np.ndarray:
        """(*spatial, `output_classes`) float32 in the file's own grid."""
        return restore_probabilities(
            np.asarray(prediction),
            scale=example["scale"],
            offset=example["offset"],
            shape=example["shape"].tolist(),
        )

    def restore_bands(self, bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same of an image on its file's own grid, from its first rows to its last.

        Args:
            bands: probabilities (rows, *spatial, classes).

        Yields:
            (rows, *spatial) int32, of other rows than came in. Instances have other numbers than
            `restore` gives them, and very tall ones are cut; see `separate_bands`.
        """
        if self.instances:
            yield from separate_bands(bands, smallest=self.smallest)
            return
        for band in bands:
            yield band.argmax(-1).astype(np.int32)

    def observe(self, prediction: Any, example: Example) -> Row:
        """How sure the mask is, and a sample of its voxels' probabilities of `output_classes`."""
        said = np.asarray(prediction)
        noted: Row = {"confidence": mask_confidence(said)}
        if "mask" in example:
            truth = np.asarray(example["mask"])
            if self.instances:
                truth = np.asarray(instance_targets(jnp.asarray(truth[None]))[0])
            noted |= sample_voxels(said, truth, seed=int(example["index"]))
        return noted

    def score(self, prediction: Any, example: Example) -> Row:
        """Overlap and surface scores of one case; of instances also those that count objects."""
        truth = example["mask"]
        row: Row = {}
        if self.instances:
            row.update(instances.score_instances(prediction, truth))
            prediction, truth = (prediction > 0) * 1, np.where(truth > 0, 1, truth)
        row.update(
            score_masks(
                prediction,
                truth,
                class_names=self.class_names,
                spacing=example["spacing"],
                tolerance=self.nsd_tolerance,
                surfaces=self.surface_scores,
            )
        )
        row.update(measure_sizes(prediction, truth, example["spacing"], self.class_names))
        row.update({name: example[name] for name in OBSERVED if name in example})
        if "voxel_labels" in row:
            row.update(score_voxels(row["voxel_probabilities"], row["voxel_labels"]))
        return row

    def describe(self, row: Row) -> dict[str, float | str]:
        """All scores of the case; it is ranked by Dice."""
        numbers = {k: float(v) for k, v in row.items() if np.ndim(v) == 0}
        return {"score": float(row["dice"]), **numbers}

    def summarize(self, rows: Sequence[Row], *, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Weighted mean of each score over the cases that have it; sizes are no scores.

        And `aurc`, the area under the curve of 1 - dice over the share of masks that are taken, the
        surest first (Geifman and El-Yaniv 2017), where it is known how sure they are.
        """
        left_out = (*SIZES, "confidence")
        scores = [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]
        found = mean_scores(scores, weights=weights)
        known = np.array(["confidence" in row and np.isfinite(row["dice"]) for row in rows], bool)
        if known.any():
            pairs = [
                (r["confidence"], 1 - r["dice"]) for r, k in zip(rows, known, strict=True) if k
            ]
            confidence, loss = np.array(pairs, np.float64).T
            found["aurc"] = area_under_risk(confidence, loss, weights=weights[:, known])
        return found


def measure_sizes(
    prediction: np.ndarray, truth: np.ndarray, spacing: np.ndarray, class_names: Sequence[str]
) -> dict[str, float]:
    """Volume (of images area) of each foreground class, predicted and true.

    In mm^ndim, or voxels where the spacing is unknown (1); voxels whose truth is -1 do not count.
    """
    voxel = float(np.prod(np.asarray(spacing, np.float64)))
    known = truth >= 0
    masks = {"size": prediction, "true_size": truth}
    return {
        f"{kind}/{name}": voxel * int((known & (mask == c)).sum())
        for c, name in enumerate(class_names)
        if c
        for kind, mask in masks.items()
    }


def instance_targets(mask: Int[Array, " batch *spatial"]) -> Int[Array, " batch *spatial"]:
    """Instance numbers -> 0 background, 1 inside, 2 border; -1 stays.

    The border of an instance are its voxels that touch another instance or the background, here
    or diagonally; beside an ignored voxel, or the edge of the image, there is none.
    """
    window = (1,) + (3,) * (mask.ndim - 1)
    ones = (1,) * mask.ndim
    least, most = jnp.iinfo(mask.dtype).min, jnp.iinfo(mask.dtype).max
    highest, lowest = (
        jax.lax.reduce_window(jnp.where(mask < 0, start, mask), start, choose, window, ones, "SAME")
        for start, choose in ((least, jax.lax.max), (most, jax.lax.min))
    )
    border = (highest != mask) | (lowest != mask)
    return jnp.where(mask > 0, jnp.where(border, 2, 1), mask)


def shrink_labels(labels: Int[Array, " batch *spatial"], shape: Sequence[int]) -> jax.Array:
    """Every n-th voxel of a mask, so that it fits coarser logits."""
    steps = [n // m for n, m in zip(labels.shape[1:], shape, strict=True)]
    return labels[(slice(None), *(slice(step // 2, None, step) for step in steps))]
