"""Export a trained run, so that it predicts where jaxmed is not installed.

`python experiments/export.py --workdir=DIR --output=DIR` writes model.zip, and
`python DIR/model.zip --output=out IMAGE_OR_FOLDER...` predicts with it.
"""

from absl import flags

from jaxmed.build import cli

CONFIG = cli.define_workdir_config()
OUTPUT = flags.DEFINE_string("output", None, "Folder for the exported model.")
FORMAT = flags.DEFINE_enum(
    "format",
    "stablehlo",
    ["stablehlo", "onnx", "safetensors"],
    "One file for jax; a network for onnxruntime; weights by name with their JSON.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "int8"],
    "Of the weights; what fewer bits cost is measured on the validation part.",
)


def main(positional: list[str]) -> None:
    cli.refuse(positional)
    from jaxmed.build.exporting import export_run

    written = export_run(
        flags.FLAGS.workdir,
        output=OUTPUT.value,
        format=FORMAT.value,
        dtype=DTYPE.value,
        config=cli.workdir_config(),
    )
    print(f"-> {written}")


if __name__ == "__main__":
    cli.run(main, required=("workdir", "output"))
