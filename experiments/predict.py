"""Predict new images.

`python experiments/predict.py --workdir=DIR --output=DIR [--overlay] [--probabilities] IMAGE...`,
where folders may stand for the images or DICOM series in them.
"""

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_workdir_config()
OUTPUT = flags.DEFINE_string("output", None, "Folder for the predictions.")
PROBABILITIES = flags.DEFINE_boolean(
    "probabilities", False, "Of a segmentation, also write the probabilities of the classes."
)
UNCERTAINTY = flags.DEFINE_boolean(
    "uncertainty", False, "Also write how unsure predictions are (not of boxes)."
)
OVERLAY = flags.DEFINE_boolean("overlay", False, "Also write pictures to look at.")


def main(positional: list[str]) -> None:
    from jaxmed.build.predictions import predict_run

    predict_run(
        flags.FLAGS.workdir,
        positional,
        output=OUTPUT.value,
        overlay=OVERLAY.value,
        probabilities=PROBABILITIES.value,
        uncertainty=UNCERTAINTY.value,
        config=cli.workdir_config(),
    )


if __name__ == "__main__":
    cli.run(main, required=("workdir", "output"))
