"""Segment volumes in a Medical Segmentation Decathlon or nnU-Net raw folder (NIfTI).

    python experiments/train.py --config=configs/segment_msd.py --workdir=runs/mine \
        --config.data.path=FOLDER

Presets: none for a set of your own; `:hippocampus` for Task04 (MRI, 1 mm).

Measured (95 % intervals; time of the whole command on two CPU cores, with some other work):
    :hippocampus   val dice .867 (.855 to .878) in 12.5 minutes; without the preset, as planned,
                   .867 (.857 to .877) in 9.5.
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config

PRESETS = {
    "": {},
    "hippocampus": {
        "data.patch": (40, 56, 40),
        "data.batch_size": 4,
        "model.features": (16, 32, 64, 128),
        "augmentation.affine": 0.4,
        "augmentation.rotation": 20.0,
        "optimizer.learning_rate": 0.002,
        "training.steps": 800,
        "evaluation.overlap": 0.5,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    return base_config("segmentation", "msd", PRESETS, preset)
