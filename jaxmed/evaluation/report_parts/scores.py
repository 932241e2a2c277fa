"""The scores of one part of the data, and what else its summary tells, in tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.evaluation.report_parts.blocks import (
    Block,
    Bullets,
    Details,
    Heading,
    Section,
    Table,
    Terms,
    Text,
)
from jaxmed.evaluation.report_parts.words import (
    EXPLAINED,
    glossary,
    interval,
    key_title,
    number,
    part_title,
    score,
    score_title,
    with_interval,
)
from jaxmed.types import count_of

_MOST_SCORES = 4
_TOLD = ("metrics", "members", "spread", "subgroups", "notes", "prevalence", "no_information_rate")
_TECHNICAL = (
    *("step", "parameters_sha256", "part", "main_score", "data_path", "data_sha256"),
    *("overrides", "data", "data_name", "ensemble"),
)
_MOST_LETTERS = 300


def headline(part: str, summary: Mapping[str, Any], *, data: str, checkpoint: str) -> str:
    """The main score of a part in a sentence.

    Args:
        part: of the data.
        summary: the content of its summary.json.
        data: which data; the part of it is added.
        checkpoint: which weights predicted.
    """
    main, metrics = _main_score(summary), summary.get("metrics", {})
    entry = metrics.get(main, {})
    of = _of_data(part, summary, data)
    if entry.get("value") is None:
        return f"{score_title(main)} of {of} is undefined."
    known = entry.get("low") is not None and entry.get("high") is not None
    bounds = f" (95 % interval {interval(entry)})" if known else ""
    drawn = summary.get("resampled")
    unit = f", intervals by drawing {drawn} anew" if known and drawn else ""
    cases = count_of(entry["n"], "case") if isinstance(entry.get("n"), int) else "its cases"
    weights = f" Predicted by {checkpoint}." if checkpoint else ""
    # Of instances Dice is of their union, and says nothing of how well they are told apart.
    objects = "instance_ap50" in metrics and main != "instance_ap50"
    also = f", {_named('instance_ap50', metrics)}," if objects else ""
    return (
        f"{score_title(main)} {score(entry['value'])}{bounds}{also} on {cases} of {of}{unit}."
        f"{weights}"
    )


def _named(name: str, metrics: Mapping[str, Any]) -> str:
    return f"{score_title(name)} {with_interval(metrics[name])}"


def _of_data(part: str, summary: Mapping[str, Any], data: str) -> str:
    """Which cases of which data, in words."""
    name = summary.get("data_name") or data
    return f"all of {name}" if part == "all" else f"the {part_title(part)} part of {name}"


def _main_score(summary: Mapping[str, Any]) -> str:
    # Summaries from before it was noted have it first.
    return summary.get("main_score") or next(iter(summary.get("metrics", {})), "score")


def score_section(part: str, summary: Mapping[str, Any], *, data: str = "") -> Section:
    """All that a summary holds: scores, classes, models, subgroups, decisions, technicalities.

    Args:
        part: of the data.
        summary: the content of its summary.json.
        data: the name of the run's own; other data are named in the title.
    """
    other = summary.get("data_name", data) != data
    title = _of_data(part, summary, data) if other else part_title(part)
    part, metrics = part_title(part), summary.get("metrics", {})
    blocks: list[Block] = [_overall(part, metrics, summary), *_classes(part, metrics)]
    if metrics:
        terms = Terms(glossary(metrics))
        blocks.append(Details("What these scores mean", [terms]))
    if "prevalence" in summary:
        rows = [[name, f"{share:.1%}"] for name, share in summary["prevalence"].items()]
        blocks.append(Table("Prevalence", ("class", "share of cases"), rows, 1))
    blocks += _members(summary)
    for column, found in summary.get("subgroups", {}).items():
        blocks += _subgroups(column, found, _main_score(summary))
    for key, value in summary.items():
        if isinstance(value, Mapping) and value and key not in (*_TOLD, *_TECHNICAL):
            blocks += nested(key, value)
    technical = _flat({k: v for k, v in summary.items() if k in _TECHNICAL or _plain_key(k, v)})
    if technical:
        table = Table(f"Technical details of {part}", ("what", "value"), technical)
        blocks.append(Details("Technical details of this evaluation", [table]))
    return Section(f"Scores: {title}", blocks)


def _plain_key(key: str, value: Any) -> bool:
    return key not in _TOLD and not isinstance(value, Mapping)


def _overall(part: str, metrics: Mapping[str, Any], summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, entry in metrics.items():
        if "/" in name:
            continue
        cells = score(entry.get("value")), interval(entry), number(entry.get("n"))
        rows.append([score_title(name), *cells])
        if name == "accuracy" and summary.get("no_information_rate") is not None:
            chance = score(summary["no_information_rate"])
            rows.append([key_title("no_information_rate"), chance, "", ""])
    return Table(f"Scores of {part}", ("score", "value", "95 % interval", "n"), rows, 3)


def _classes(part: str, metrics: Mapping[str, Any]) -> list[Block]:
    """Each class with each score, and n where it is not that of the first score of the class."""
    kinds = dict.fromkeys(name.partition("/")[0] for name in metrics if "/" in name)
    names = dict.fromkeys(name.partition("/")[2] for name in metrics if "/" in name)
    if not names:
        return []
    table = []
    for name in names:
        own = [metrics.get(f"{kind}/{name}") or {} for kind in kinds]
        n = next((entry["n"] for entry in own if "n" in entry), None)
        cells = [
            with_interval(entry) + (f", n {number(entry['n'])}" if entry.get("n", n) != n else "")
            for entry in own
        ]
        table.append([name, number(n), *cells])
    head = ["class", "n", *map(score_title, kinds)]
    if len(names) < len(kinds):  # more fits on a page the other way round
        head, *table = ([*line] for line in zip(head, *table, strict=True))
        head[0] = "score"
    caption = f"Scores of each class of {part}, with 95 % intervals"
    return [Table(caption, head, table, len(head) - 1)]


def _members(summary: Mapping[str, Any]) -> list[Block]:
    """The scores of each of the models that were trained together, and their spread."""
    members, spread = summary.get("members", ()), summary.get("spread", {})
    if not members:
        return []
    main = _main_score(summary)
    names = [name for name in members[0]["metrics"] if "/" not in name]
    names = sorted(names, key=lambda name: name != main)[:_MOST_SCORES]
    rows = [
        [member["name"], "yes" if member["chosen"] else "no", number(member["step"])]
        + [with_interval(member["metrics"].get(name)) for name in names]
        for member in members
    ]
    if spread:
        told = [spread.get(name, {}) for name in names]
        cells = [f"{score(s.get('mean'))} ± {score(s.get('std'))}" for s in told]
        rows.append(["mean ± standard deviation", "", "", *cells])
    words = (
        f"{count_of(len(members), 'model')} were trained together, with other folds of the data, "
        "random numbers or settings, as their names say. Each is scored here alone, on the "
        f"validation cases that it did not learn from, at the step where its {score_title(main)} "
        "was best. Those that say yes predict together for other data. Intervals say what other "
        "cases would change, the spread of the models what other training would."
    )
    head = ("model", "predicts", "step", *map(score_title, names))
    table = Table("Each model on its own part", head, rows, len(head) - 2)
    return [Heading("The models"), Text(words), table]


def _subgroups(column: str, found: Mapping[str, Any], main: str) -> list[Block]:
    """A row a subgroup, with its difference to the largest one."""
    groups, reference = found.get("groups"), str(found.get("reference", ""))
    if not isinstance(groups, Mapping):
        return nested(f"by {column}", found)
    known = dict.fromkeys([main, *(name for g in groups.values() for name in g["metrics"])])
    names = [
        name
        for name in known
        if any((g["metrics"].get(name) or {}).get("value") is not None for g in groups.values())
    ][:_MOST_SCORES]
    rows = []
    for name, group in groups.items():
        cells = [with_interval(group["metrics"].get(kind)) for kind in names]
        differs = with_interval(group.get("differences", {}).get(names[0])) if names else "–"
        differs = "compared with" if name == reference else differs
        few = " (too few cases for a score)" if group.get("few") else ""
        rows.append([f"{name}{few}", number(group["n"]), *cells, differs])
    more = f"{score_title(names[0])} less that of {reference}" if names else "difference"
    head = (column, "n", *map(score_title, names), more)
    return [Table(f"Scores by {column}, with 95 % intervals", head, rows, len(head) - 1)]


def nested(key: str, value: Mapping[str, Any]) -> list[Block]:
    """What another part of a summary holds: scores as a table of scores, the rest as a list."""
    scores = _score_entries(value)
    rest = _flat({k: v for k, v in value.items() if k not in _score_keys(value)})
    title = key_title(key)
    title = title[:1].upper() + title[1:]
    blocks: list[Block] = [Heading(title)]
    if key in EXPLAINED:
        blocks.append(Text(EXPLAINED[key]))
    if scores:
        rows = [
            [score_title(name), score(entry["value"]), interval(entry), number(entry.get("n"))]
            for name, entry in scores.items()
        ]
        head = ("score", "value", "95 % interval", "n")
        blocks.append(Table(f"{title}: scores", head, rows, 3))
    if rest:
        blocks.append(Table(f"{title}: numbers", ("what", "value"), rest))
    return blocks


def _is_score(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _score_keys(value: Mapping[str, Any]) -> list[str]:
    return [k for k, v in value.items() if _is_score(v) or (k == "metrics" and v)]


def _score_entries(value: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in value.items() if _is_score(v)}
    inner = value.get("metrics")
    return {**(inner if isinstance(inner, Mapping) else {}), **own}


def _flat(value: Mapping[str, Any], before: Sequence[str] = ()) -> list[list[str]]:
    """Rows of words and value, nested keys one after the other."""
    rows: list[list[str]] = []
    for key, found in value.items():
        path = [*before, key_title(key)]
        if _is_score(found):
            rows.append([": ".join(path), with_interval(found)])
        elif isinstance(found, Mapping):
            rows += _flat(found, path) or [[": ".join(path), "none"]]
        else:
            rows.append([": ".join(path), clipped(found)])
    return rows


def clipped(value: Any) -> str:
    """A value as text, cut where it is very long."""
    if isinstance(value, (list, tuple)):
        plain = all(not isinstance(v, (Mapping, list, tuple)) for v in value)
        text = ", ".join(map(number, value)) if plain else json.dumps(value, default=str)
    else:
        text = number(value) if not isinstance(value, Mapping) else json.dumps(value, default=str)
    text = text or "none"
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"


def warnings_of(part: str, summary: Mapping[str, Any], *, told: Sequence[str] = ()) -> list[str]:
    """What a reader of the scores must know first, but for the notes `told` elsewhere."""
    warnings = []
    if summary.get("also_in_training"):
        known = count_of(summary["also_in_training"], "case")
        warnings.append(f"{part}: trained on {known} of these, so the scores are too good.")
    notes = [note for note in summary.get("notes", ()) if note not in told]
    return [*warnings, *(f"{part}: {note}" for note in notes)]


def warning_section(warnings: Sequence[str]) -> Section:
    """Each warning once."""
    once = list(dict.fromkeys(warnings))
    return Section("Warnings", [Bullets(once, "warning")] if once else [])
