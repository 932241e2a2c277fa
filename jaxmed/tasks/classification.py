"""Classification: which class, or which classes, does an image show?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.losses import binary_cross_entropy, cross_entropy, ignore_invalid, label_weights
from jaxmed.metrics import classification as metrics
from jaxmed.types import Batch, Example, Row


class Classification:
    """One label an image (softmax), or several at once (sigmoid).

    Args:
        class_names: in the order of the labels.
        multilabel: whether several classes may hold at once.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: weight of each class in the loss, or None for equal ones.
        threshold: of the last class's probability, from which a binary decision says so; None
            takes the likelier class.
    """

    main_score = "auroc"

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        multilabel: bool = False,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        threshold: float | None = None,
    ):
        self.class_names = tuple(class_names)
        self.multilabel = multilabel
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.threshold = threshold

    def loss(
        self,
        apply: Callable[..., tuple[Any, Any]],
        batch: Batch,
        *,
        key: jax.Array,
        total: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Weighted mean cross-entropy of the valid images of the global batch."""
        logits, model_state = apply(batch["image"], key=key)
        labels = ignore_invalid(batch["label"], batch["valid"])
        if self.multilabel:
            losses = binary_cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            weights = (labels >= 0).astype(jnp.float32)
            correct = (logits > 0) == (labels > 0)
        else:
            class_weights = None if self.class_weights is None else jnp.array(self.class_weights)
            losses = cross_entropy(
                logits,
                labels,
                label_smoothing=self.label_smoothing,
                class_weights=class_weights,
            )
            weights = label_weights(labels, class_weights)
            correct = logits.argmax(-1) == labels
        known = labels >= 0
        loss = total(losses.sum()) / jnp.maximum(total(weights.sum()), 1e-6)
        accuracy = total((correct & known).sum() * 1.0) / jnp.maximum(total(known.sum() * 1.0), 1)
        return loss, {"model_state": model_state, "metrics": {"accuracy": accuracy}}

    def predict(self, outputs: Any, batch: Batch) -> jax.Array:
        """Probabilities (batch, classes)."""
        return jax.nn.sigmoid(outputs) if self.multilabel else jax.nn.softmax(outputs)

    def combine(self, predictions: jax.Array) -> jax.Array:
        """The mean over models: (models, batch, classes) -> (batch, classes)."""
        return predictions.mean(0)

    def restore(self, prediction: Any, example: Example) -> np.ndarray:
        """Probabilities (classes,); an image's class has no geometry."""
        return np.asarray(prediction)

    def observe(self, prediction: Any, example: Example) -> Row:
        """Nothing: the restored prediction says it all."""
        return {}

    def score(self, prediction: Any, example: Example) -> Row:
        """The label and the probabilities of one image; the scores are of the whole set."""
        return {"label": example["label"], "probabilities": prediction}

    def describe(self, row: Row) -> dict[str, float | str]:
        """Label, prediction, probabilities, and as score the probability of what is true."""
        label, probabilities = np.asarray(row["label"]), np.asarray(row["probabilities"])
        if self.multilabel:
            score = np.where(label > 0, probabilities, 1 - probabilities).mean()
            names = [n for n, on in zip(self.class_names, label, strict=True) if on > 0]
            guesses = [n for n, p in zip(self.class_names, probabilities, strict=True) if p > 0.5]
            told = {"label": "+".join(names), "prediction": "+".join(guesses)}
        else:
            score = probabilities[label]
            told = {
                "label": self.class_names[int(label)],
                "prediction": self.class_names[int(probabilities.argmax())],
            }
        each = zip(self.class_names, probabilities.tolist(), strict=True)
        return {"score": float(score), **told, **{f"probability/{n}": p for n, p in each}}

    def summarize(self, rows: Sequence[Row], *, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Accuracy, recall and the rest, under each row of `weights`."""
        return metrics.summarize_classification(
            np.stack([row["label"] for row in rows]),
            np.stack([row["probabilities"] for row in rows]),
            weights=weights,
            class_names=self.class_names,
            threshold=self.threshold,
        )
