"""Segment volumes in a Medical Segmentation Decathlon or nnU-Net raw folder (NIfTI).

    python experiments/train.py --config=configs/segment_msd.py --workdir=runs/mine \
        --config.data.path=FOLDER

Presets: none for a set of your own; `:hippocampus` for Task04 (MRI, 1 mm).

Measured (95 % intervals) on two CPU cores shared with other work:
    :hippocampus   an earlier form (batches of 8, 500 steps, learning rate .001) reached val dice
                   .842 (.829 to .854) in 21 minutes; this one has not been measured yet.
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
        "augmentation.flip_axes": (0,),
        "optimizer.ema": 0.99,
        "optimizer.learning_rate": 0.002,
        "training.steps": 800,
        "evaluation.overlap": 0.5,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    return base_config("segmentation", "msd", PRESETS, preset)
