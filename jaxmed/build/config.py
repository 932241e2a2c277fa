"""The config that every experiment starts from, and its way to disk and back."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jaxmed
from jaxmed.types import TASKS, UserError

CONFIG_FILE = "config.json"


def base_config(
    task: str,
    layout: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    preset: str = "",
) -> ConfigDict:
    """Every key of an experiment with its default, changed by a preset.

    An empty tuple, an empty string or a zero is "left to the plan" where the comment says so: with
    `plan=auto` the value comes from the training part of the data.

    Args:
        task: classification, detection or segmentation.
        layout: of the data, a key of `datasets.SOURCES`.
        presets: flat settings of each preset of a config file.
        preset: which of them.

    Raises:
        UserError: where there is no such preset.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    presets = presets or {"": {}}
    if preset not in presets:
        names = ", ".join(f":{name}" for name in presets if name) or "none"
        raise UserError(f"--config: there is no preset :{preset}; there are {names}")
    config = _defaults(task)
    update(config, {"data.layout": layout, **presets[preset]}, where=f"preset {preset}")
    return config


def _defaults(task: str) -> ConfigDict:
    return ConfigDict(
        {
            "task": task,
            "seed": 0,
            # auto, none, or a JSON file of settings such as {"data.size": [64, 64]}
            "plan": "auto",
            "data": _data_config(),
            "augmentation": _augmentation_config(),
            "model": _model_config(task),
            "loss": {
                "label_smoothing": 0.0,
                "class_weights": "none",  # none, or balanced: inverse to the class frequencies
                "box_weight": 2.0,  # of the box loss beside the class loss (detection)
            },
            "optimizer": _optimizer_config(task),
            "training": {
                "steps": 0,  # plan
                "epochs": 0.0,  # where it is not 0, steps follow from it
                "log_every": 0,  # 0: 20 steps, or more often in short runs
                "evaluate_every": 0,  # 0: ten times, but not more often than every 50 steps
                "checkpoint_every": 0,  # 0: likewise
                "steps_per_call": 0,  # of the program; 0: 1, or 8 where the device holds the cases
                "early_stopping": 0,  # evaluations without improvement; 0 is off
                # Several models in one program: each combination of these three.
                "folds": 0,  # of a cross-validation over train and val; 0 is off
                "seeds": 1,  # that many, from `seed` on
                "vary": "",  # such as optimizer.learning_rate=1e-3,3e-4;model.dropout=0,0.2
            },
            "sharding": {
                "mode": "jit",
                "fsdp": False,
                "devices": 0,  # 0 is all
                "members": "auto",  # models trained together: vmap, loop, or what suits the device
            },
            "evaluation": {
                "batch_size": 0,  # 0: the training batch
                "overlap": 0.5,  # of sliding windows (segmentation) and tiles of large pictures
                "flips": False,  # average over images mirrored as in training (not for detection)
                "dropout_samples": 0,  # average over so many draws of dropout (not for detection)
                "resamples": 1000,  # of the bootstrap
                # Training cases that others are compared with, to tell what is unlike them; 0: off.
                "familiarity": 500,
                "explain": True,  # show in the report what counted for what the network sees
                "nsd_tolerance": 0.0,  # mm; plan: 1, or one voxel where that is far smaller
                "iou": 0.6,  # above which non-maximum suppression drops the lower-scored box
                # Of boxes that are drawn and counted, not of ap50 and ap; 0: of the best F1 on the
                # validation part, and .3 until that is known.
                "score_threshold": 0.0,
                # From when on the last of two classes, or each of several labels, is decided for,
                # as found on the validation part: youden, f1, sensitivity=0.95 or
                # specificity=0.95; "": the likelier class, or from 1/2 on.
                "operating_point": "",
                # Of exclusive classes: temperature, or bias_corrected, with a bias a class too.
                "calibration": "temperature",
                "coverage": 0.9,  # of the sets of classes in predictions.csv
            },
        }
    )


def _data_config() -> dict[str, Any]:
    return {
        "layout": "",
        "path": "",
        "name": "",  # of the set, where a layout has several (MedMNIST, TFDS)
        "download": False,
        "label_column": "label",  # of the manifest
        "class_names": (),  # where the data do not say
        "masks": "semantic",  # or instance
        "invalid": "error",  # or drop: leave invalid annotations out, and say how many
        "fractions": (0.7, 0.15, 0.15),  # train, val, test, where no split is given
        "channels": 0,  # plan
        "size": (),  # plan; of the whole image (classification, detection)
        "fit": "",  # plan; stretch, or pad (keeps the aspect ratio) to `size`
        "patch": (),  # plan; of segmentation
        "spacing": (),  # mm, to resample to; plan (volumes)
        "normalization": "",  # plan; dataset, zscore, percentile, window or value_range
        "intensity": ConfigDict({"mean": (), "std": (), "clip": ()}),  # plan; of "dataset"
        "window": (40.0, 400.0),  # level and width, of "window"
        "foreground": 0.33,  # share of patches around a foreground voxel
        "max_boxes": 0,  # plan
        "batch_size": 0,  # plan
        "workers": 0,  # processes that read; 0 reads in threads
        "cache_gb": 4.0,  # of preprocessed training cases kept in memory; validation adds a quarter
        "prepared": "",  # a folder that keeps preprocessed cases on disk, for the next runs too
        # Whether the device holds all training cases: always, never, or auto: on accelerators,
        # where they take less than a quarter of its memory.
        "on_device": "auto",
        "kind": "cells",  # of phantoms: cells or body
        "ndim": 2,
        "count": 400,
        "extent": (64,),
    }


