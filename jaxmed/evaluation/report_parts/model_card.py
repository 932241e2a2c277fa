"""A model card: what a reader of a study of a model must be told, and what nobody told yet.

The items are after CLAIM (Mongan et al., Radiology: AI 2, 2020; Tejani et al. 2024), TRIPOD+AI
(Collins et al., BMJ 385, 2024) and model cards (Mitchell et al., FAT* 2019), in our words.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from jaxmed.evaluation.report_parts.blocks import Block, Heading, Section, Terms, Text
from jaxmed.types import UserError

ITEMS: dict[str, dict[str, tuple[str, str]]] = {
    "Purpose": {
        "intended_use": ("Intended use", "who is to use it, on which images, to decide what"),
        "not_for": (
            "Not to be used for",
            "patients, images and decisions that it was not made for",
        ),
        "contact": ("Who made it, and contact", "names, and where to write to"),
    },
    "Data": {
        "data": ("Images", "what they show and how many there are"),
        "origin": (
            "Origin",
            "where, when and on which devices images were taken, and how patients were chosen",
        ),
        "patients": ("Patients", "number, age, sex and how ill they were"),
        "ground_truth": (
            "Ground truth",
            "who annotated what, by which rules, how many readers, and how far they agreed",
        ),
        "split": ("Split", "how cases were divided, and what they have in common"),
        "left_out": ("Left out, repaired or odd", "which cases, and why"),
        "preprocessing": ("Preprocessing", "what is done to an image before the network sees it"),
        "ethics": ("Ethics and privacy", "approval, consent, and how images were made anonymous"),
    },
    "Model and training": {
        "model": ("Model", "the network"),
        "start": ("Initial weights", "random, or from where"),
        "training": ("Training", "loss, optimizer, length, random numbers"),
        "augmentation": ("Augmentation", "how images were changed at random"),
        "selection": ("Choice of the weights", "on which data, by which score"),
        "hardware": ("Hardware and time", "devices, and how long training took"),
        "software": ("Software", "versions"),
    },
    "Performance": {
        "scores": ("Main score", "with its interval, and on which cases"),
        "subgroups": ("Subgroups", "evaluate.py --subgroups=COLUMN of the data's manifest.csv"),
        "calibration": ("Calibration", "how far probabilities can be believed"),
        "external": (
            "Other data",
            "evaluate.py --split=all --config.data.path=OTHER on data of another place",
        ),
        "failures": ("Known failures", "in which cases it errs, and what that would cost"),
    },
    "Limits and terms": {
        "limitations": ("Limitations", "what the figures do not tell"),
        "licence": ("Licence of the images", "under which terms they may be used"),
        "citation": ("Citation", "whom to cite for the data"),
    },
}
"""By heading and key: the name of the item, and what is to be said of it."""

KEYS = tuple(key for items in ITEMS.values() for key in items)


def check_stated(stated: Mapping[str, object], *, where: str) -> None:
    """Refuse statements that no item of the card has.

    Raises:
        UserError: naming the key and those that there are.
    """
    for key, text in stated.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"the items are {', '.join(KEYS)}"
            raise UserError(f"{where}: has {key!r}; {meant}")
        if not isinstance(text, str):
            raise UserError(f"{where}: {key} is {text!r}; it must be text")


def model_card(facts: Mapping[str, str], *, file: str) -> Section:
    """The card, with a mark where nothing is known.

    Args:
        facts: what is known, by the keys of `ITEMS`.
        file: where people state what a run cannot know.
    """
    missing = [key for key in KEYS if not facts.get(key)]
    blocks: list[Block] = []
    if missing:
        words = (
            f"{len(missing)} of {len(KEYS)} items are not stated. State them in {file} of the "
            'workdir, such as {"intended_use": "..."}, by these names: ' + ", ".join(missing) + "."
        )
        blocks.append(Text(words, "warning"))
    for heading, items in ITEMS.items():
        pairs = [
            (title, facts.get(key) or f"not stated: {hint}") for key, (title, hint) in items.items()
        ]
        blocks += [Heading(heading), Terms(pairs)]
    words = "Items after CLAIM (2020, 2024), TRIPOD+AI (2024) and model cards (2019)."
    return Section("Model card", [*blocks, Text(words, "small")])
