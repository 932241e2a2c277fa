"""What a sweep leaves behind: the table, the page, and the winner as a config that runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxmed.build.config import (
    base_config,
    config_of_run,
    flatten,
    read_run,
    replacing,
    update,
)
from jaxmed.build.members import read_members
from jaxmed.build.study import Study
from jaxmed.build.sweep_space import Dimension
from jaxmed.evaluation.sweep_page import write_sweep_page
from jaxmed.evaluation.sweep_ranking import (
    Trial,
    judge_winner,
    rank_trials,
    shown_value,
    table_cells,
    tell_verdict,
    write_ranking,
)

WINNER_FILE = "best.py"

_WINNER = '''"""The winner of a sweep, every key that differs from the defaults.

    python experiments/train.py --config=THIS_FILE --workdir=DIR
"""

from jaxmed.build.config import base_config, update

TASK = {task!r}
SETTINGS = {settings}


def get_config():
    """The config of the winner."""
    config = base_config(TASK)
    update(config, SETTINGS, where="best.py")
    return config
'''


def write_sweep(output: Path, study: Study, config: ConfigDict, space: Sequence[Dimension]) -> None:
    """Write and print everything that a sweep gives; to be called by one worker at a time."""
    trials = study.trials()
    ranked = rank_trials(trials)
    keys = [dimension.key for dimension in space]
    done = [trial for trial in ranked if trial.state == "finished"]
    name = study.facts(done[0].number).get("score_name", "score") if done else "score"
    _print_table(ranked, keys, name)
    with replacing(output / "ranking.csv") as draft:
        write_ranking(draft, ranked, keys)
    winner = ""
    if done:
        facts, workdir = study.facts(done[0].number), output / done[0].workdir
        if workdir.is_dir():
            write_winner(output / WINNER_FILE, workdir, facts.get("model"))
            command = f"python experiments/train.py --config={output / WINNER_FILE} --workdir=DIR"
            winner = f"The winner as a config: {command}"
        else:
            winner = f"{workdir} of the winner is gone; its settings are in the table."
        print(winner)
    importance, at_step = study.importance()
    when = "" if at_step is None else f" (of the score at step {at_step})"
    for key, share in importance.items():
        print(f"importance of {key}: {share:.2f}{when}")
    verdict = judge_winner(trials)
    for i, sentence in enumerate(tell_verdict(verdict)):
        doubtful = i == 0 and verdict is not None and verdict.is_doubtful
        print(f"{'warning' if doubtful else 'note'}: {sentence}")
    running = sum(trial.state == "running" for trial in trials)
    notes = [f"{running} trials were still running when this was written."] if running else []
    for note in notes:
        print(f"note: {note}")
    with replacing(output / "sweep.html") as draft:
        write_sweep_page(
            draft,
            title=f"Sweep of {config.task} on {config.data.name or config.data.layout}",
            trials=trials,
            space={dimension.key: dimension.told() for dimension in space},
            log_keys=[dimension.key for dimension in space if dimension.log],
            importance=importance,
            importance_step=at_step,
            score_name=name,
            winner=winner,
            notes=notes,
        )
    print(f"page: {output / 'sweep.html'}")


def _print_table(ranked: Sequence[Trial], keys: Sequence[str], name: str) -> None:
    table = Table(title="Trials, the best first (scores of the validation part)")
    short = [key.rsplit(".", 1)[-1] for key in keys]
    names = short if len(set(short)) == len(short) else list(keys)
    over = ["SD over seeds"] if any(trial.seeds for trial in ranked) else []
    for column in ("", "trial", name, "95 % interval", *over, "step", *names, "state"):
        table.add_column(escape(column))
    for rank, trial in enumerate(ranked, start=1):
        place = str(rank) if trial.state == "finished" else ""
        score, interval, spread, step = table_cells(trial)
        values = [shown_value(trial.params.get(key, "")) for key in keys]
        known = [score, interval, *([spread] if over else []), step]
        cells = [place, str(trial.number), *known, *values, trial.state]
        table.add_row(*map(escape, cells))
    console = Console()
    if not console.is_terminal:  # a file is as wide as it needs to be
        console = Console(width=80 + 12 * len(keys))
    console.print(table)
    for trial in ranked:
        if trial.state == "failed":
            print(f"trial {trial.number} failed: {trial.message}")


def write_winner(path: Path, workdir: Path, model: str | None) -> None:
    """Write a trial's resolved config as a Python file for train.py.

    Args:
        path: of the file.
        workdir: of the trial's run.
        model: the name of one of its models, where these were trained together.
    """
    run = read_run(workdir)
    config = config_of_run(run)
    for member in read_members(run):
        if member.name == model:
            update(config, {**member.changes, "training.vary": ""}, where=f"trial {model}")
    defaults = flatten(base_config(config.task))
    settings = {k: v for k, v in flatten(config).items() if v != defaults[k]}
    lines = "".join(f"    {key!r}: {_plain(value)!r},\n" for key, value in settings.items())
    text = _WINNER.format(task=config.task, settings="{\n" + lines + "}")
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """A value whose repr is Python's own."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value if isinstance(value, (str, bool, int, float)) else float(value)
