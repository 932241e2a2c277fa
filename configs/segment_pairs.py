"""Segment images with masks of the same name: images/ID.*, masks/ID.*, of classes or instances.

    python experiments/train.py --config=configs/segment_pairs.py --workdir=runs/mine \
        --config.data.path=FOLDER

Presets: none for a set of your own (`--config.data.masks=instance` for instance numbers);
`:nuclei` for nuclei of the Data Science Bowl 2018, fluorescence and stained tissue.

Measured (95 % intervals) on two CPU cores shared with other work, so the time is not known yet:
    :nuclei   val dice .904 (.888 to .918), instance_ap50 .641 (.563 to .715) at step 360 of 600.
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config

PRESETS = {
    "": {},
    "nuclei": {
        "data.masks": "instance",
        "data.patch": (192, 192),
        "data.batch_size": 8,
        "model.features": (24, 48, 96, 192),
        "augmentation.rot90": True,
        "augmentation.rotation": 180.0,
        "augmentation.scale": (0.7, 1.4),
        "optimizer.learning_rate": 0.001,
        "optimizer.ema": 0.99,
        "training.steps": 600,
        "evaluation.overlap": 0.25,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    return base_config("segmentation", "pairs", PRESETS, preset)
