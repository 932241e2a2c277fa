"""Doubtful labels and the hardest cases of the data that a run was trained on.

`python experiments/audit.py --workdir=DIR --output=DIR`; a run with --config.training.folds=5
judges every case by a model that did not see it. The test part is not looked at.
"""

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_workdir_config()
OUTPUT = flags.DEFINE_string("output", None, "Folder for the tables and pictures.")


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.audit import audit_run

    audit_run(flags.FLAGS.workdir, output=OUTPUT.value, config=cli.workdir_config())


if __name__ == "__main__":
    cli.run(main, required=("workdir", "output"))
