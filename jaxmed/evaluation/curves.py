"""Figures of a whole part: ROC, precision-recall, reliability, confusion, spread of scores."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.metrics
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxmed.evaluation.bootstrap import bootstrap_weights, percentiles
from jaxmed.evaluation.calibration_curves import draw_bins, draw_reliability, draw_risk
from jaxmed.evaluation.size_agreement import draw_agreement
from jaxmed.metrics.detection import FROC_RATES
from jaxmed.types import DatasetInfo

GRID = np.linspace(0, 1, 101)
"""False positive rates of a band about a ROC curve."""
RISK = "mean loss of the cases that are decided, the surest first, with its pointwise 95 % band"
MOST_CLASSES = 10
"""Lines in one figure, at most; of more classes the first are drawn."""


def draw_curves(
    info: DatasetInfo,
    scores: Mapping[int, Mapping[str, Any]],
    folder: Path,
    *,
    patients: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Draw what suits the task, as PNG files in `folder`.

    Args:
        info: of the data set.
        scores: rows of `Task.score`, by row of the source.
        folder: to write to; made before.
        patients: one a row of the source, over which bands are drawn; over cases without.

    Returns:
        `picture` (path) and `caption` of each figure.
    """
    rows = list(scores.values())
    groups = None if patients is None else [patients[row] for row in scores]
    # A pair of $ in a name would be read as a formula, of whatever stands between them.
    names = tuple(name.replace("$", r"\$") for name in info.class_names)
    if info.task == "classification":
        drawn = _classification(info, names, rows, groups)
    elif info.task == "detection":
        drawn = _detection(names, rows)
    else:
        drawn = _segmentation(info, names, rows, groups)
    figures = []
    for name, figure, caption in drawn:
        path = folder / f"{name}.png"
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=100)
        figures.append({"picture": path, "caption": caption})
    return figures


def _figure(panels: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.2 * panels, 4), layout="constrained")
    return figure, list(np.ravel(figure.subplots(1, panels)))


def _add_legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:  # none where no class has a curve
        axis.legend(fontsize=8)


def _classification(
    info: DatasetInfo,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[str] | None,
) -> list[tuple[str, Figure, str]]:
    labels = np.stack([row["label"] for row in rows])
    probabilities = np.stack([row["probabilities"] for row in rows])
    classes = np.arange(len(info.class_names))
    truth = labels[:, None] == classes if labels.ndim == 1 else labels > 0
    # Of two classes one says it all: that of the last.
    shown = range(len(info.class_names))[:MOST_CLASSES]
    if len(info.class_names) == 2 and not info.multilabel:
        shown = range(1, 2)
    figure, (roc, recall, reliable) = _figure(3)
    for c in shown:
        if not 0 < truth[:, c].sum() < len(truth):
            continue  # no curve of a class that all or no cases have
        name, score = names[c], probabilities[:, c]
        false, true, _ = sklearn.metrics.roc_curve(truth[:, c], score)
        [line] = roc.plot(false, true, label=name)
        # Of more classes bands would hide each other, and one patient gives none.
        if len(shown) == 1 and (groups is None or len(set(groups)) > 1):
            low, high = roc_band(truth[:, c], score, groups=groups)
            roc.fill_between(GRID, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        precision, hits, _ = sklearn.metrics.precision_recall_curve(truth[:, c], score)
        recall.plot(hits, precision, label=name)
        draw_bins(reliable, name, truth[:, c], score)
    for axis in (roc, reliable):
        axis.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1)
    roc.set(xlabel="1 - specificity", ylabel="recall (sensitivity)", title="ROC")
    recall.set(xlabel="recall", ylabel="precision", title="precision-recall", ylim=(0, 1.02))
    reliable.set(xlabel="predicted probability", ylabel="observed share", title="reliability")
    _add_legend(roc)
    drawn = [
        (
            "curves",
            figure,
            "ROC, precision-recall and reliability of each class, in bins of .1 with 95 % intervals"
            + "; about the ROC its pointwise 95 % band" * (len(shown) == 1),
        )
    ]
    if labels.ndim == 1:
        drawn.append(("confusion", _confusion(names, labels, probabilities), "Confusion matrix"))
    trust = _trust(info, names, rows, shown, truth, groups)
    return [*drawn, *([trust] if trust else [])]


