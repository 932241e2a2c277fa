"""The table that any layout may carry: which part, label and patient a file has."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jaxmed.data.formats.common import safe_path
from jaxmed.data.sources.findings import LEFT_OUT, PARTS, Findings, part_name, some
from jaxmed.types import UserError, count_of

MANIFESTS = ("manifest.csv", "split.csv")  # read in this order: the latter has the last word


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the manifest says of one case; "" where it says nothing.

    Attributes:
        listed: whether the manifest names the case at all.
        part: "train", "val" or "test", or `LEFT_OUT`.
        label: name of a class.
        patient: group that must not be split.
    """

    listed: bool = False
    part: str = ""
    label: str = ""
    patient: str = ""

    @property
    def used(self) -> bool:
        """Whether the case is a part of the data set at all."""
        return self.part != LEFT_OUT


def read_entries(
    root: Path,
    *,
    files: Sequence[Sequence[Path]],
    stems: Sequence[str],
    findings: Findings,
    label_column: str | None = None,
) -> list[Entry] | None:
    """Read what `manifest.csv` and `split.csv` in a folder say of each case.

    Rows name a case by `file` (path from the folder) or by `id` (stem). Columns other than
    `split`, `patient` and the one of labels are ignored. Rows that name no case, and values that
    mean nothing, are added to `findings`.

    Args:
        root: the folder that may hold a manifest.
        files: the files of each case.
        stems: the stem of each case.
        findings: where problems and notes go.
        label_column: the column that holds the labels; None if they are not wanted.

    Returns:
        One entry a case, or None where there is no manifest. Who asked must go on without the
        cases that are not used, before anything is looked for in them.

    Raises:
        UserError: if a manifest cannot be read, leads out of its folder or leaves out all cases.
    """
    paths = [root / name for name in MANIFESTS if (root / name).is_file()]
    if not paths:
        above = [name for name in MANIFESTS if (root.resolve().parent / name).is_file()]
        if above:
            findings.notes.append(
                f"The {' and '.join(above)} in the folder above is not used, nor any patients, "
                "parts and labels in it; to use it give that folder as data.path."
            )
        return None
    by_file: dict[str, list[int]] = defaultdict(list)
    by_stem: dict[str, list[int]] = defaultdict(list)
    for case, (case_files, stem) in enumerate(zip(files, stems, strict=True)):
        by_stem[stem].append(case)
        for path in case_files:
            if path.is_relative_to(root):
                by_file[path.relative_to(root).as_posix()].append(case)
    entries = [Entry() for _ in stems]
    for path in paths:
        table = _read_table(path)
        wanted = _wanted_columns(table, label_column)
        if not wanted:
            findings.notes.append(
                f"{path.name} has no split, patient or label column and tells none of these; it "
                f"has {', '.join(table.columns)}."
            )
            continue
        _match_rows(table, wanted, by_file, by_stem, entries, findings)
        unlisted = [stem for stem, entry in zip(stems, entries, strict=True) if not entry.listed]
        if unlisted:
            findings.notes.append(
                f"{len(unlisted)} of {len(stems)} cases are not in {path.name}: {some(unlisted)}."
            )
    left_out = [stem for stem, entry in zip(stems, entries, strict=True) if not entry.used]
    if len(left_out) == len(stems):
        raise UserError(f"{root}: {paths[-1].name} leaves out all cases (split none)")
    if left_out:
        findings.notes.append(
            f"{count_of(len(left_out), 'case')} of {len(stems)} left out, as the manifest says: "
            f"{some(left_out)}."
        )
    return entries


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a manifest.

    Raises:
        UserError: if it cannot be read.
    """
    table = _read_table(path)
    return table.columns, [row for _, row in table.rows]


def read_columns(
    root: Path,
    columns: Sequence[str],
    *,
    files: Sequence[Sequence[Path]],
    ids: Sequence[str],
) -> dict[str, list[str]]:
    """What `manifest.csv` and `split.csv` say of each case in columns of any meaning.

    Args:
        root: the folder that holds them.
        columns: wanted.
        files: the files of each case, which rows name by `file`.
        ids: the name of each case, which rows name by `id`.

    Returns:
        For each column a value a case; "" where nothing is said.

    Raises:
        UserError: if a column is in neither file.
    """
    tables = [_read_table(root / name) for name in MANIFESTS if (root / name).is_file()]
    # Names of patients stay out of what is written.
    hidden = {"file", "id", "patient", ""}
    named = sorted({column for table in tables for column in table.columns} - hidden)
    case_of = {name: case for case, name in enumerate(ids)}
    for case, paths in enumerate(files):
        places = [path.resolve() for path in paths]
        inside = [path for path in places if path.is_relative_to(root.resolve())]
        case_of |= {path.relative_to(root.resolve()).as_posix(): case for path in inside}
    found = {}
    for column in columns:
        if column not in named:
            raise UserError(
                f"{root}: no manifest.csv or split.csv with a column {column!r}; "
                f"there is {', '.join(named) or 'none'}"
            )
        values = found[column] = [""] * len(ids)
        for table in tables:
            for _, row in table.rows:
                name = row.get("id", "")
                if row.get("file"):
                    name = safe_path(row["file"], where=str(table.path))
                if name in case_of and row.get(column):
                    values[case_of[name]] = row[column]
    return found


def has_column(root: Path, column: str) -> bool:
    """Whether a manifest in this folder has the column; False where there is none.

    Raises:
        UserError: if the manifest cannot be read.
    """
    paths = [root / name for name in MANIFESTS if (root / name).is_file()]
    return any(column in _read_table(path).columns for path in paths)


@dataclasses.dataclass(frozen=True)
class _Table:
    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]  # with the line's number, as a spreadsheet shows it


def _read_table(path: Path) -> _Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as a UTF-8 table: {error}; save it anew"
        ) from error
    columns = [column.strip() for column in lines[0]] if lines else []
    repeated = sorted({column for column in columns if column and columns.count(column) > 1})
    if repeated:
        raise UserError(f"{path}: the header names {', '.join(repeated)} more than once")
    if "file" not in columns and "id" not in columns:
        raise UserError(
            f"{path}: has the columns {', '.join(columns) or 'of an empty file'}; expected one "
            "called file (path from this folder) or id (name without suffix)"
        )
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise UserError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(columns)}"
            )
        rows.append((number, dict(zip(columns, (cell.strip() for cell in cells), strict=True))))
    return _Table(path, columns, rows)


def _wanted_columns(table: _Table, label_column: str | None) -> dict[str, str]:
    """The field of an Entry that each useful column fills."""
    fields = {"split": "part", "patient": "patient"}
    if label_column is not None:
        fields[label_column] = "label"
    return {column: field for column, field in fields.items() if column in table.columns}


def _match_rows(
    table: _Table,
    wanted: dict[str, str],
    by_file: dict[str, list[int]],
    by_stem: dict[str, list[int]],
    entries: list[Entry],
    findings: Findings,
) -> None:
    """Fill in the entries from the rows of one table."""
    seen: dict[int, int] = {}
    unmatched: list[tuple[str, int]] = []
    for number, row in table.rows:
        where = f"{table.path.name} row {number}"
        if row.get("file"):
            name = safe_path(row["file"], where=f"{table.path} row {number}")
            cases = by_file.get(name, [])
        else:
            name = row.get("id", "")
            cases = by_stem.get(name, [])
        values = {field: row[column] for column, field in wanted.items() if row[column]}
        stated = values.get("part", "")
        # Only a table says so: a folder may well be called that.
        part = LEFT_OUT if stated.lower() == LEFT_OUT else part_name(stated)
        if not cases:
            unmatched.append((name, number))
        elif len(cases) > 1:
            findings.problems.append(f"{where}: {len(cases)} images are called {name!r}")
        elif cases[0] in seen:
            findings.problems.append(f"{where}: {name!r} is already in row {seen[cases[0]]}")
        elif "part" in values and part is None:
            findings.problems.append(
                f"{where}: split is {values['part']!r}, expected {', '.join(PARTS)}, {LEFT_OUT} "
                "(not to be used) or nothing"
            )
        else:
            if part is not None:
                values["part"] = part
            entries[cases[0]] = dataclasses.replace(entries[cases[0]], listed=True, **values)
        for case in cases:
            seen.setdefault(case, number)
    # Rows of cases that are invalid, and told already, may go with them; others are mistakes.
    known = "\n".join(findings.invalid)
    for name, number in unmatched:
        stem = re.escape(PurePosixPath(name).name.split(".")[0])
        if not stem or not re.search(rf"(?<![\w-]){stem}(?![\w-])", known):
            findings.problems.append(f"{table.path.name} row {number}: no image is called {name!r}")
