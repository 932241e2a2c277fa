"""Segment images with masks of the same name: images/ID.*, masks/ID.*, of classes or instances.

    python experiments/train.py --config=configs/segment_pairs.py --workdir=runs/mine \
        --config.data.path=FOLDER

Presets: none for a set of your own (`--config.data.masks=instance` for instance numbers);
`:nuclei` for nuclei of the Data Science Bowl 2018, fluorescence and stained tissue.

Measured (95 % intervals; time of the whole command on two CPU cores, with some other work):
    :nuclei   val dice .907 (.890 to .921), instance_ap50 .655 (.582 to .727) in 16 minutes.
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
        "training.steps": 600,
        "evaluation.overlap": 0.25,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    return base_config("segmentation", "pairs", PRESETS, preset)
