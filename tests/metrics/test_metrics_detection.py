import contextlib
import io
import time

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jaxmed.metrics import detection as dt

NAMES = ["a", "b", "c"]
ONES = np.ones((1, 1))


def boxes_at(low, size=10.0, ndim=2):
    low = np.atleast_2d(np.asarray(low, float))
    return np.concatenate([low, low + size], axis=1)


def random_image(rng, *, truths, detections, ndim=2):
    """Objects, and detections of which many lie near an object; scores with ties."""
    low = rng.uniform(0, 80, (truths, ndim))
    true_boxes = np.concatenate([low, low + rng.uniform(5, 40, (truths, ndim))], axis=1)
    true_labels = rng.integers(0, 3, truths)
    low = rng.uniform(0, 80, (detections, ndim))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (detections, ndim))], axis=1)
    labels = rng.integers(0, 3, detections)
    for i in range(detections):
        if truths and rng.random() < 0.7:
            j = rng.integers(truths)
            boxes[i], labels[i] = true_boxes[j] + rng.normal(0, 1.5, 2 * ndim), true_labels[j]
    return boxes, rng.random(detections).round(2), labels, true_boxes, true_labels


def random_set(seed=0, images=30):
    rng = np.random.default_rng(seed)
    out = [
        random_image(rng, truths=rng.integers(0, 8), detections=rng.integers(0, 15))
        for _ in range(images)
    ]
    out.append(random_image(rng, truths=0, detections=5))
    out.append(random_image(rng, truths=4, detections=0))
    out.append(random_image(rng, truths=0, detections=0))
    return out


def coco_scores(images, max_detections=100):
    """(ap, ap50) and (ap, ap50) per class from pycocotools."""

    def xywh(box):
        return [float(v) for v in (*box[:2], *(box[2:] - box[:2]))]

    truths, results = [], []
    for i, (boxes, scores, labels, true_boxes, true_labels) in enumerate(images, 1):
        for box, label in zip(true_boxes, true_labels, strict=True):
            box = xywh(box)
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": i,
                    "category_id": int(label) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        for box, score, label in zip(boxes, scores, labels, strict=True):
            results.append(
                {
                    "image_id": i,
                    "category_id": int(label) + 1,
                    "bbox": xywh(box),
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i + 1} for i in range(len(images))],
            "categories": [{"id": c + 1} for c in range(3)],
            "annotations": truths,
            "info": {},
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # thresholds, recalls, classes
    each = [(precision[:, :, c].mean(), precision[0, :, c].mean()) for c in range(3)]
    return (precision.mean(), precision[0].mean()), each


def rows_of(images, **options):
    return [dt.match_detections(*image, classes=3, **options) for image in images]


