"""Time parts of the library on this machine and print Markdown tables.

python experiments/benchmark.py --what=convolution
python experiments/benchmark.py --what=convolution --scale=4 --repeats=2   # a quick look
"""

from absl import app, flags

from jaxmed import benchmark

_WHAT = flags.DEFINE_multi_enum(
    "what",
    sorted(benchmark.BENCHMARKS),
    sorted(benchmark.BENCHMARKS),
    "What to time; may be given again.",
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Calls timed; the median counts.", lower_bound=1)
_SCALE = flags.DEFINE_integer("scale", 1, "Divides the sides of images.", lower_bound=1)


def main(argv):
    del argv
    print(benchmark.describe_machine())
    for name in _WHAT.value:
        table = benchmark.BENCHMARKS[name](repeats=_REPEATS.value, scale=_SCALE.value)
        print(f"\n## {name}\n\n{table}", flush=True)


if __name__ == "__main__":
    app.run(main)
