"""Explain what a run says of images, with checks of the explanations.

`python experiments/explain.py --workdir=DIR --output=DIR [--method=...] [--target=CLASS] IMAGE...`;
without images, the first cases of `--split`.
"""

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_workdir_config()
OUTPUT = flags.DEFINE_string("output", None, "Folder for maps, pictures and tables.")
METHOD = flags.DEFINE_list(
    "method",
    [],
    "Methods, with commas between: gradcam, gradcam++, hirescam, integrated_gradients, smoothgrad, "
    "gradient, occlusion, shapley.",
)
TARGET = flags.DEFINE_string("target", "", "Class to explain; by default what the network sees.")
LAYER = flags.DEFINE_string("layer", "", "Layer of Grad-CAM and of features, by its name.")
BASELINE = flags.DEFINE_enum(
    "baseline", "blurred", ["blurred", "dark"], "What is in the place of what is taken away."
)
SPLIT = flags.DEFINE_enum("split", "val", ["train", "val", "test"], "Part to take cases from.")
CASES = flags.DEFINE_integer("cases", 4, "Number of cases of the part.")
FEATURES = flags.DEFINE_boolean(
    "features", False, "Also write features of all cases, their map, neighbours and a probe."
)
IMPORTANCE = flags.DEFINE_string(
    "importance", "", "Column of the manifest: which measurements of what is segmented tell it."
)


def main(positional: list[str]) -> None:
    from jaxmed.build.explanations import explain_run

    explain_run(
        flags.FLAGS.workdir,
        positional,
        output=OUTPUT.value,
        methods=METHOD.value,
        target=TARGET.value,
        layer=LAYER.value,
        baseline=BASELINE.value,
        part=SPLIT.value,
        cases=CASES.value,
        features=FEATURES.value,
        importance=IMPORTANCE.value,
        config=cli.workdir_config(),
    )


if __name__ == "__main__":
    cli.run(main, required=("workdir", "output"))
