"""Evaluate a run: `python experiments/evaluate.py --workdir=DIR --split=val`.

`--split=all --config.data.path=OTHER` evaluates another data set, whole.
"""

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_workdir_config()
SPLIT = flags.DEFINE_enum("split", "val", ["train", "val", "test", "all"], "Part to evaluate.")


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.evaluations import evaluate_run

    evaluate_run(flags.FLAGS.workdir, part=SPLIT.value, config=cli.workdir_config())


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
