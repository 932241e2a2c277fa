"""Detect cells by kind, or lesions in a CT-like section or volume, in phantoms.

    python experiments/train.py --config=configs/detect_phantoms.py --workdir=runs/detect

Presets: `:cells` (default), `:cells3d`, `:body`, `:body3d`.

Measured (95 % intervals; time of the whole command on two CPU cores):
    :cells3d   val ap50 .947 (.938 to .957), ap .456 (.450 to .467) in 7.5 minutes.
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config

# Lesions differ from the liver by some 40 Hounsfield units, and the liver is on one side.
CT = {
    "data.kind": "body",
    "data.normalization": "window",
    "data.window": (50.0, 250.0),
    "augmentation.flip": 0.0,
}

PRESETS = {
    "cells": {"data.kind": "cells"},
    "cells3d": {"data.kind": "cells", "data.ndim": 3, "data.extent": (32,)},
    "body": CT,
    "body3d": {**CT, "data.ndim": 3, "data.extent": (32,), "data.count": 600},
}


def get_config(preset: str = "cells") -> ConfigDict:
    """The config of a preset."""
    return base_config("detection", "phantoms", PRESETS, preset)
