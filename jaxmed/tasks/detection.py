"""Detection: where is each object, and what is it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.boxes import clip_boxes, fuse_boxes, nms
from jaxmed.losses import binary_cross_entropy, giou_loss
from jaxmed.metrics import detection as metrics
from jaxmed.preprocessing.spatial import restore_boxes
from jaxmed.tasks.assignment import assign
from jaxmed.types import Batch, Example, Row


class Detection:
    """Dense detection with assigned cells, and non-maximum suppression on the device.

    Args:
        class_names: kinds of object.
        box_weight: of the box loss beside the class loss.
        iou_threshold: overlap above which the lower-scored box of a class is dropped.
        max_detections: boxes kept an image.
        score_threshold: of the detections that `describe` counts; the scores of a set need none.
    """

    main_score = "ap50"

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        box_weight: float = 2.0,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
        score_threshold: float = 0.3,
    ):
        self.class_names = tuple(class_names)
        self.box_weight = box_weight
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.score_threshold = score_threshold

    def loss(
        self,
        apply: Callable[..., tuple[Any, Any]],
        batch: Batch,
        *,
        key: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Soft-target class loss and generalised-IoU box loss, over the sum of the targets.

        Both are divided by the summed target scores of the global batch (Feng et al. 2021,
        arXiv 2108.07755).
        """
        outputs, model_state = apply(batch["image"], key=key)
        logits, boxes = outputs["logits"], outputs["boxes"]
        valid = batch["valid"]
        true_labels = jnp.where(valid[:, None] > 0, batch["box_label"], -1)
        owner, quality = jax.vmap(assign, in_axes=(None, None, 0, 0, 0, 0))(
            outputs["points"],
            outputs["sides"],
            jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
            jax.lax.stop_gradient(boxes),
            batch["boxes"],
            true_labels,
        )
        pick = jnp.maximum(owner, 0)
        label = jnp.where(owner >= 0, jnp.take_along_axis(true_labels, pick, axis=1), -1)
        classes = jnp.arange(len(self.class_names))
        targets = jnp.where(label[..., None] == classes, quality[..., None], 0.0)
        class_losses = binary_cross_entropy(logits, targets) * valid[:, None, None]
        true_boxes = jnp.take_along_axis(batch["boxes"], pick[..., None], axis=1)
        # A background cell has no box: give it its own, whose loss and gradient are zero.
        true_boxes = jnp.where((owner >= 0)[..., None], true_boxes, jax.lax.stop_gradient(boxes))
        box_losses = giou_loss(boxes, true_boxes) * quality
        scale = jnp.maximum(total(quality.sum()), 1.0)
        class_loss = total(class_losses.sum()) / scale
        box_loss = total(box_losses.sum()) / scale
        return class_loss + self.box_weight * box_loss, {
            "model_state": model_state,
            "metrics": {"class_loss": class_loss, "box_loss": box_loss},
        }

    @property
    def candidates(self) -> int:
        """Boxes of an image that suppression looks at."""
        return max(1000, 10 * self.max_detections)

    def decode(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """All boxes, within the image, before suppression.

        Returns:
            boxes (batch, points, 2 * ndim) and scores (batch, points, classes).
        """
        shape = batch["image"].shape[1:-1]
        return {
            "boxes": clip_boxes(outputs["boxes"], shape),
            "scores": jax.nn.sigmoid(outputs["logits"]),
        }

    def predict(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """The best boxes of each image after suppression, best first.

        Returns:
            boxes (batch, max_detections, 2 * ndim), scores and labels (batch, max_detections);
            label -1 is padding. All scores of an image of which the network says what is no
            number are NaN.
        """
        found = self.decode(outputs, batch)

        def one(classes: jax.Array, boxes: jax.Array) -> dict[str, jax.Array]:
            # Every class of every cell is a candidate; suppression needs only the best few.
            flat = classes.reshape(-1)
            scores, index = jax.lax.top_k(flat, min(self.candidates, flat.shape[0]))
            # Suppression leaves NaN out, and no boxes would look as if nothing were there.
            broken = jnp.isnan(flat).any() | jnp.isnan(boxes).any()
            labels = (index % classes.shape[-1]).astype(jnp.int32)
            candidates = boxes[index // classes.shape[-1]]
            rows, kept = nms(
                candidates,
                scores,
                labels,
                iou_threshold=self.iou_threshold,
                max_boxes=self.max_detections,
            )
            return {
                "boxes": jnp.where(kept[:, None], candidates[rows], 0),
                "scores": jnp.where(broken, jnp.nan, jnp.where(kept, scores[rows], 0)),
                "labels": jnp.where(kept, labels[rows], -1),
            }

        return jax.vmap(one)(found["scores"], found["boxes"])

    def combine(self, predictions: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Boxes of several models (models, batch, max_detections, ...), fused image by image."""

        def one(found: dict[str, jax.Array]) -> dict[str, jax.Array]:
            boxes, scores, labels = fuse_boxes(
                found["boxes"],
                found["scores"],
                found["labels"],
                iou_threshold=self.iou_threshold,
                max_boxes=self.max_detections,
            )
            broken = jnp.isnan(found["scores"]).any()
            scores = jnp.where(broken, jnp.nan, scores)
            return {"boxes": boxes, "scores": scores, "labels": labels}

        return jax.vmap(one, in_axes=1)(predictions)

    def restore(self, prediction: Any, example: Example) -> dict[str, np.ndarray]:
        """Drop padding and put boxes into the file's own grid."""
        boxes = restore_boxes(
            np.asarray(prediction["boxes"]),
            scale=example["scale"],
            offset=example["offset"],
            shape=example["shape"].tolist(),
        )
        low, high = np.split(boxes, 2, axis=-1)
        # What lies in the padding about an image has no extent in the file's own grid.
        found = (np.asarray(prediction["labels"]) >= 0) & (high > low).all(-1)
        return {
            "boxes": boxes[found],
            "scores": np.asarray(prediction["scores"])[found],
            "labels": np.asarray(prediction["labels"])[found],
        }

    def observe(self, prediction: Any, example: Example) -> Row:
        """Nothing: the restored prediction says it all."""
        return {}

    def score(self, prediction: Any, example: Example) -> Row:
        """Which detections hit, at every overlap threshold."""
        return metrics.match_detections(
            prediction["boxes"],
            prediction["scores"],
            prediction["labels"],
            example["boxes"],
            example["box_label"],
            classes=len(self.class_names),
        )

    def describe(self, row: Row) -> dict[str, float | str]:
        """Objects, hits and false alarms at IoU .5 among detections above the score threshold.

        The score is their F1: 2 hits / (objects + detections); 1 where there are neither.
        """
        sure = np.asarray(row["score"]) >= self.score_threshold
        hits = int(np.asarray(row["matched"])[0, sure].sum())
        objects, found = int(np.sum(row["truths"])), int(sure.sum())
        score = 2 * hits / (objects + found) if objects + found else 1.0
        return {"score": score, "objects": objects, "hits": hits, "false_alarms": found - hits}

    def summarize(self, rows: Sequence[Row], *, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`ap50`, `ap` and `froc`, pooled over all images of each resample."""
        return metrics.summarize_detection(rows, weights=weights, class_names=self.class_names)
