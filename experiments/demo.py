"""Train, evaluate and predict all three tasks on built-in phantoms: `make demo`, some minutes."""

import json
import runpy
import sys
import time
from pathlib import Path

from absl import flags

from jaxmed.build import cli

OUTPUT = flags.DEFINE_string("output", "runs/demo", "Folder for the runs; those in it go on.")
SHARE = flags.DEFINE_float("share", 1.0, "Of the steps: less is quicker, and worse.", 0.0, 1.0)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Config, preset, score to show, and steps: a fraction of what the plan would choose, so that all is
# done in some minutes on two cores.
RUNS = (
    ("classify_phantoms", "cells", "auroc", 270),
    ("detect_phantoms", "cells", "ap50", 180),
    ("segment_phantoms", "cells", "dice", 360),
)


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from rich.table import Table

    from jaxmed.build.config import update
    from jaxmed.build.predictions import predict_run
    from jaxmed.build.runs import train_run
    from jaxmed.build.scored_set import print_table, score_cells
    from jaxmed.data.sources.phantom_files import write_phantoms

    start = time.monotonic()
    table = Table(title="Demo: scores on the validation part, with 95 % intervals")
    for column in ("run", "score", "value", "interval", "look at"):
        table.add_column(column, overflow="fold")
    for config_name, preset, score, steps in RUNS:
        run = f"{config_name}:{preset}"
        workdir = Path(OUTPUT.value) / run.replace(":", "_")
        print(f"\n== {run} ==", flush=True)
        config = runpy.run_path(str(CONFIGS / f"{config_name}.py"))["get_config"](preset)
        steps = max(3, round(SHARE.value * steps))
        length = {"training.steps": steps, "training.evaluate_every": steps // 3}
        update(config, length, where="demo")
        if not train_run(config, workdir):
            sys.exit(130)
        # Images that no run has seen, in files: phantoms of another seed.
        new = workdir / "new_images"
        write_phantoms(new, layout="pairs", kind="cells", count=4, seed=1, parts=False)
        predict_run(workdir, [str(new / "images")], output=workdir / "predictions", overlay=True)
        summary = json.loads((workdir / "evaluation/val/summary.json").read_text())
        entry = summary["metrics"][score]
        table.add_row(config_name, score, *score_cells(entry), str(workdir / "report.html"))
    print_table(table)
    print(f"pictures of new images: {OUTPUT.value}/*/predictions/overlays")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    cli.run(main)
