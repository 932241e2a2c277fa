"""Time parts of the library on this machine; each case prints one JSON line.

python experiments/benchmark.py                                  # every case, some minutes
python experiments/benchmark.py --cases='step_*,nms' --repeats=3
python experiments/benchmark.py --cases='step_*' --against=torch # in turns with PyTorch and MONAI
"""

import contextlib
import fnmatch
import json

import jax
from absl import flags

from jaxmed.benchmark import cases, timing
from jaxmed.benchmark.rival import Rival
from jaxmed.build import cli
from jaxmed.types import UserError

_CASES = flags.DEFINE_list("cases", ["*"], "Names, or patterns such as step_*.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Runs timed; the median counts.", lower_bound=1)
_AGAINST = flags.DEFINE_enum("against", None, ["torch"], "Whose work to time beside ours.")
_RIVAL_PYTHON = flags.DEFINE_string("rival_python", "", "Interpreter that has it, if not this one.")
_FAKE = flags.DEFINE_integer("fake_devices", 0, "CPU devices, for scaling_*.", lower_bound=0)
_LIST = flags.DEFINE_boolean("list", False, "Only print the names.")


def main(arguments):
    cli.refuse(arguments)
    names = [n for n in cases.CASES if any(fnmatch.fnmatch(n, p) for p in _CASES.value)]
    if not names:
        raise UserError(f"--cases={','.join(_CASES.value)}: no such case; see --list")
    if _LIST.value:
        print("\n".join(names))
        return
    if _FAKE.value:
        jax.config.update("jax_num_cpu_devices", _FAKE.value)
    print(json.dumps(timing.describe_machine()), flush=True)
    for name in names:
        with contextlib.ExitStack() as stack:
            rival, versions = None, {}
            if _AGAINST.value:
                rival = stack.enter_context(Rival(name, python=_RIVAL_PYTHON.value))
                if not rival.versions:
                    continue
                versions = {"against": rival.versions}
            try:
                work = cases.CASES[name]()
            except UserError as error:
                print(json.dumps({"case": name, "skipped": str(error)}), flush=True)
                continue
            result = timing.measure(name, work, repeats=_REPEATS.value, rival=rival)
        print(json.dumps({**result, **versions}), flush=True)


if __name__ == "__main__":
    cli.run(main)
