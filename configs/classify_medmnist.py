"""Classify one of the sets of MedMNIST v2, 2-D and 3-D, from its npz file.

    python experiments/train.py --config=configs/classify_medmnist.py:pneumoniamnist \
        --workdir=runs/pneumonia --config.data.path=FOLDER_OR_NPZ

Without `data.path` the file is looked for in the folder data/, and with `data.download` fetched
there. Presets: the name of any set; without one, `data.path` is an npz of the same keys.

Measured (95 % intervals; time of the whole command on two CPU cores, half of them busy):
    :pneumoniamnist   val auroc .994 (.988 to .999); test auroc .981 (.971 to .990), accuracy .944
                      (.926 to .962); 13 minutes.
"""

from ml_collections import ConfigDict

from jaxmed.build.config import base_config
from jaxmed.data.sources.medmnist_sets import MEDMNIST_SETS

TUNED = {
    "pneumoniamnist": {
        "data.size": (28, 28),
        "data.batch_size": 64,
        "model.width": 32,
        "model.stem_strides": 1,
        "augmentation.flip": 0.0,
        "augmentation.affine": 0.8,
        "augmentation.translation": 0.08,
        "augmentation.brightness": 0.5,
        "augmentation.contrast": 0.5,
        "augmentation.gamma": 0.3,
        "loss.label_smoothing": 0.05,
        "loss.class_weights": "balanced",
        "training.epochs": 16.0,
    },
}
PRESETS = {"": {}, **{name: {"data.name": name, **TUNED.get(name, {})} for name in MEDMNIST_SETS}}


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    return base_config("classification", "medmnist", PRESETS, preset)
