"""Detect objects annotated in COCO json: images beside it, or in folders beside `annotations/`.

python experiments/train.py --config=configs/detect_coco.py --workdir=runs/mine \
        --config.data.path=FOLDER
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config


def get_config(preset: str = "") -> ConfigDict:
    """The config; there are no presets."""
    return base_config("detection", "coco", {"": {}}, preset)
