"""Detect objects in a Pascal VOC folder: JPEGImages/, Annotations/*.xml, ImageSets/Main/*.txt.

    python experiments/train.py --config=configs/detect_voc.py --workdir=runs/mine \
        --config.data.path=FOLDER

Presets: none for a set of your own; `:bccd` for blood cells (BCCD), 640 x 480.

Measured (95 % intervals; time of the whole command on two CPU cores):
    :bccd   val ap50 .868 (.827 to .908), ap .569 (.543 to .601) in 19 minutes.
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config

PRESETS = {
    "": {},
    "bccd": {
        "data.invalid": "drop",
        "data.size": (240, 320),
        "data.fit": "stretch",
        "data.batch_size": 8,
        "model.width": 32,
        "model.stem_strides": 4,
        "model.levels": (1, 2, 3),
        "augmentation.flip_axes": (0, 1),
        "augmentation.affine": 0.5,
        "augmentation.scale": (0.7, 1.3),
        "augmentation.rotation": 0.0,
        "augmentation.color": 0.3,
        "optimizer.ema": 0.998,
        "training.epochs": 50.0,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    return base_config("detection", "voc", PRESETS, preset)
