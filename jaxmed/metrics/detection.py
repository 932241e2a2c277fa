"""Detection: COCO's average precision, and FROC, under bootstrap weights over images.

An image is matched once (`match_detections`) and pooled many times. Images without an object stay
in: their detections are false positives, and they count in "false positives an image".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from jaxmed.metrics import chunks, divide, mean_defined, weighted_sums

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
FROC_RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
_RECALLS = np.linspace(0, 1, 101)
_PASSES = 4  # over the same numbers: a quarter of a chunk each stays nearer to the processor

Row = Mapping[str, np.ndarray]
"""What `match_detections` returns of one image."""


def pairwise_iou(
    a: Float[np.ndarray, "n coordinates"], b: Float[np.ndarray, "m coordinates"]
) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every box of `a` with every box of `b`, in any dimension."""
    ndim = a.shape[1] // 2
    low = np.maximum(a[:, None, :ndim], b[None, :, :ndim])
    high = np.minimum(a[:, None, ndim:], b[None, :, ndim:])
    overlap = np.maximum(high - low, 0).prod(axis=-1)
    volume_a, volume_b = ((x[:, ndim:] - x[:, :ndim]).prod(axis=-1) for x in (a, b))
    return divide(overlap, volume_a[:, None] + volume_b[None] - overlap, otherwise=0)


def match_detections(
    boxes: Float[np.ndarray, "detections coordinates"],
    scores: Float[np.ndarray, " detections"],
    labels: Integer[np.ndarray, " detections"],
    true_boxes: Float[np.ndarray, "truths coordinates"],
    true_labels: Integer[np.ndarray, " truths"],
    *,
    classes: int,
    iou_thresholds: Sequence[float] = COCO_THRESHOLDS,
    max_detections: int = 100,
) -> dict[str, np.ndarray]:
    """Match the detections of one image to its objects, as COCO does.

    Class by class and threshold by threshold, the detections take turns by falling score; each
    takes the object it overlaps most of those still free, if by at least the threshold.

    Args:
        boxes: [low..., high...]; detections and objects in the same grid.
        scores: any scale, the higher the surer.
        labels: class numbers; -1 is padding.
        true_boxes: the objects.
        true_labels: class numbers; -1 is padding.
        classes: number of classes.
        iou_thresholds: one set of matches each.
        max_detections: the best so many of each class count.

    Returns:
        score (d,), label (d,) and matched (thresholds, d) of the detections that count, and
        truths (classes,), the numbers of objects.
    """
    found = []
    for c in range(classes):
        mine = np.flatnonzero(labels == c)
        mine = mine[np.argsort(-scores[mine], kind="stable")][:max_detections]
        truth = true_boxes[true_labels == c].astype(np.float64)
        overlaps = pairwise_iou(boxes[mine].astype(np.float64), truth)
        matched = np.stack([_match(overlaps, threshold) for threshold in iou_thresholds])
        found.append((scores[mine], labels[mine], matched))
    score, label, matches = zip(*found, strict=True)
    return {
        "score": np.concatenate(score),
        "label": np.concatenate(label),
        "matched": np.concatenate(matches, axis=1),
        "truths": np.array([(true_labels == c).sum() for c in range(classes)]),
    }


def _match(
    overlaps: Float[np.ndarray, "detections truths"], threshold: float
) -> Bool[np.ndarray, " detections"]:
    """Greedy one-to-one matching; rows are in order of falling score."""
    matched = np.zeros(len(overlaps), bool)
    free = overlaps.copy()
    for i in np.flatnonzero((overlaps >= threshold).any(axis=1)):
        # The last of equally good objects, as COCO's code has it.
        best = free.shape[1] - 1 - free[i, ::-1].argmax()
        if free[i, best] >= threshold:
            matched[i] = True
            free[:, best] = -1
    return matched


