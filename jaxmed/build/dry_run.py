"""What `train.py --dry_run` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmed.build.checks import useless_keys
from jaxmed.build.config import flatten
from jaxmed.build.experiment import Experiment
from jaxmed.preprocessing.plan import CPU_FLOPS


def print_dry_run(
    experiment: Experiment, fingerprint: Mapping[str, Any], example: dict[str, np.ndarray]
) -> None:
    """Print the config, the data, the shapes, the parameters, and what a step costs."""
    useless = useless_keys(experiment.config)
    for key, value in flatten(experiment.config).items():
        if key not in useless:
            print(f"{key} = {value!r}")
    shapes = np.array(fingerprint["shapes"])
    unit = {"classification": "images", "detection": "boxes", "segmentation": "voxels"}
    print(f"\n{unit[experiment.info.task]} a class in the training part:")
    for name, count in zip(experiment.info.class_names, fingerprint["class_counts"], strict=True):
        print(f"  {name}: {count:,}")
    print(
        f"sizes of {len(shapes)} images: {tuple(shapes.min(0).tolist())} to "
        f"{tuple(shapes.max(0).tolist())}, of {', '.join(fingerprint['dtypes'])}"
    )
    batch = experiment.example_batch(example)
    print("\nbatch:")
    for key, value in batch.items():
        print(f"  {key:10} {value.dtype} {value.shape}")
    print("\nparameters:")
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(experiment.abstract_member.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        print(f"  {name:50} {leaf.shape}")
        total += leaf.size
    print("\ncompiling a step, to measure it", flush=True)
    held = experiment.step_bytes(example) / 2**20
    print(f"\n{total:,} parameters; a step needs some {held:,.0f} MiB on each device")
    if experiment.members:
        names = ", ".join(member.name for member in experiment.members)
        print(f"{len(experiment.members)} models together, that memory for all of them: {names}")
    flops = experiment.step_flops(example)
    minutes = flops * experiment.config.training.steps / CPU_FLOPS[experiment.info.ndim] / 60
    print(
        f"{flops / 1e9:.2g} GFLOP a step; {experiment.config.training.steps} steps: some "
        f"{max(1, round(minutes))} minutes on two CPU cores, without evaluations"
    )