def roc_band(
    truth: np.ndarray,
    score: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise 95 % band of the recall at each false positive rate of `GRID`, by bootstrap.

    Vertical averaging (Fawcett, An Introduction to ROC Analysis, Pattern Recognition Letters 27,
    2006, section 9.1): each resample's own curve, read at the same rates. `groups` are drawn, one
    a case (patients), or cases without.
    """
    curves = []
    drawn = bootstrap_weights(len(truth), groups=groups, resamples=resamples, seed=seed)
    for weights in drawn[1:].astype(np.float64):
        if 0 < weights[truth].sum() < weights.sum():
            false, true, _ = sklearn.metrics.roc_curve(truth, score, sample_weight=weights)
            # At a rate that a step rises at, the top of the step.
            curves.append(true[np.searchsorted(false, GRID, side="right") - 1])
    count = len(truth) if groups is None else len(set(groups))
    low, high = percentiles(np.array(curves), groups=count)
    return low, high


def _trust(
    info: DatasetInfo,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[int],
    truth: np.ndarray,
    groups: Sequence[str] | None,
) -> tuple[str, Figure, str] | None:
    """Reliability as said and calibrated, and risk-coverage; None where neither is known."""
    calibrated = "calibrated" in rows[0]
    if not calibrated and info.multilabel:
        return None
    figure, axes = _figure(2 * calibrated + (not info.multilabel))
    captions, said = [], np.stack([row["probabilities"] for row in rows])
    if calibrated:
        scaled = np.stack([row["calibrated"] for row in rows])
        curves = [
            [(names[c], truth[:, c], values[:, c]) for c in shown] for values in (said, scaled)
        ]
        draw_reliability(axes, *curves)
        captions.append("Reliability before and after the calibration fixed on the validation part")
    if not info.multilabel:
        wrong = ~truth[np.arange(len(rows)), said.argmax(1)]
        draw_risk(axes[-1], said.max(1), wrong, name="error", groups=groups)
        captions.append(RISK)
    return "calibration", figure, "; ".join(captions)


def _voxel_trust(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[str] | None
) -> tuple[str, Figure, str] | None:
    """The same of masks, their reliability voxel by voxel; None where neither is known."""
    if "confidence" not in rows[0]:
        return None
    keys = [k for k in ("voxel_probabilities", "voxel_calibrated") if k in rows[0]]
    curves, captions = [], []
    figure, axes = _figure(len(keys) + 1)
    for key in keys:
        said = np.concatenate([row[key] for row in rows])
        right = said.argmax(1) == np.concatenate([row["voxel_labels"] for row in rows])
        curves.append([("voxels", right, said.max(1))])
    if curves:
        draw_reliability(axes, curves[0], curves[1] if len(curves) > 1 else None, are_cases=False)
        captions.append("Reliability of the class of voxels that may be foreground")
    pairs = np.array([(row["confidence"], 1 - row["dice"]) for row in rows], np.float64)
    known = np.isfinite(pairs[:, 1])
    if not known.any():
        return None  # no case has a structure to be found
    confidence, loss = pairs[known].T
    if groups is not None:
        groups = [group for group, counts in zip(groups, known, strict=True) if counts]
    draw_risk(axes[-1], confidence, loss, name="1 - dice", groups=groups)
    return "calibration", figure, "; ".join([*captions, RISK])


def _confusion(names: Sequence[str], labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    classes = range(len(names))
    matrix = sklearn.metrics.confusion_matrix(labels, probabilities.argmax(1), labels=classes)
    figure, (axis,) = _figure(1)
    axis.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix):
        share = count / max(matrix[i].sum(), 1)
        axis.text(j, i, str(count), ha="center", va="center", color="w" if share > 0.5 else "k")
    short = [_shorten(name) for name in names]
    axis.set_xticks(list(classes), short, rotation=45, ha="right")
    axis.set_yticks(list(classes), short)
    axis.set(xlabel="predicted", ylabel="is")
    return figure


def _shorten(name: str, most: int = 14) -> str:
    """The beginning of a name in which each $ is escaped."""
    return name.replace(r"\$", "$")[:most].replace("$", r"\$")


def _detection(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Figure, str]]:
    figure, (recall, free) = _figure(2)
    score = np.concatenate([row["score"] for row in rows])
    label = np.concatenate([row["label"] for row in rows])
    hit = np.concatenate([row["matched"][0] for row in rows])
    truths = np.sum([row["truths"] for row in rows], axis=0)
    for c, name in enumerate(names[:MOST_CLASSES]):
        mine = label == c
        order = np.argsort(-score[mine], kind="stable")
        hits = np.cumsum(hit[mine][order])
        false = np.cumsum(~hit[mine][order])
        if not truths[c] or not len(hits):
            continue
        recall.plot(hits / truths[c], hits / (hits + false), label=name)
        free.plot(false / len(rows), hits / truths[c], label=name)
    recall.set(xlabel="recall", ylabel="precision", title="at IoU .5", xlim=(0, 1), ylim=(0, 1.02))
    free.set(xlabel="false positives an image", ylabel="recall", title="FROC", ylim=(0, 1.02))
    # As FROC is summarised, and with room for no false positive at all, which has no logarithm.
    free.set_xscale("symlog", base=2, linthresh=FROC_RATES[0])
    free.set_xlim(0, max(FROC_RATES[-1], free.get_xlim()[1]))
    _add_legend(recall)
    return [("curves", figure, "Precision-recall and free-response curves of each class")]


def _segmentation(
    info: DatasetInfo,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[str] | None,
) -> list[tuple[str, Figure, str]]:
    kinds = [k for k in ("dice", "nsd", "instance_ap50", "panoptic_quality") if k in rows[0]]
    figure, axes = _figure(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        pairs = zip(info.class_names[1:], names[1:], strict=True)
        shown = {f"{kind}/{c}": _shorten(n) for c, n in pairs if f"{kind}/{c}" in rows[0]}
        shown = shown or {kind: kind}
        values = [np.array([row[n] for row in rows], float) for n in shown]
        values = [v[np.isfinite(v)] for v in values]
        axis.boxplot(values, showfliers=False)
        for place, v in enumerate(values, start=1):
            spread = np.linspace(-0.15, 0.15, len(v)) if len(v) > 1 else np.zeros(len(v))
            axis.plot(place + spread, v, "o", markersize=3, alpha=0.5)
        axis.set_xticks(range(1, len(shown) + 1), list(shown.values()))
        axis.set(title=kind, ylim=(-0.02, 1.02))
    drawn = [("curves", figure, "Scores of the cases, with quartiles")]
    sizes = draw_agreement(info, rows)
    if sizes is not None:
        what = "Volumes" if info.ndim == 3 else "Areas"
        caption = f"{what} predicted and true (Bland-Altman): mean difference and limits of 95 %"
        drawn.append(("sizes", sizes, caption))
    trust = _voxel_trust(rows, groups)
    return [*drawn, *([trust] if trust else [])]
