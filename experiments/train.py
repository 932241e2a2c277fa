"""Train a model: `python experiments/train.py --config=configs/NAME.py[:PRESET] --workdir=DIR`.

Overrides are `--config.KEY=VALUE`; a workdir that holds checkpoints goes on where it stopped.
"""

import sys

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the run writes.")
DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Print the config, shapes, parameters and memory, and train nothing."
)


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.runs import train_run

    if not train_run(CONFIG.value, WORKDIR.value or "", dry_run=DRY_RUN.value):
        sys.exit(130)  # as after any Ctrl-C, so that a script around this one notices


if __name__ == "__main__":
    cli.run(main, required=("config",), one_of=("workdir", "dry_run"))
