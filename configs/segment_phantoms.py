"""Segment cells by kind, or organs and lesions of a CT-like section or volume, in phantoms.

    python experiments/train.py --config=configs/segment_phantoms.py --workdir=runs/segment

Presets: `:cells` (default), `:instances` (each cell by itself), `:cells3d`, `:body`, `:body3d`.
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config

PRESETS = {
    "cells": {"data.kind": "cells"},
    "instances": {"data.kind": "cells", "data.masks": "instance"},
    "cells3d": {"data.kind": "cells", "data.ndim": 3, "data.extent": (32,)},
    "body": {"data.kind": "body"},
    "body3d": {"data.kind": "body", "data.ndim": 3, "data.extent": (32,), "data.count": 200},
}


def get_config(preset: str = "cells") -> ConfigDict:
    """The config of a preset."""
    return base_config("segmentation", "phantoms", PRESETS, preset)