@pytest.mark.parametrize("max_detections", [100, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pycocotools(seed, max_detections):
    images = random_set(seed)
    rows = rows_of(images, max_detections=max_detections)
    got = dt.summarize_detection(rows, weights=np.ones((1, len(rows))), class_names=NAMES)
    overall, each = coco_scores(images, max_detections)
    assert 0.05 < overall[0] < overall[1] < 1
    np.testing.assert_allclose([got["ap"][0], got["ap50"][0]], overall, atol=1e-6)
    for name, expected in zip(NAMES, each, strict=True):
        found = [got[f"ap/{name}"][0], got[f"ap50/{name}"][0]]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bootstrap_row_equals_pycocotools_on_the_resampled_images():
    rng = np.random.default_rng(5)
    images = random_set(2)
    # Scores without ties across images: their order is an accident of the images' order.
    images = [(b, s + rng.uniform(0, 1e-4, len(s)), *rest) for b, s, *rest in images]
    draws = rng.integers(0, len(images), (4, len(images)))
    weights = np.stack([np.bincount(d, minlength=len(images)) for d in draws]).astype("f4")
    got = dt.summarize_detection(rows_of(images), weights=weights, class_names=NAMES)
    for r, draw in enumerate(draws):
        overall, _ = coco_scores([images[i] for i in draw])
        np.testing.assert_allclose([got["ap"][r], got["ap50"][r]], overall, atol=1e-6)


def test_levels_of_recall_are_reached_where_division_says():
    levels = np.linspace(0, 1, 101)
    for total in range(1, 400):
        needed = dt._needed_hits(np.array([float(total)]))[0]
        recalls = np.arange(total + 1) / total
        np.testing.assert_array_equal(needed, recalls.searchsorted(levels))


def test_accumulation_of_many_resamples_equals_that_of_each():
    """Against the definition, without any array of several resamples."""
    images = random_set(4)
    rows = rows_of(images)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 50).astype("f4")
    got = dt.summarize_detection(rows, weights=weights, class_names=NAMES)
    score, label = (np.concatenate([row[key] for row in rows]) for key in ("score", "label"))
    hit = np.concatenate([row["matched"][0] for row in rows])
    image = np.repeat(np.arange(len(rows)), [len(row["score"]) for row in rows])
    order = np.argsort(-score, kind="stable")
    order = order[label[order] == 1]
    objects = weights @ np.array([row["truths"][1] for row in rows])
    for r, w in enumerate(weights.astype(float)):
        mass = w[image[order]]
        hits, called = np.cumsum(mass * hit[order]), np.cumsum(mass)
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        recall = hits / objects[r]
        best = [precision[recall >= level].max(initial=0) for level in np.linspace(0, 1, 101)]
        assert got["ap50/b"][r] == pytest.approx(np.mean(best), abs=1e-6)
        reached = []
        for rate in dt.FROC_RATES:
            last = [(score[order] >= s) for s in score[order]]
            allowed = [m for m in last if (mass * ~hit[order] * m).sum() <= rate * w.sum()]
            reached.append(
                max((mass * hit[order] * m).sum() for m in [np.zeros_like(hit[order]), *allowed])
            )
        assert got["froc/b"][r] == pytest.approx(np.mean(reached) / objects[r], abs=1e-6)


def test_three_dimensions_of_depth_one_equal_two():
    def deepen(boxes):
        low, high = np.split(boxes, 2, axis=1)
        zero = np.zeros((len(boxes), 1))
        return np.concatenate([low, zero, high, zero + 1], axis=1)

    images = random_set(3, images=8)
    deep = [(deepen(b), s, n, deepen(t), m) for b, s, n, t, m in images]
    for a, b in zip(rows_of(images), rows_of(deep), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_one_object_is_found_once_and_padding_is_dropped():
    row = dt.match_detections(
        boxes_at([[0, 0], [0, 1], [50, 50], [0, 0]]),
        np.array([0.5, 0.9, 0.8, 1.0]),
        np.array([0, 0, 0, -1]),
        boxes_at([[0, 0], [0, 0]]),
        np.array([0, -1]),
        classes=1,
        iou_thresholds=(0.5, 0.9),
    )
    assert row["score"].tolist() == [0.9, 0.8, 0.5]
    assert row["matched"].tolist() == [[True, False, False], [False, False, True]]
    assert row["truths"].tolist() == [1]


def test_froc_by_hand():
    truth, found, lost = boxes_at([0, 0]), boxes_at([0, 0]), boxes_at([90, 90])

    def row(boxes, score, true_boxes):
        labels = [np.zeros(len(b), int) for b in (boxes, true_boxes)]
        return dt.match_detections(boxes, score, labels[0], true_boxes, labels[1], classes=1)

    rows = [
        row(found, np.array([0.9]), truth),
        row(lost, np.array([0.8]), truth[:0]),  # an image without an object
        row(found, np.array([0.7]), truth),
        row(lost, np.array([0.7]), truth),  # tied with the hit before: they pass together
    ]
    got = dt.summarize_detection(rows, weights=np.ones((1, 4)), class_names=["a"])
    # .9: 1/3 at no cost. .7: 2/3 at 2 false positives in 4 images = 1/2 an image.
    np.testing.assert_allclose(got["froc"], [(2 * 1 / 3 + 5 * 2 / 3) / 7])
    np.testing.assert_allclose(got["froc"], got["froc/a"])
    # Without the image that has no object the same false positive weighs more: 1/3 an image.
    weights = np.array([[1.0, 0, 1, 1], [1, 8, 1, 1]])
    got = dt.summarize_detection(rows, weights=weights, class_names=["a"])
    np.testing.assert_allclose(got["froc"], [(2 / 3 + 5 * 2 / 3) / 7, (3 / 3 + 4 * 2 / 3) / 7])


def test_froc_of_perfect_and_of_no_detections():
    boxes, labels = boxes_at([[0, 0], [40, 40]]), np.array([0, 1])
    perfect = dt.match_detections(boxes, np.ones(2), labels, boxes, labels, classes=3)
    nothing = dt.match_detections(boxes[:0], np.ones(0), labels[:0], boxes, labels, classes=3)
    got = dt.summarize_detection([perfect], weights=ONES, class_names=NAMES)
    assert got["ap"] == got["ap50"] == got["froc"] == 1 and np.isnan(got["ap/c"])
    got = dt.summarize_detection([nothing], weights=ONES, class_names=NAMES)
    assert got["ap"] == got["ap50"] == got["froc"] == 0


def test_low_threshold_for_volumes_and_no_objects_at_all():
    rng = np.random.default_rng(0)
    thresholds = (0.1, *dt.COCO_THRESHOLDS)
    images = [random_image(rng, truths=4, detections=9, ndim=3) for _ in range(5)]
    rows = rows_of(images, iou_thresholds=thresholds)
    kw = {"weights": np.ones((2, 5)), "class_names": NAMES, "iou_thresholds": thresholds}
    got = dt.summarize_detection(rows, froc_iou=0.1, **kw)
    assert (got["ap10"] >= got["ap50"]).all() and (got["ap50"] >= got["ap"]).all()
    with pytest.raises(ValueError, match="froc_iou"):
        dt.summarize_detection(rows, froc_iou=0.3, **kw)
    empty = random_image(rng, truths=0, detections=3)
    got = dt.summarize_detection(rows_of([empty]), weights=ONES, class_names=NAMES)
    assert all(np.isnan(values).all() for values in got.values())


def test_a_thousand_resamples_of_ten_thousand_detections_take_seconds():
    rng = np.random.default_rng(0)
    rows = [
        {
            "score": rng.random(20),
            "label": np.zeros(20, int),
            "matched": rng.random((10, 20)) < np.linspace(0.6, 0.1, 10)[:, None],
            "truths": np.array([15]),
        }
        for _ in range(500)
    ]
    weights = rng.multinomial(500, np.full(500, 1 / 500), 1000).astype("f4")
    start = time.perf_counter()
    dt.summarize_detection(rows, weights=weights, class_names=["a"])
    assert time.perf_counter() - start < 30  # some 3 s on an idle core
