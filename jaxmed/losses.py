"""Losses on the device, elementwise and unreduced, so that the caller owns the mean.

A batch may be spread over devices and hold padding, so the mean is `total(losses) /
total(weights)` with totals over the global batch. Labels of -1 are ignored: their loss and
gradient are exactly 0. To leave out padding, set its labels to -1 with `ignore_invalid`.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmed import boxes as boxes_lib


def ignore_invalid(labels: Num[Array, " batch *rest"], valid: Num[Array, " batch"]) -> Array:
    """Labels with -1 for every example whose `valid` is 0: it then counts in no loss.

    >>> ignore_invalid(jnp.array([2, 1]), jnp.array([1.0, 0.0])).tolist()
    [2, -1]
    """
    return jnp.where(valid.reshape(valid.shape + (1,) * (labels.ndim - 1)) > 0, labels, -1)


def one_hot(labels: Int[Array, "*shape"], classes: int) -> Bool[Array, "*shape classes"]:
    """One-hot labels, all False where ignored.

    A comparison, not a scatter, which XLA's CPU compiler would spend seconds folding.
    """
    return labels[..., None] == jnp.arange(classes, dtype=labels.dtype)


def label_weights(
    labels: Int[Array, "*shape"], class_weights: Float[Array, " classes"] | None = None
) -> Float[Array, "*shape"]:
    """What each element of `cross_entropy` weighs in the mean; 0 where ignored."""
    if class_weights is None:
        return (labels >= 0).astype(jnp.float32)
    return jnp.where(one_hot(labels, len(class_weights)), class_weights, 0).sum(axis=-1)


def cross_entropy(
    logits: Float[Array, "*shape classes"],
    labels: Int[Array, "*shape"],
    *,
    label_smoothing: float = 0.0,
    class_weights: Float[Array, " classes"] | None = None,
) -> Float[Array, "*shape"]:
    """Softmax cross-entropy in nats, times the weight of the label's class; 0 where ignored.

    The mean is `sum(cross_entropy) / sum(label_weights)`. Label smoothing: Szegedy et al.,
    Rethinking the Inception Architecture (CVPR 2016), section 7.

    >>> loss = cross_entropy(jnp.zeros((2, 4)), jnp.array([3, -1]))  # the second is ignored
    >>> round(float(loss.sum()), 3)  # the logarithm of 4
    1.386
    """
    targets = one_hot(labels, logits.shape[-1]).astype(logits.dtype)
    if label_smoothing:
        targets = optax.smooth_labels(targets, label_smoothing)
    losses = optax.safe_softmax_cross_entropy(logits, targets)
    return losses * label_weights(labels, class_weights).astype(logits.dtype)


def binary_cross_entropy(
    logits: Float[Array, "*shape"],
    targets: Num[Array, "*shape"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, "*shape"]:
    """Sigmoid cross-entropy in nats, for several classes at once or soft targets.

    Args:
        logits: any shape.
        targets: 0 to 1, hard or soft; negative is ignored.
        label_smoothing: moves targets this far towards 1/2.
    """
    known = targets >= 0
    smooth = targets * (1 - label_smoothing) + label_smoothing / 2
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, smooth, 0))
    return jnp.where(known, losses, 0)


def focal_loss(
    logits: Float[Array, "*shape"],
    targets: Num[Array, "*shape"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*shape"]:
    """Sigmoid focal loss; negative targets are ignored.

    Args:
        logits: any shape.
        targets: 0 or 1; negative is ignored.
        alpha: weight of positives (negatives get 1 - alpha); None weighs them alike.
        gamma: how strongly easy examples are turned down, 1 or more; 0 is cross-entropy.

    Source: Lin et al., Focal Loss for Dense Object Detection (ICCV 2017), equation 5. It is
    normalised by the number of positives.
    """
    known = targets >= 0
    hard = jnp.where(known, targets, 0).astype(logits.dtype)
    return jnp.where(known, optax.sigmoid_focal_loss(logits, hard, alpha=alpha, gamma=gamma), 0)


def dice_statistics(
    probabilities: Float[Array, "batch *spatial classes"], labels: Int[Array, " batch *spatial"]
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
    """Soft intersection and denominator of Dice, per example and class, in voxels.

    Sum both over the *global* batch before `dice_loss` for batch Dice. Voxels labelled -1 count
    in neither.

    Returns:
        sum(p y), and sum(p) + sum(y).
    """
    axes = tuple(range(1, labels.ndim))
    # Sums over many voxels need float32 even where the network computes in bfloat16.
    probabilities = probabilities.astype(jnp.float32)
    truth = one_hot(labels, probabilities.shape[-1])
    known = (labels >= 0)[..., None]
    intersection = jnp.where(truth, probabilities, 0).sum(axes)
    denominator = (jnp.where(known, probabilities, 0) + truth).sum(axes)
    return intersection, denominator


def dice_loss(
    intersection: Float[Array, "*batch classes"],
    denominator: Float[Array, "*batch classes"],
    *,
    smooth: float = 1e-5,
    include_background: bool = False,
) -> Float[Array, "*batch"]:
    """1 - soft Dice, mean over classes; 0 where a class is neither there nor predicted.

    Args:
        intersection: of `dice_statistics`, per example or already summed over the batch.
        denominator: likewise.
        smooth: added to both parts of the fraction, in voxels; keeps 0 / 0 at 1.
        include_background: whether class 0 counts.

    Source: Drozdzal et al., The Importance of Skip Connections (2016), equation 2, with the batch
    sum of nnU-Net (Isensee et al., Nature Methods 18, 2021).
    """
    dice = (2 * intersection + smooth) / (denominator + smooth)
    return 1 - dice[..., 0 if include_background else 1 :].mean(axis=-1)


def giou_loss(
    predicted: Float[Array, "*batch coordinates"], target: Float[Array, "*batch coordinates"]
) -> Float[Array, "*batch"]:
    """1 - generalised IoU, in [0, 2], box by box; see `jaxmed.boxes.giou`."""
    return 1 - boxes_lib.giou(predicted, target)
