"""A data set looked at as a whole: what stands out, worst first, with the cases and what to do."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmed.data.burnt_in import CHARACTERS
from jaxmed.data.looks import BROKEN, OTHER_CHANNELS, Look, look_at, pack, unpack
from jaxmed.data.quality import THREADS
from jaxmed.data.sources.base import read_noted
from jaxmed.data.sources.findings import some
from jaxmed.data.splits import PARTS
from jaxmed.types import ChannelsError, UserError, count_of

SEVERITIES = ("error", "warning", "note")
"""Wrong results, likely wrong results, and what one should know; in this order."""

FEWEST_COMPARED = 24
"""Values of a small copy, of which fewer are alike by chance."""

SAME = ("identical images", "nearly identical images")
IN_PARTS, IN_LABELS = "in several parts", "with different labels"
CURABLE = (
    BROKEN,
    OTHER_CHANNELS,
    "image of one value",
    "saturated image",
    "text in the image",
    *(f"{same}{where}" for same in SAME for where in ("", f" {IN_PARTS}", f" {IN_LABELS}")),
    "outlying case",
)
"""Kinds of findings that leaving cases out cures."""

ALIKE = 0.998
"""Correlation of small copies from which images count as near duplicates."""
FAR_OUT = 8.0
"""Distance from the median, in robust standard deviations, from which a number is outlying."""
LEAST_SPREAD = 0.1
"""Of the logarithm of a number: below a factor of 2.2 nothing is outlying."""
FEW = 0.02
"""Share of the cases up to which these are outlying; more of them are how the set is."""
SATURATED = 0.05
"""Share of values at an image's maximum from which its bright parts are cut off."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that stands out in a data set.

    Attributes:
        severity: one of `SEVERITIES`.
        kind: what it is, in two or three words, the same for all of its kind.
        advice: what to do.
        cases: what is concerned: ids, each with what was found.
        leave_out: rows without which it would not be so; none where that does not help.
    """

    severity: str
    kind: str
    advice: str
    cases: tuple[str, ...]
    leave_out: tuple[int, ...] = ()


def examine(
    source: Any,
    split: Mapping[str, Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda done: None,
    known: dict[str, Any] | None = None,
) -> list[Finding]:
    """Read each case once, in parallel, and list all that stands out.

    Args:
        source: a `jaxmed.types.Source`, opened with invalid annotations left out, if any.
        split: rows of each part.
        progress: called with the number of cases read so far.
        known: packed looks at cases by their stamps, from an earlier examination; cases that did
            not change since are not read again. It is left with those of all cases.

    Returns:
        Findings, the worst first.
    """
    rows = sorted({row for members in split.values() for row in members})
    stamps: dict[int, str] = {}
    if known is not None and hasattr(source, "case_stamp"):
        stamps = {row: source.case_stamp(row) for row in rows}  # before anything is read
    unchanged = {row: known[stamp] for row, stamp in stamps.items() if known and stamp in known}
    looks: dict[int, Look] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        look = _looker(source, unchanged)
        for done, (row, found) in enumerate(zip(rows, pool.map(look, rows), strict=True)):
            looks[row] = found
            progress(done + 1)
    if known is not None:
        known.clear()
        known.update({stamp: pack(looks[row]) for row, stamp in stamps.items()})
    part_of = {row: part for part, members in split.items() for row in members}
    findings = [
        *_unreadable(looks),
        *_duplicates(source, looks, part_of),
        *_patients(source, split),
        *_classes(source, looks, split),
        *_doubled_boxes(source, looks),
        *_constant(source, looks),
        *_saturated(source, looks),
        *_written_on(source, looks),
        *_outlying(source, looks),
        *_noted(source, looks),
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def _looker(source: Any, unchanged: Mapping[int, Any]) -> Callable[[int], Look]:
    def look(row: int) -> Look:
        if row in unchanged:
            return unpack(unchanged[row])
        try:
            example, notes = read_noted(source, row)
            return dataclasses.replace(look_at(example), notes=notes)
        except ChannelsError as error:
            return Look(problem=str(error), kind=OTHER_CHANNELS)
        except UserError as error:
            return Look(problem=str(error))

    return look


def _unreadable(looks: Mapping[int, Look]) -> Iterator[Finding]:
    advice = {
        BROKEN: "mend the files, or leave them out",
        OTHER_CHANNELS: "--config.data.channels=1 or 3 converts all; nothing else was looked at",
    }
    for kind, what in advice.items():
        problems = {row: k.problem for row, k in looks.items() if k.problem and k.kind == kind}
        if problems:
            yield Finding("error", kind, what, tuple(problems.values()), tuple(problems))


def _duplicates(
    source: Any, looks: Mapping[int, Look], part_of: Mapping[int, str]
) -> Iterator[Finding]:
    exact: dict[str, list[int]] = defaultdict(list)
    for row, look in looks.items():
        if look.digest:
            exact[look.digest].append(row)
    groups = [rows for rows in exact.values() if len(rows) > 1]
    yield from _group_findings(SAME[0], source, looks, part_of, groups)
    # Of identical images one in each part stands for all of them there.
    first = {(look.digest, part_of[row]): row for row, look in looks.items()}
    pairs = alike(looks, sorted(row for (digest, _), row in first.items() if digest))
    near = [(i, j) for i, j in pairs if looks[i].digest != looks[j].digest]
    yield from _group_findings(SAME[1], source, looks, part_of, near)


def alike(looks: Mapping[int, Look], rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose small copies agree; only images of one shape of copy are compared."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        thumbnail = looks[row].thumbnail
        if thumbnail is not None and thumbnail.size >= FEWEST_COMPARED:
            by_size[thumbnail.size].append(row)
    for members in by_size.values():
        copies = np.stack([t for row in members if (t := looks[row].thumbnail) is not None])
        for start in range(0, len(members), 1024):  # not all products at once
            block = copies[start : start + 1024] @ copies.T
            for i, j in np.argwhere(block > ALIKE):
                if start + i < j:
                    yield members[start + i], members[j]


def _group_findings(
    kind: str,
    source: Any,
    looks: Mapping[int, Look],
    part_of: Mapping[int, str],
    groups: Sequence[Sequence[int]],
) -> Iterator[Finding]:
    told: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    extra: dict[str, list[int]] = defaultdict(list)

    def tell(
        severity: str, what: str, advice: str, rows: Sequence[int], gone: Sequence[int]
    ) -> None:
        described = " = ".join(_where(source, row, looks[row], part_of) for row in rows)
        told[severity, what, advice].append(described)
        extra[what] += gone

    def differ(rows: Sequence[int]) -> bool:
        return source.labels is not None and len({looks[row].classes for row in rows}) > 1

    for rows in groups:
        parts: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            parts[part_of[row]].append(row)
        if differ(rows):
            advice = "find out which label is right; leaving out takes all of them"
            tell("error", f"{kind} {IN_LABELS}", advice, rows, rows)
        if len(parts) > 1:
            # The part that is tested on most stays as it is.
            kept = max(parts, key=PARTS.index)
            gone = [row for row in rows if part_of[row] != kept]
            advice = "leave them out of all parts but one"
            tell("error", f"{kind} {IN_PARTS}", advice, rows, gone)
        for own in parts.values():
            if len(own) > 1 and not differ(own):
                advice = "keep one of each, or know that they count twice"
                tell("warning", kind, advice, own, own[1:])
    for (severity, what, advice), cases in told.items():
        yield Finding(severity, what, advice, tuple(cases), tuple(sorted(set(extra[what]))))


def _where(source: Any, row: int, look: Look, part_of: Mapping[int, str]) -> str:
    """A case with its part, and its label where it has one."""
    label = ""
    if source.labels is not None:
        label = " " + ("+".join(source.info.class_names[c] for c in sorted(look.classes)) or "none")
    return f"{source.ids[row]} ({part_of[row]}{label})"


def _patients(source: Any, split: Mapping[str, Sequence[int]]) -> Iterator[Finding]:
    if source.patients is None:
        return
    parts: dict[str, set[str]] = defaultdict(set)
    cases: dict[str, list[str]] = defaultdict(list)
    for part, rows in split.items():
        for row in rows:
            parts[source.patients[row]].add(part)
            cases[source.patients[row]].append(f"{source.ids[row]} ({part})")
    # By their cases: names of patients stay out of what people share.
    told = tuple(", ".join(cases[p]) for p, found in parts.items() if p and len(found) > 1)
    if told:
        yield Finding("error", "patients in several parts", "split by patient", told)


def _classes(
    source: Any, looks: Mapping[int, Look], split: Mapping[str, Sequence[int]]
) -> Iterator[Finding]:
    names = source.info.class_names
    has_background = source.info.task == "segmentation"
    wanted = set(range(int(has_background), len(names))) if not source.info.instances else set()
    missing = []
    for part, rows in split.items():
        if not rows:
            continue
        seen = set().union(*(_classes_of(source, row, looks[row]) for row in rows))
        missing += [f"{names[c]} in {part}" for c in sorted(wanted - seen)]
    if missing:
        advice = "add cases, or cut the parts anew; scores of a missing class are undefined"
        yield Finding("warning", "class without a case", advice, tuple(missing))
    if has_background:
        empty = tuple(
            source.ids[row]
            for row, look in looks.items()
            if not look.problem and not any(c > 0 for c in look.classes)
        )
        if empty:
            advice = "make sure that there is nothing to see in them"
            yield Finding("note", "mask without foreground", advice, empty)


def _classes_of(source: Any, row: int, look: Look) -> frozenset[int]:
    """The classes of a case; of one that cannot be read, as far as its set knows them."""
    if not look.problem or source.labels is None:
        return look.classes
    label = np.asarray(source.labels[row])
    return frozenset(np.flatnonzero(label).tolist() if label.ndim else [int(label)])


def _doubled_boxes(source: Any, looks: Mapping[int, Look]) -> Iterator[Finding]:
    cases = tuple(
        f"{source.ids[row]}: boxes {i} and {j}"
        for row, look in looks.items()
        for i, j in look.doubled
    )
    if cases:
        yield Finding("warning", "boxes marked twice", "remove one of each pair", cases)


def _constant(source: Any, looks: Mapping[int, Look]) -> Iterator[Finding]:
    rows = tuple(
        row for row, look in looks.items() if look.numbers and look.numbers["range of values"] == 0
    )
    if rows:
        cases = tuple(source.ids[row] for row in rows)
        yield Finding("error", "image of one value", "leave them out: nothing shows", cases, rows)


def _saturated(source: Any, looks: Mapping[int, Look]) -> Iterator[Finding]:
    rows = [row for row, look in looks.items() if look.at_top > SATURATED]
    if rows:
        cases = tuple(f"{source.ids[row]}: {looks[row].at_top:.0%} of its values" for row in rows)
        # A white background, as of stained tissue, is so in all of a set.
        severity = "note" if len(rows) > len(looks) / 2 else "warning"
        advice = "make sure that nothing is lost where the images are brightest"
        yield Finding(severity, "saturated image", advice, cases, tuple(rows))


def _written_on(source: Any, looks: Mapping[int, Look]) -> Iterator[Finding]:
    rows = tuple(row for row, look in looks.items() if look.characters >= CHARACTERS)
    if rows:
        cases = tuple(f"{source.ids[row]}: {looks[row].characters} characters" for row in rows)
        advice = (
            "suspected: look at them; names must not be passed on, and a network may learn from "
            "what is written instead of what is shown"
        )
        yield Finding("warning", "text in the image", advice, cases, rows)


def _outlying(source: Any, looks: Mapping[int, Look]) -> Iterator[Finding]:
    """The few cases far from all others in a number, and numbers in which many cases differ.

    Compared by logarithms, as ratios are what counts.
    """
    rows = [row for row, look in looks.items() if look.numbers]
    if len(rows) < 10:
        return
    told: dict[int, list[str]] = defaultdict(list)
    varied = []
    for name in looks[rows[0]].numbers:
        values = np.array([looks[row].numbers.get(name, np.nan) for row in rows])
        scale = np.median(np.abs(values)) or 1.0
        # Of numbers that may be 0 or below, which have no logarithm, what comes nearest to it; it
        # would hardly tell a tenth of the median, such as a spacing in cm, from the median.
        folded = np.log(values) if (values > 0).all() else np.arcsinh(values / scale)
        middle = np.median(folded)
        # A number that is the same in nearly all cases has no spread of its own.
        spread = max(1.4826 * float(np.median(np.abs(folded - middle))), LEAST_SPREAD)
        far = np.flatnonzero(np.abs(folded - middle) > FAR_OUT * spread)
        if len(far) > max(1, FEW * len(rows)):
            low, high = np.percentile(values, (2.5, 97.5))
            varied.append(f"{name}: {low:.4g} to {high:.4g} in the middle 95 % of the cases")
            continue
        for i in far:
            told[rows[i]].append(f"{name} {values[i]:.4g}, of most {np.median(values):.4g}")
    if varied:
        advice = "make sure that the normalisation and the plan suit all of them"
        yield Finding("note", "wide differences", advice, tuple(varied))
    if told:
        cases = tuple(f"{source.ids[row]}: {'; '.join(words)}" for row, words in told.items())
        yield Finding("warning", "outlying case", "look at them", cases, tuple(told))


def _noted(source: Any, looks: Mapping[int, Look]) -> Iterator[Finding]:
    """What readers of files left out, assumed or converted: one line a note."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, look in looks.items():
        for note in look.notes:
            rows[note].append(row)
    if rows:
        told = (
            f"{note}: {count_of(len(found), 'case')}, {some([source.ids[row] for row in found])}"
            for note, found in rows.items()
        )
        advice = "make sure that nothing is lost or wrong by it"
        yield Finding("note", "files not taken as they are", advice, tuple(told))
