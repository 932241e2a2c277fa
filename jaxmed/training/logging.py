"""What a run tells of itself: metrics.jsonl, TensorBoard, a bar on a terminal or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class Logger:
    """Writes the log of a run; to be closed, or used in a `with` statement.

    Args:
        workdir: holds metrics.jsonl and tensorboard/; None writes no files.
        steps: length of the training, for the bar.
        start_step: of the state that training goes on from. Lines of later steps, which will be
            run again, are removed from metrics.jsonl.
        evaluated_step: last evaluation which that state knows of (None: `start_step`).
        tensorboard: whether to write events for TensorBoard.
        bar: whether to draw a bar instead of printing lines; None: if on a terminal.
        quiet: print and write nothing, as all but the first of several processes do.
    """

    def __init__(
        self,
        workdir: str | Path | None = None,
        *,
        steps: int = 0,
        start_step: int = 0,
        evaluated_step: int | None = None,
        tensorboard: bool = True,
        bar: bool | None = None,
        quiet: bool = False,
    ):
        self._steps = steps
        self._quiet = quiet
        self._file: Any = None
        self._events: Any = None
        self._earlier_seconds = 0.0
        self._start = time.monotonic()
        if workdir is not None and not quiet:
            folder = Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / METRICS_FILE
            evaluated = start_step if evaluated_step is None else evaluated_step
            self._earlier_seconds = rewind(path, start_step, evaluated_step=evaluated)
            self._file = path.open("a", encoding="utf-8")
            if tensorboard:
                from tensorboardX import SummaryWriter  # slow to import

                self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        is_bar = sys.stdout.isatty() if bar is None else bar
        self._bar = _Bar(steps, start_step) if is_bar and not quiet else None

    def seconds(self) -> float:
        """Time since the start of the run, with its parts before an interruption."""
        return self._earlier_seconds + time.monotonic() - self._start

    def log(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Write one line: step, split, seconds, and `values`, numbers by name."""
        if self._quiet:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        entry = {"step": step, "split": split, "seconds": round(self.seconds(), 3), **numbers}
        if self._file is not None:
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                if value is not None:
                    self._events.add_scalar(f"{split}/{name}", value, step)
        self.say(_plain(entry, self._steps))

    def progress(self, step: int) -> None:
        """Move the bar, if there is one."""
        if self._bar is not None:
            self._bar.move(step)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Close the files; may be called twice."""
        for part in (self._file, self._events, self._bar):
            if part is not None:
                part.close()
        self._file = self._events = self._bar = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Bar:
    """A bar of rich, which also keeps what is printed above it."""

    def __init__(self, steps: int, start_step: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("training", total=steps, completed=start_step)
        self._progress.start()

    def move(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        self._progress.stop()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"step", "split"} <= entry.keys():
            entries.append(entry)
    return entries


def rewind(path: str | Path, step: int, *, evaluated_step: int) -> float:
    """Remove the lines of a metrics.jsonl that a run going on from `step` will write again.

    Kept are training lines up to `step` and others, of evaluations, up to `evaluated_step`; lines
    cut short by a kill are removed. The file is replaced in one go, so it is never half written.

    Returns:
        Seconds of the last line that stays; 0 where none does.
    """
    path = Path(path)
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for entry in read_log(path):
        if entry["step"] <= (step if entry["split"] == "train" else evaluated_step):
            kept.append(json.dumps(entry, allow_nan=False) + "\n")
            seconds = max(seconds, float(entry.get("seconds") or 0))
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)
    return seconds


def _number(value: Any) -> float | int | None:
    """A number that JSON can hold; None for what is not finite."""
    if value is None or isinstance(value, bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _plain(entry: dict[str, Any], steps: int) -> str:
    """An entry for human readers."""
    of = f"/{steps}" if steps else ""
    parts = [f"step {entry['step']}{of}", str(entry["split"])]
    for name, value in entry.items():
        # Scores of single classes ("dice/anterior") would make the line unreadable.
        if name not in ("step", "split") and "/" not in name and value is not None:
            parts.append(f"{name} {value:.4g}")
    return "  ".join(parts)
