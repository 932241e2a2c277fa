"""Search for the best settings.

`python experiments/sweep.py --config=configs/NAME.py[:PRESET] --space=space.yaml --output=DIR`;
each line of space.yaml is a key of the config with a list of values or a range:

    optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}
    model.width: {low: 8, high: 32, step: 8}
    optimizer.name: [adamw, sgd]

The same command goes on where it stopped; several of them share the work on one DIR.
"""

import sys

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_config()
SPACE = flags.DEFINE_string("space", None, "YAML file: which keys take which values.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for the trials, the table and the winner.")
TRIALS = flags.DEFINE_integer("trials", 20, "Of the whole sweep.", lower_bound=1)
SAMPLER = flags.DEFINE_enum("sampler", "tpe", ["tpe", "random", "grid"], "What to try next.")
PRUNER = flags.DEFINE_enum(
    "pruner",
    "asha",
    ["asha", "median", "none"],
    "Which trials end early, by their scores from the first evaluation on.",
)
SEEDS = flags.DEFINE_integer("seeds", 1, "Models of each trial; their mean counts.", lower_bound=1)
TOGETHER = flags.DEFINE_integer(
    "together", 1, "Trials trained as one program; the worse half ends early.", lower_bound=1
)


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.sweep import sweep_run

    finished = sweep_run(
        CONFIG.value,
        SPACE.value,
        OUTPUT.value,
        trials=TRIALS.value,
        sampler=SAMPLER.value,
        pruner=PRUNER.value,
        seeds=SEEDS.value,
        together=TOGETHER.value,
    )
    if not finished:
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main, required=("config", "space", "output"))
