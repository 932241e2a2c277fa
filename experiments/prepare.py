"""Prepare cases on disk: `python experiments/prepare.py --config=configs/NAME.py --output=DIR`.

Training with `--config.data.prepared=DIR` and the same settings reads them from there, and would
write them first if they were missing. With `--tfds` they become a data set of TensorFlow Datasets.
"""

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_config()
OUTPUT = flags.DEFINE_string("output", None, "Folder of prepared sets.")
TFDS = flags.DEFINE_boolean("tfds", False, "Write a data set of TensorFlow Datasets instead.")


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.prepared import prepare_run

    prepare_run(CONFIG.value, OUTPUT.value, as_tfds=TFDS.value)


if __name__ == "__main__":
    cli.run(main, required=("config", "output"))