def summarize_detection(
    rows: Sequence[Row],
    *,
    weights: Real[np.ndarray, "resamples images"],
    class_names: Sequence[str],
    iou_thresholds: Sequence[float] = COCO_THRESHOLDS,
    froc_iou: float = 0.5,
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """AP and FROC of each class, and their means over the classes that have objects.

    Args:
        rows: of `match_detections`, one an image.
        weights: one row a resample.
        class_names: for the names of the scores.
        iou_thresholds: those the rows were matched at. `ap` is the mean over .50 to .95 and there
            only if all ten are among them; any other such as .1 adds its own `ap10`.
        froc_iou: threshold for FROC, one of `iou_thresholds`.

    Returns:
        ap50, ap and froc, each also as NAME/CLASS; NaN without an object.
    """
    thresholds = np.asarray(iou_thresholds, np.float64)
    image = np.repeat(np.arange(len(rows)), [len(row["score"]) for row in rows])
    pooled = {
        key: np.concatenate([row[key] for row in rows], axis=-1)
        for key in ("score", "label", "matched")
    }
    truths = np.stack([row["truths"] for row in rows])
    of_class: dict[str, list[np.ndarray]] = {}
    for c in range(len(class_names)):
        mine = np.flatnonzero(pooled["label"] == c)
        mine = mine[np.argsort(-pooled["score"][mine], kind="stable")]
        matched = pooled["matched"][:, mine]
        objects = weighted_sums(weights, truths[:, c])
        precisions = average_precisions(matched, image[mine], objects, weights=weights)
        scores = _named_precisions(precisions, thresholds)
        at = int(np.abs(thresholds - froc_iou).argmin())
        if not np.isclose(thresholds[at], froc_iou):
            raise ValueError(f"froc_iou {froc_iou} is not among the IoU thresholds {thresholds}")
        score = pooled["score"][mine]
        scores["froc"] = froc(matched[at], score, image[mine], objects, weights=weights)
        for name, samples in scores.items():
            of_class.setdefault(name, []).append(samples)
    summary = {name: mean_defined(np.stack(values, axis=1)) for name, values in of_class.items()}
    for name, values in of_class.items():
        named = zip(class_names, values, strict=True)
        summary.update({f"{name}/{class_name}": v for class_name, v in named})
    return summary


def _named_precisions(precisions: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Average precisions (resamples, thresholds) by name."""
    coco = np.isclose(thresholds[:, None], COCO_THRESHOLDS)
    named = {}
    for k, threshold in enumerate(thresholds):
        if np.isclose(threshold, 0.5) or not coco[k].any():
            named[f"ap{round(100 * threshold):02d}"] = precisions[:, k]
    if coco.any(axis=0).all():
        named["ap"] = precisions[:, coco.any(axis=1)].mean(axis=1)
    return named


def average_precisions(
    matched: Bool[np.ndarray, "thresholds detections"],
    image: Integer[np.ndarray, " detections"],
    objects: Float[np.ndarray, " resamples"],
    *,
    weights: Real[np.ndarray, "resamples images"],
) -> Float[np.ndarray, "resamples thresholds"]:
    """COCO's 101-point average precision of one class at each IoU threshold.

    Args:
        matched: of all images' detections, by falling score.
        image: the image of each detection.
        objects: weighted number of objects; where 0, the result is NaN.
        weights: how often each image counts, whole numbers; one row a resample.

    Source: pycocotools, `COCOeval.accumulate`; equal to it.
    """
    result = np.zeros((len(weights), len(matched)))
    needed = _needed_hits(objects)
    for part in chunks(len(weights), width=_PASSES * len(image)):
        mass = _mass(weights[part], image)
        called = mass.cumsum(axis=0)
        for k, hit in enumerate(matched):
            # Recall rises only at a hit and precision falls elsewhere: hits are all it takes.
            hits = mass[hit].cumsum(axis=0)
            precision = hits / np.maximum(called[hit], 1)
            envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            # Levels of recall that are never reached have precision 0.
            ended = np.concatenate([envelope, np.zeros((1, hits.shape[1]))])
            places = _first_places(hits, needed[part])
            result[part, k] = np.take_along_axis(ended, places, axis=0).mean(axis=0)
    result[objects == 0] = np.nan
    return result


def _mass(
    weights: Real[np.ndarray, "resamples images"], image: Integer[np.ndarray, " detections"]
) -> Float[np.ndarray, "detections resamples"]:
    """The weight of each detection; resamples last, so that totals run along whole rows.

    Single precision holds whole numbers up to 16.7 million, more than the detections of a resample.
    """
    return np.ascontiguousarray(weights.T, np.float32)[image]


def _needed_hits(objects: Float[np.ndarray, " resamples"]) -> Float[np.ndarray, "resamples levels"]:
    """Hits from which each level of recall is reached, as floating-point division has it."""
    level, total = _RECALLS[None], objects[:, None].astype(np.float64)
    hits = np.ceil(level * total)
    hits -= divide(hits - 1, total, otherwise=-1) >= level
    return hits + (divide(hits, total, otherwise=1) < level)


def _first_places(
    totals: Float[np.ndarray, "n resamples"], levels: Float[np.ndarray, "resamples levels"]
) -> Integer[np.ndarray, "levels resamples"]:
    """Where in each column, which never falls, the first entry is that reaches each level; or n.

    Of whole numbers: each column is lifted above the one before, so that one search does for all.
    """
    n, columns = totals.shape
    step = 1 + max(totals.max(initial=0), levels.max(initial=0))
    lift = step * np.arange(columns)[:, None]
    places = (totals.T + lift).ravel().searchsorted((levels + lift).ravel())
    return (places.reshape(levels.shape) - n * np.arange(columns)[:, None]).clip(0, n).T


def froc(
    matched: Bool[np.ndarray, " detections"],
    scores: Float[np.ndarray, " detections"],
    image: Integer[np.ndarray, " detections"],
    objects: Float[np.ndarray, " resamples"],
    *,
    weights: Real[np.ndarray, "resamples images"],
    rates: Sequence[float] = FROC_RATES,
) -> Float[np.ndarray, " resamples"]:
    """Mean sensitivity at given numbers of false positives an image, of one class.

    The sensitivity at a rate is the best that any score threshold reaches without exceeding it
    (no interpolation); detections of equal score pass together. Source: the competition metric of
    LUNA16 (Setio et al., Medical Image Analysis 42, 2017).
    """
    result = np.zeros(len(weights))
    # A hit costs the false positives down to the end of the run of scores equal to its own.
    ends = np.searchsorted(-scores, -scores[matched], side="right") - 1
    for part in chunks(len(weights), width=_PASSES * len(image)):
        mass = _mass(weights[part], image)
        cost = (mass * ~matched[:, None]).cumsum(axis=0)[ends]
        hits = np.zeros((len(ends) + 1, mass.shape[1]))
        mass[matched].cumsum(axis=0, out=hits[1:])
        images = weights[part].sum(axis=1, dtype=np.float64)[:, None]
        # The first place of each rate that costs a false positive too many.
        places = _first_places(cost, np.floor(np.array(rates) * images) + 1)
        result[part] = np.take_along_axis(hits, places, axis=0).mean(axis=0)
    return divide(result, objects)
