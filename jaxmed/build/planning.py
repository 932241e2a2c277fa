"""Look at a data set and plan how to learn from it, without training."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxmed.build import datasets
from jaxmed.build.checks import check_numbers
from jaxmed.build.config import write_json
from jaxmed.build.prepared import digest_of_code, show_progress
from jaxmed.build.resolve import resolve
from jaxmed.build.workdir import make_folder
from jaxmed.data.examination import CURABLE, SEVERITIES, Finding, examine
from jaxmed.data.file_examination import examine_files
from jaxmed.data.formats.common import safe_path
from jaxmed.data.images import image_stem
from jaxmed.data.looks import BROKEN, OTHER_CHANNELS
from jaxmed.data.manifest import read_table
from jaxmed.data.sources.findings import LEFT_OUT, DataError, some
from jaxmed.data.splits import split_cases
from jaxmed.preprocessing.plan import REASONS
from jaxmed.types import Source, UserError, count_of

PLAN_FILE, QUALITY_FILE, SPLIT_FILE = "plan.json", "quality.json", "split.csv"
LOOKS_FILE = "looks.json"


def plan_run(config: ConfigDict, output: str | Path, *, leave_out: Sequence[str] = ()) -> bool:
    """Print what is wrong with a data set and how it would be learned; write both to a folder.

    Args:
        config: as for training.
        output: folder of `quality.json`, all findings with all cases, and `plan.json`, which
            `--config.plan=FILE` takes; a person may edit it.
        leave_out: kinds of findings to be cured by leaving cases out: `split.csv` in the folder
            then lists all others with their parts. Copied into the data, it takes effect.

    Returns:
        Whether nothing is wrong that would make results wrong, or it is left out.

    Raises:
        UserError: where the data cannot be opened at all, or for a kind that there is not.
    """
    check_numbers(config)
    for kind in leave_out:
        if kind not in CURABLE:
            raise UserError(
                f"--leave_out: {kind!r} is nothing to leave cases out for; expected some of "
                f"{'; '.join(CURABLE)}"
            )
    if leave_out and config.data.layout in ("phantoms", "tfds"):
        raise UserError(f"--leave_out: the layout {config.data.layout} reads no {SPLIT_FILE}")
    output = Path(output)
    make_folder(output)
    source, findings = _open(config)
    split, notes = _split(config, source, findings)
    sizes = ", ".join(f"{part} {len(rows)}" for part, rows in split.items())
    print(f"{source.info.name}: {count_of(len(source), 'case')} ({sizes})")
    # What was left out only to look further is told as an error already.
    said = [n for n in source.notes if not (findings and n.startswith("Left out because"))]
    findings += [Finding("note", "data", "", (note,)) for note in [*said, *notes]]
    known, code = _read_looks(output / LOOKS_FILE)
    progress = show_progress("read", len(source))
    findings += examine(source, split, progress=progress, known=known)
    write_json(output / LOOKS_FILE, {"code": code, "looks": known})
    findings += examine_files(source, sorted(row for rows in split.values() for row in rows))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    useless = {row for f in findings if f.kind in (BROKEN, OTHER_CHANNELS) for row in f.leave_out}
    gone = {row for f in findings if f.kind in leave_out for row in f.leave_out}
    if config.data.invalid == "drop":
        gone |= useless  # as training does
    print_findings(findings, gone=gone)
    write_json(output / QUALITY_FILE, [_described(finding, source) for finding in findings])
    found = {f.kind for f in findings}
    for kind in leave_out:
        if kind not in found:
            like = [other for other in sorted(found) if other.startswith(kind)]
            hint = f"; there is: {', '.join(like)}" if like else ""
            print(f"note: --leave_out: nothing was found that is called {kind!r}{hint}")
    if leave_out:
        write_split(output / SPLIT_FILE, _root(config), source, split, gone)
    if not useless <= gone:
        print(
            f"written: {output / QUALITY_FILE}; no plan: first mend, or leave out with "
            f"--leave_out='{BROKEN},{OTHER_CHANNELS}', what is broken or has other channels"
        )
        return False
    rows = [row for row in split.get("train", ()) if row not in gone]
    if not rows:
        print("no plan: there is no case to train on")
        return False
    _plan(config, source, rows, output)
    print(f"written: {output / QUALITY_FILE}, {output / PLAN_FILE}")
    wrong = [f.kind for f in findings if f.severity == "error" and not _cured(f, gone)]
    if wrong:
        print(f"mend before training, or results will be wrong: {', '.join(dict.fromkeys(wrong))}")
    return not wrong


def _split(
    config: ConfigDict, source: Source, findings: list[Finding]
) -> tuple[dict[str, list[int]], list[str]]:
    """The parts and notes on them; where there are too few cases for parts, all are of train."""
    try:
        return split_cases(
            source.ids,
            patients=source.patients,
            labels=source.labels,
            parts=source.parts,
            fractions=tuple(config.data.fractions),
            seed=config.seed,
        )
    except UserError as error:
        findings.append(Finding("error", "parts", "", (str(error),)))
        return {"train": list(range(len(source)))}, []


def _read_looks(path: Path) -> tuple[dict[str, Any], str]:
    """What an earlier look into this folder left, and the digest of the code that looks."""
    code = digest_of_code("data", "data/formats", "data/sources")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return (stored["looks"] if stored["code"] == code else {}), code
    except (OSError, ValueError, LookupError, TypeError):
        return {}, code  # none, or of another program: all is read anew


def read_findings(folder: Path) -> list[dict[str, Any]]:
    """What `plan_run` wrote to a folder, such as the workdir of a run; nothing where it did not.

    Raises:
        UserError: where it cannot be read.
    """
    path = folder / QUALITY_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it") from error


def _described(finding: Finding, source: Source) -> dict[str, Any]:
    rows = finding.leave_out
    return {**dataclasses.asdict(finding), "leave_out": [source.ids[row] for row in rows]}


def write_split(
    path: Path,
    root: Path,
    source: Source,
    split: Mapping[str, Sequence[int]],
    gone: Collection[int],
) -> None:
    """Write the split, in which the rows that are to be gone have no part.

    Every case is named, since one that is not would keep the part of its folder. What else a
    split.csv in the data says is kept, as this one takes its place: of these cases and, as they
    are, of others, such as those that were left out before.

    Args:
        path: of the file.
        root: folder of the data.
        source: the data set.
        split: rows of each part.
        gone: rows to be left out.
    """
    former = root / SPLIT_FILE
    columns, told = read_table(former) if former.is_file() else ([], [])
    known = {_name_in_table(row): row for row in told}
    more = [column for column in columns if column not in ("file", "id", "split")]
    cases = getattr(source, "cases", None)
    lines = []
    for part, rows in split.items():
        for row in rows:
            name, files = source.ids[row], []
            if cases is not None:
                case = cases[row]
                places = [*case.images, *([] if case.mask is None else [case.mask])]
                files = [p.relative_to(root).as_posix() for p in places if p.is_relative_to(root)]
            # By all that a manifest may call it.
            called = [text for text in (*files, name, *map(image_stem, files)) if text in known]
            old = known.pop(called[0]) if called else {}
            rest = [old.get(column, "") for column in more]
            stated = LEFT_OUT if row in gone else part
            lines.append([files[0] if files else "", name, stated, *rest])
    for old in known.values():
        lines.append([old.get(column, "") for column in ("file", "id", "split", *more)])
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "id", "split", *more], *lines])
    print(f"{path}: leaves out {count_of(len(gone), 'case')}; copy it into the data to use it")


def _name_in_table(row: Mapping[str, str]) -> str:
    """What a row of a manifest calls its case, written as we would."""
    return safe_path(row["file"], where=SPLIT_FILE) if row.get("file") else row.get("id", "")


def _root(config: ConfigDict) -> Path:
    """The folder that may hold a manifest."""
    path = Path(config.data.path)
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def _open(config: ConfigDict) -> tuple[Source, list[Finding]]:
    """The data set, and as findings all that keeps it from being opened as it is."""
    try:
        return datasets.make_source(config), []
    except DataError as error:
        lenient = config.copy_and_resolve_references()
        lenient.data.invalid = "drop"
        try:
            source = datasets.make_source(lenient)
        except DataError as further:
            # All at once: what stands in the way, and what would be left out.
            lines = dict.fromkeys([*str(further).splitlines(), *error.problems])
            raise UserError("\n".join(lines)) from None
        except UserError:
            raise error from None
        advice = "mend the files, or leave these out with --config.data.invalid=drop"
        problems = error.problems or (str(error),)
        return source, [Finding("error", "invalid annotation", advice, tuple(problems))]


def _cured(finding: Finding, gone: Collection[int]) -> bool:
    """Whether nothing of a finding is left without the rows that are gone."""
    return bool(finding.leave_out) and set(finding.leave_out) <= set(gone)


def print_findings(findings: Sequence[Finding], *, gone: Collection[int] = ()) -> None:
    """Print all findings, the worst first, each with its first cases and what to do.

    Args:
        findings: as they are to be printed.
        gone: rows that are left out; of findings that are cured by it nothing is to be done.
    """
    if not findings:
        print("nothing stands out")
    for finding in findings:
        cured = _cured(finding, gone)
        told = "left out" if cured else finding.severity
        print(f"{told}: {finding.kind} ({len(finding.cases)}): {some(finding.cases)}")
        if finding.advice and not cured:
            print(f"    {finding.advice}")


def _plan(config: ConfigDict, source: Source, rows: Sequence[int], output: Path) -> None:
    """Print each planned setting with its reason, and write them."""
    config = config.copy_and_resolve_references()
    config.plan = "auto"
    _, settings, _ = resolve(config, source, rows)
    print("plan:")
    for key, value in settings.items():
        print(f"  {key} = {value!r}  ({REASONS.get(key, 'of the data')})")
    write_json(output / PLAN_FILE, settings)
