"""Look at a data set: `python experiments/plan.py --config=configs/NAME.py --output=DIR`.

Prints what is wrong with it and how it would be learned; writes quality.json and plan.json, which
`train.py --config.plan=DIR/plan.json` takes. Ends with 1 where something would make results wrong.
"""

import sys

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_config()
LEAVE_OUT = flags.DEFINE_list(
    "leave_out",
    [],
    "Kinds of findings, with commas between, whose cases are left out by the split.csv that is "
    "then written to --output, such as 'broken case,identical images in several parts'; README.md "
    "has all.",
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for quality.json and plan.json.")


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.planning import plan_run

    if not plan_run(CONFIG.value, OUTPUT.value, leave_out=LEAVE_OUT.value):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, required=("config", "output"))
