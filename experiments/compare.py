"""Compare evaluated runs: `python experiments/compare.py RUN RUN... [--output=DIR]`.

Scores on the cases that all runs share, with intervals; paired differences to the first run (or
with --against=best to the best), with a test. A RUN is a workdir, or a folder that
`evaluate.py --predictions` wrote.
"""

from absl import flags

from jaxmed.build import cli

PARTS = ["train", "val", "test", "all"]
SPLIT = flags.DEFINE_enum("split", "val", PARTS, "Evaluated part to compare.")
AGAINST = flags.DEFINE_enum("against", "first", ["first", "best"], "Run to compare others with.")
RESAMPLES = flags.DEFINE_integer("resamples", 10_000, "Of the bootstrap.", lower_bound=100)
OUTPUT = flags.DEFINE_string("output", None, "Folder for compare.csv, .json and .png.")


def main(positional: list[str]) -> None:
    from jaxmed.build.comparison import compare_evaluations

    compare_evaluations(
        positional,
        part=SPLIT.value,
        output=OUTPUT.value,
        against=AGAINST.value,
        resamples=RESAMPLES.value,
    )


if __name__ == "__main__":
    cli.run(main)