def _augmentation_config() -> dict[str, Any]:
    # Probabilities and ranges; 0 or an empty tuple turns a transform off.
    return {
        "enabled": True,
        "flip": 0.5,
        # Empty: left-right, of volumes whose files state no place in space the first axis; (-1,):
        # none, where sides matter.
        "flip_axes": (),
        "rot90": False,
        "affine": 0.3,
        "rotation": 15.0,  # degrees
        "scale": (0.8, 1.25),
        "translation": 0.0,  # share of the image's side
        "brightness": 0.2,
        "contrast": 0.2,
        "gamma": 0.2,
        "noise": 0.1,
        "blur": 0.1,
        "low_resolution": 0.0,
        "color": 0.0,
        "cutout": 0.0,
    }


def _model_config(task: str) -> dict[str, Any]:
    return {
        "name": {"classification": "resnet18", "detection": "resnet18"}.get(task, "unet"),
        "init": "",  # a workdir whose weights to start from
        "dtype": "auto",  # bfloat16 on accelerators, float32 on CPU
        "norm": "instance" if task == "segmentation" else "batch",
        "dropout": 0.0,
        "remat": False,
        "width": 0,  # plan; of a ResNet's first stage
        "stem_strides": 0,  # plan; 1, 2 or 4
        "features": (),  # plan; a U-Net's channels a level
        "strides": (),  # plan; a U-Net's steps between levels
        "deep_supervision": False,
        "levels": (),  # plan; the stages a detector looks at
        "head_features": 0,  # plan; of a detector's heads
    }


def _optimizer_config(task: str) -> dict[str, Any]:
    return {
        "name": "adamw",  # sgd, adam, adamw
        "learning_rate": 3e-3 if task == "segmentation" else 1e-3,
        "momentum": 0.9,
        "weight_decay": 1e-4 if task == "segmentation" else 0.02,
        "clip_norm": 1.0 if task != "segmentation" else 12.0,
        "schedule": "cosine",  # constant, cosine, polynomial, onecycle
        "warmup": 0.05,  # below 1 a share of the steps, else steps
        "accumulate": 1,  # batches an update
        "ema": 0.99,  # decay of the averaged weights, which are those evaluated; 0 is off
    }


def choose(registry: Mapping[Any, Any], name: Any, *, key: str) -> Any:
    """Look a name up, or say what there is."""
    if name not in registry:
        raise UserError(f"{key} is {name!r}; expected one of {', '.join(map(str, registry))}")
    return registry[name]


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists, as JSON has them, become tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = _to_tuple(value)
    return flat


def nearest(key: str, keys: Sequence[str]) -> str:
    """The key that was probably meant by one that is not there; "" where none is near."""
    # The last word says most: the section may be missing, or be all that is right.
    words = {known: known.rsplit(".", 1)[-1] for known in keys}
    meant = difflib.get_close_matches(key.rsplit(".", 1)[-1], words.values(), n=1, cutoff=0.75)
    alike = [known for known, word in words.items() if word in meant]
    near = difflib.get_close_matches(key, alike, n=1, cutoff=0.0)
    return near[0] if near else ""


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, (list, tuple)) else value


def update(config: ConfigDict, settings: Mapping[str, Any], *, where: str) -> None:
    """Set `{"data.size": (64, 64)}` in place.

    Raises:
        UserError: where a key does not exist or its value is of another kind.
    """
    known = flatten(config)
    for key, value in settings.items():
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key}; the keys are listed by train.py --dry_run"
            )
        try:
            config.update_from_flattened_dict({key: _to_tuple(value)})
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {key} cannot be {value!r}: {error}") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every key of two flat configs that differs."""
    keys = sorted(old.keys() | new.keys())
    return [
        f"{key}: {old.get(key, '(none)')} -> {new.get(key, '(none)')}"
        for key in keys
        if old.get(key, None) != new.get(key, None)
    ]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which then becomes `path` at once: readers never see half a file.

    It is of this call alone, as several processes may write the same file.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON at once: readers see the old file or the new one, never half of it."""
    text = json.dumps(content, indent=2, sort_keys=False, allow_nan=False)
    with replacing(path) as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def read_run(workdir: Path) -> dict[str, Any]:
    """The content of a workdir's config.json.

    Raises:
        UserError: where there is none, or it is no JSON.
    """
    path = workdir / CONFIG_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict) or not {"config", "data"} <= run.keys():
            raise ValueError("it holds no config and data of a run")
        if not isinstance(run["config"], dict) or "task" not in run["config"]:
            raise ValueError("its config names no task")
        return run
    except FileNotFoundError:
        if (workdir / "checkpoints").is_dir():
            raise UserError(
                f"{path}: is gone, and checkpoints are there; restore it, or use another workdir"
            ) from None
        raise UserError(
            f"{workdir}: holds no {CONFIG_FILE}, so it is not the workdir of a run; "
            "give --workdir the folder that train.py wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it or train anew") from error


def config_of_run(run: Mapping[str, Any]) -> ConfigDict:
    """The resolved config of a run, ready for overrides.

    Raises:
        UserError: it has keys of another version.
    """
    config = base_config(run["config"]["task"])
    unknown = sorted(flatten(run["config"]).keys() - flatten(config).keys())
    if unknown:
        version = run.get("versions", {}).get("jaxmed", "another version")
        raise UserError(
            f"{CONFIG_FILE}: has keys that jaxmed {jaxmed.__version__} does not know "
            f"({', '.join(unknown[:3])}); the run was made with {version}: use that one, or train "
            "anew"
        )
    update(config, flatten(run["config"]), where=CONFIG_FILE)
    return config
