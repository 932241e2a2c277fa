"""What scores and other names of a summary are called, and what they mean, for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple


class Score(NamedTuple):
    """A score in words.

    Attributes:
        title: as the field calls it.
        meaning: in a line.
        source: where it was defined.
    """

    title: str
    meaning: str
    source: str = ""


SCORES = {
    "accuracy": Score(
        "accuracy",
        "share of cases whose class was found; means little without the share of the commonest "
        "class, which who always says that class reaches too",
    ),
    "balanced_accuracy": Score(
        "balanced accuracy",
        "mean over the classes of the share of their cases that was found; 1 divided by the number "
        "of classes is chance",
        "Brodersen et al., ICPR 2010",
    ),
    "recall": Score(
        "recall (sensitivity)", "share of what is there that was found, at the threshold in use"
    ),
    "specificity": Score("specificity", "share of the cases without the class that were called so"),
    "precision": Score(
        "precision (PPV)",
        "positive predictive value: share of what was called so that is so; depends on how common "
        "it is",
    ),
    "f1": Score("F1", "harmonic mean of recall and precision"),
    "auroc": Score(
        "AUROC",
        "area under the ROC curve: how often a case of the class is scored higher than one of "
        "another; .5 is chance, 1 is perfect; says nothing of thresholds or calibration",
        "Hanley & McNeil, Radiology 143, 1982",
    ),
    "average_precision": Score(
        "average precision",
        "area under the precision-recall curve; chance is the share of the class, so compare only "
        "where that is the same",
        "Davis & Goadrich, ICML 2006",
    ),
    "ece": Score(
        "calibration error (ECE)",
        "expected: mean gap between the probability given and the share that came true, less "
        "what chance adds in so few cases; 0 is best",
        "Guo et al., ICML 2017",
    ),
    "ece_classwise": Score(
        "class-wise calibration error",
        "calibration error of each class's probability, then the mean over the classes; 0 is best",
        "Kull et al., NeurIPS 2019",
    ),
    "brier": Score(
        "Brier score",
        "mean squared distance of the probabilities from what was true; 0 is best",
        "Brier, Monthly Weather Review 78, 1950",
    ),
    "aurc": Score(
        "area under the risk-coverage curve",
        "mean share of errors while only the surest cases are answered; 0 is best",
        "Geifman & El-Yaniv, NeurIPS 2017",
    ),
    "voxel_ece": Score(
        "calibration error of voxels",
        "mean gap between the probability given to a voxel's class and the share that came true, "
        "of voxels that may be foreground, less what chance adds; the mean over cases; 0 is best",
        "Guo et al., ICML 2017",
    ),
    "voxel_brier": Score(
        "Brier score of voxels",
        "mean squared distance of their probabilities from what was true, likewise; 0 is best",
    ),
    "unfamiliar": Score("share of images unlike those of training", ""),
    "set_coverage": Score(
        "coverage of the sets",
        "share of cases whose true class is in the set of classes given; should be what was asked "
        "for",
        "Vovk et al., Algorithmic Learning in a Random World, 2005",
    ),
    "set_size": Score("size of the sets", "mean number of classes in a set; 1 is a plain answer"),
    "ap50": Score(
        "AP at IoU .5",
        "average precision of boxes, where a box is a hit if it overlaps an object it is alone to "
        "claim by an intersection over union of at least .5; 1 is perfect",
        "Everingham et al., IJCV 88, 2010; computed as COCO does",
    ),
    "ap75": Score("AP at IoU .75", "as AP at IoU .5, with boxes that fit closely"),
    "ap": Score(
        "AP at IoU .5 to .95",
        "average precision, the mean over overlaps of .5, .55 to .95 (COCO); asks for boxes that "
        "fit",
        "Lin et al., ECCV 2014",
    ),
    "froc": Score(
        "FROC",
        "mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives an image",
        "Setio et al. (LUNA16), Medical Image Analysis 42, 2017",
    ),
    "false_positives_an_image": Score(
        "false positives an image", "boxes that hit nothing, a mean over the images"
    ),
    "dice": Score(
        "Dice",
        "twice the overlap of prediction and truth over the sum of both; 1 is the same, 0 is apart",
        "Dice, Ecology 26, 1945",
    ),
    "iou": Score(
        "IoU",
        "intersection over union: overlap of prediction and truth over what either covers",
    ),
    "hd95": Score(
        "HD95, mm or pixels",
        "Hausdorff distance: that within which 95 % of either outline lies from the other, the "
        "worse of both; less is better; what was missed wholly counts as the image's diagonal; in "
        "pixels where the files state no spacing",
        "Huttenlocher et al., IEEE TPAMI 15, 1993",
    ),
    "nsd": Score(
        "surface Dice (NSD)",
        "normalised: share of both outlines that lies within a tolerance of the other, which the "
        "configuration names in mm (evaluation.nsd_tolerance)",
        "Nikolov et al., JMIR 23, 2021",
    ),
    "instance_ap50": Score(
        "instance precision at IoU .5",
        "hits over hits, false alarms and misses of an image (Data Science Bowl 2018)",
        "Caicedo et al., Nature Methods 16, 2019",
    ),
    "panoptic_quality": Score(
        "panoptic quality",
        "how well objects are found, times how well those found are outlined",
        "Kirillov et al., CVPR 2019",
    ),
    "loss": Score("loss", "what training makes small"),
    "size": Score("size predicted", "volume in cubic mm, or area in square mm or pixels"),
    "true_size": Score("true size", "likewise"),
    "label": Score("true class", ""),
    "hits": Score("objects found", ""),
    "false_alarms": Score("false alarms", ""),
    "set": Score("conformal set", "classes that cannot be ruled out"),
    "no_information_rate": Score("accuracy of always saying the commonest class", ""),
}
"""By the name that summary.json and cases.csv have."""

RANKED_BY = {
    "classification": "the probability that was given to what is true",
    "detection": "F1 of the boxes above the threshold at IoU .5",
    "segmentation": "Dice",
}
"""What the score of a case is, by task."""

EXPLAINED = {
    "decisions": (
        "What was fixed on the validation part and is applied unchanged to all other data: a "
        "temperature that is to make probabilities mean what they say (it did where the "
        "calibration error is less than above), the thresholds of decisions, and sets of classes "
        "that hold the true one as often as was asked for; an empty set says that no class is "
        "likely enough. All other tables, plots and subgroups take the likeliest class. On the "
        "validation part itself each case is judged by what the others fix (cross-fitting), where "
        "it can be."
    ),
    "familiarity": (
        "Mahalanobis distance to training cases in the features of a layer. Beyond the threshold "
        "an image is called unlike those of training: predictions for it should not be trusted. "
        "One within the threshold may be of another kind all the same."
    ),
}
"""What a further part of a summary holds, by its key."""

_KEYS = {
    "decisions": "what is decided",
    "training_cases": "training cases that others are compared with",
    "layer": "layer of the features",
    "farthest": "called so beyond a distance of",
    "usual": "share of the validation cases beyond it",
    "scoring": "how scores were taken",
    "nsd_tolerance": "distance that surface Dice forgives, in mm",
    "fixed_on": "fixed on",
    "rule": "rule of the operating point",
    "temperature": "temperature (1 changes nothing)",
    "set_threshold": "least probability of a class in a set",
    "coverage": "share of sets that are to hold the true class",
    "biases": "bias of each class's logit (0: temperature alone)",
    "thresholds": "least probability of each class to decide for it",
    "slopes": "slope of each class's logit",
    "intercepts": "intercept of each class's logit",
    "slope": "slope from a box's score to its probability to be a hit",
    "intercept": "intercept of the same",
    "n": "number",
    "cases": "cases",
    "familiarity": "images unlike those of training",
    "threshold": "least probability of the last class to decide for it (–: the likelier class is)",
    "score_threshold": "least score of a box to be drawn and counted",
    "judged": "judged",
    "independent": "classes independent of each other",
    "ensemble": "models that predict together",
    "also_in_training": "cases whose names were trained on",
    "parameters_sha256": "digest of the weights (SHA-256)",
    "data_sha256": "digest of the data (SHA-256)",
    "data_path": "place of the data",
    "main_score": "score that chose the checkpoint",
    "resampled": "unit of resampling",
    "part": "part",
    "step": "training step of the weights",
    "overrides": "settings other than in training",
}


def score_title(name: str) -> str:
    """The words for a score, with the class where it has one.

    >>> score_title("dice/anterior")
    'Dice, anterior'
    >>> score_title("ece_calibrated")
    'calibration error (ECE), calibrated'
    """
    kind, _, of_class = name.partition("/")
    base = kind.removesuffix("_calibrated")
    title = SCORES[base].title if base in SCORES else base.replace("_", " ")
    parts = (title, "calibrated" if base != kind else "", of_class)
    return ", ".join(part for part in parts if part)


def part_title(part: str) -> str:
    """A part of the data in words; what follows the name of a known part is kept.

    >>> part_title("val"), part_title("all of other_data")
    ('validation', 'all of other_data')
    """
    first, blank, rest = part.partition(" ")
    return {"train": "training", "val": "validation"}.get(first, first) + blank + rest


def key_title(key: str) -> str:
    """The words for a key of a summary."""
    if key in _KEYS:
        return _KEYS[key]
    return score_title(key) if key in SCORES else key.replace("_", " ")


def glossary(names: Iterable[str]) -> list[tuple[str, str]]:
    """Title and meaning of each kind of score among the names, with its source."""
    kinds = dict.fromkeys(name.partition("/")[0].removesuffix("_calibrated") for name in names)
    pairs = []
    for kind in kinds:
        if kind in SCORES and SCORES[kind].meaning:
            title, meaning, source = SCORES[kind]
            pairs.append((title, meaning + (f" ({source})" if source else "")))
    if pairs:
        pairs.append(
            (
                "95 % interval",
                "range within which the score of all such cases is expected to lie, from drawing "
                "these cases anew (bootstrap); it knows nothing of other hospitals or scanners",
            )
        )
    return pairs


def number(value: Any) -> str:
    """Four significant digits at most, of larger ones those before the point; a dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.4g}"


def score(value: Any) -> str:
    """Three decimals, so that a column of scores is easily compared."""
    if isinstance(value, float) and (value == 0 or 0.001 <= abs(value) < 1000):
        return f"{value:.3f}"
    return number(value)


def interval(entry: Any) -> str:
    """The interval of a score, or why there is none."""
    if entry.get("value") is None:
        return "undefined"
    if entry.get("low") is None or entry.get("high") is None:
        return "no spread" if entry.get("no_spread") else "–"
    return f"{score(entry['low'])} to {score(entry['high'])}"


def with_interval(entry: Any) -> str:
    """A score with its interval, in a cell."""
    if not entry or entry.get("value") is None:
        return "–"
    return f"{score(entry['value'])} ({interval(entry)})"
