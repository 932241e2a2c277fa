"""Evaluate a run: `python experiments/evaluate.py --workdir=DIR --split=val`.

`--split=all --config.data.path=OTHER` evaluates another data set, whole. `--subgroups=sex,scanner`
adds scores by columns of the data's manifest.csv.

Without a model, anybody's masks, boxes or class probabilities are scored by
`--predictions=FOLDER_OR_FILE --truth=FOLDER --output=DIR`.
"""

from absl import flags

from jaxmed.build import cli
from jaxmed.types import UserError

CONFIG = cli.define_workdir_config()
SPLIT = flags.DEFINE_enum("split", None, ["train", "val", "test", "all"], "Part; val of a run.")
SUBGROUPS = flags.DEFINE_list("subgroups", [], "Columns of manifest.csv to score apart.")
PREDICTIONS = flags.DEFINE_string("predictions", None, "Masks, a COCO json, or predictions.csv.")
TRUTH = flags.DEFINE_string("truth", None, "With --predictions: the data set, or its masks.")
MASKS = flags.DEFINE_enum("masks", "semantic", ["semantic", "instance"], "What masks hold.")
TOLERANCE = flags.DEFINE_float("nsd_tolerance", 1.0, "With --predictions: mm that nsd forgives.")
OUTPUT = flags.DEFINE_string("output", None, "With --predictions: folder for the scores.")


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    if PREDICTIONS.value is None:
        for flag in (TRUTH, OUTPUT):
            if flag.value is not None:
                raise UserError(f"--{flag.name}: is for --predictions, which are missing")
        from jaxmed.build.evaluations import evaluate_run

        evaluate_run(
            flags.FLAGS.workdir,
            part=SPLIT.value or "val",
            config=cli.workdir_config(),
            subgroups=SUBGROUPS.value,
        )
        return
    for flag in (TRUTH, OUTPUT):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing: --predictions need it")
    from jaxmed.build.submissions import evaluate_predictions

    evaluate_predictions(
        PREDICTIONS.value,
        TRUTH.value,
        output=OUTPUT.value,
        part=SPLIT.value or "all",
        masks=MASKS.value,
        nsd_tolerance=TOLERANCE.value,
        subgroups=SUBGROUPS.value,
    )


if __name__ == "__main__":
    cli.run(main, one_of=("workdir", "predictions"))
