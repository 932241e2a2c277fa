"""One self-contained HTML page: scores with intervals, training curves, pictures of cases."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxmed.evaluation.pictures import picture_to_base64
from jaxmed.types import count_of

GROUPS = ("worst", "typical", "best")
_AXES = ("step", "epoch", "seconds", "split", "models")
_MOST_SCORES = 4
_MOST_CASES = 5  # of a finding
_MOST_VALUES = 160  # letters of one value of the config

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --dim: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; overflow-wrap: anywhere; }
h1 { margin-top: 0; }
h3 { font-size: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: left;
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; }
.wide { overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; background: var(--soft); border-radius: .4rem; }
figure img { max-width: 100%; height: auto; display: block; margin: auto; background: white; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; padding-top: .4rem; }
.dim { color: var(--dim); font-size: .85rem; }
summary { cursor: pointer; }
""".strip()


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    summaries: Mapping[str, Mapping[str, Any]] | None = None,
    cases: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
    shown: str = "",
    notes: Sequence[str] = (),
    findings: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the report of one experiment; the page loads nothing from elsewhere.

    Args:
        path: of the HTML file.
        title: of the page.
        config: resolved, nested or flat.
        history: lines of metrics.jsonl.
        summaries: by part, what evaluation/PART/summary.json holds.
        cases: by group ("worst", "typical", "best", or others), each with `id`, `score`, `caption`
            and a picture.
        curves: figures, each with a picture and a `caption`. A picture is PNG: its base64 text in
            `picture_base64`, or its file in `picture`.
        shown: of which data the curves and the cases are.
        notes: what a reader must know, a sentence each.
        findings: what stands out in the data, the worst first; fields of a
            `jaxmed.data.examination.Finding`.

    Returns:
        The path.
    """
    sections = [
        _notes(notes),
        *(_summary(split, summary, notes) for split, summary in (summaries or {}).items()),
        _figures(_heading("Curves", shown), curves),
        _training(history),
        _cases(_heading("Cases", shown), cases or {}),
        _findings(findings),
        _config(config),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Even text that escaped the escaping could load and run nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _text(value: Any) -> str:
    """Any value as text that HTML shows and does not read."""
    return html.escape(str(value), quote=True)


def _number(value: Any) -> str:
    """Four significant digits at most; a dash where there is no value."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _text(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _score(value: Any) -> str:
    """Three decimals, so that a column of scores is easily compared."""
    if isinstance(value, float) and 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return _number(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> str:
    """A table of cells that are HTML already; the last `numbers` columns are numbers."""
    kinds = [""] * (len(head) - numbers) + [' class="number"'] * numbers
    top = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return "<ul>\n" + "\n".join(f"<li>{_text(note)}</li>" for note in notes) + "\n</ul>"


def _summary(split: str, summary: Mapping[str, Any], told: Sequence[str]) -> str:
    """The scores of one part with their intervals, and what else the summary says but `told`."""
    rows = []
    for name, score in summary.get("metrics", {}).items():
        value, low, high = (_score(score.get(key)) for key in ("value", "low", "high"))
        interval = f"{low} to {high}" if (low, high) != ("–", "–") else "–"
        rows.append([_text(name), value, interval, _number(score.get("n"))])
    head = ("score", "value", "95 % interval", "n")
    rest = [
        f"{_text(key)} {_text(_clipped(value))}"
        for key, value in summary.items()
        if key != "metrics" and not isinstance(value, (dict, list))
    ]
    more = f'\n<p class="dim">{" · ".join(rest)}</p>' if rest else ""
    warning = ""
    if summary.get("also_in_training"):
        known = count_of(summary["also_in_training"], "case")
        warning = f"<p><strong>Trained on: {known} of these.</strong></p>\n"
    members = _members(summary)
    table = _table(head, rows, numbers=3)
    notes = _notes([note for note in summary.get("notes", ()) if note not in told])
    return f"<h2>Scores: {_text(split)}</h2>\n{warning}{notes}{table}{more}{members}"


def _members(summary: Mapping[str, Any]) -> str:
    """The scores of each of the models that were trained together, and their spread."""
    members, spread = summary.get("members", ()), summary.get("spread", {})
    if not members:
        return ""
    main = summary.get("main_score")  # which of runs from before it was noted is just the first
    names = [n for n in members[0]["metrics"] if "/" not in n]
    names = sorted(names, key=lambda name: name != main)[:_MOST_SCORES]
    rows = [
        [_text(member["name"]), str(member["step"]), "yes" if member["chosen"] else ""]
        + [_interval(member["metrics"].get(name, {})) for name in names]
        for member in members
    ]
    if spread:
        told = [spread.get(name, {}) for name in names]
        cells = [f"{_score(s.get('mean'))} ± {_score(s.get('std'))}" for s in told]
        rows.append(["mean ± standard deviation", "", "", *cells])
    head = ("model", "step", "predicts", *names)
    return f"\n<h3>Each model on its own part</h3>\n{_table(head, rows, numbers=len(names))}"


def _interval(score: Mapping[str, Any]) -> str:
    value, low, high = (_score(score.get(key)) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _clipped(value: Any) -> str:
    """A value as text, cut where it is very long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_VALUES else f"{text[: _MOST_VALUES - 1]}…"


def _picture(entry: Mapping[str, Any], *, alt: str) -> str:
    """An image element with the picture in it, or nothing."""
    data = entry.get("picture_base64")
    if not data and entry.get("picture"):
        data = base64.b64encode(Path(entry["picture"]).read_bytes()).decode("ascii")
    if not data:
        return ""
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{_text(data)}">'


def _figures(heading: str, entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    shown = "\n".join(
        f"<figure>{_picture(entry, alt=entry.get('caption', heading))}"
        f"<figcaption>{_text(entry.get('caption', ''))}</figcaption></figure>"
        for entry in entries
    )
    return f"<h2>{_text(heading)}</h2>\n{shown}"


def _heading(words: str, shown: str) -> str:
    return f"{words} of {shown}" if shown else words


def _cases(heading: str, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Pictures of cases, the worst first: they teach the most."""
    order = [name for name in GROUPS if name in groups] + [n for n in groups if n not in GROUPS]
    parts = []
    for name in order:
        cards = "\n".join(
            f"<figure>{_picture(case, alt=str(case['id']))}<figcaption><b>{_text(case['id'])}</b> "
            f"{_number(case.get('score'))}<br>{_text(case.get('caption', ''))}"
            "</figcaption></figure>"
            for case in groups[name]
        )
        parts.append(f'<h3>{_text(name.capitalize())}</h3>\n<div class="cards">\n{cards}\n</div>')
    return f"<h2>{_text(heading)}</h2>\n" + "\n".join(parts) if parts else ""


def _training(history: Sequence[Mapping[str, Any]]) -> str:
    """Loss and scores over the steps, drawn, with the last values in a table."""
    series = _series(history)
    if not series:
        return ""
    losses = {name: points for name, points in series.items() if name.endswith("loss")}
    # What is measured in passing, such as the norm of gradients, and single classes would crowd.
    scores = {
        name: points
        for name, points in series.items()
        if name not in losses and not name.startswith("train ") and "/" not in name
    }
    panels = [group for group in (losses, dict(list(scores.items())[:_MOST_SCORES])) if group]
    shown = ""
    if panels:
        entry = {"picture_base64": picture_to_base64(_draw_series(panels))}
        shown = f"<figure>{_picture(entry, alt='loss and validation scores')}</figure>\n"
    rows = [
        [_text(name), str(points[-1][0]), _number(points[-1][1])] for name, points in series.items()
    ]
    table = _table(("series", "step", "last value"), rows, numbers=2)
    return f"<h2>Training</h2>\n{shown}<details><summary>Last values</summary>\n{table}\n</details>"


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number that was logged, by "split name"."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in history:
        if "step" not in line:
            continue
        for name, value in line.items():
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in _AXES or not numeric or not math.isfinite(value):
                continue
            series.setdefault(f"{line.get('split', 'train')} {name}", []).append(
                (int(line["step"]), float(value))
            )
    return series


def _draw_series(panels: Sequence[Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, group in zip(axes, panels, strict=True):
        for name, points in group.items():
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 30 else ""
            axis.plot(steps, values, marker=marker, linewidth=1.2, label=name.replace("$", r"\$"))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    if not findings:
        return ""
    rows = []
    for finding in findings:
        cases = "; ".join(finding["cases"][:_MOST_CASES])
        more = len(finding["cases"]) - _MOST_CASES
        cases += f" and {more} more" if more > 0 else ""
        told = (finding["severity"], finding["kind"], cases, finding["advice"])
        rows.append([*map(_text, told), str(len(finding["cases"]))])
    head = ("", "what", "where", "what to do", "n")
    return f"<h2>Data</h2>\n{_table(head, rows, numbers=1)}"


def _config(config: Mapping[str, Any]) -> str:
    rows = [[_text(key), _text(_clipped(value))] for key, value in _flatten(config)]
    table = _table(("key", "value"), rows, numbers=0)
    return f"<h2>Configuration</h2>\n<details><summary>All keys</summary>\n{table}\n</details>"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values."""
    flat: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
