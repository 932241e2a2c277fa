"""Named cases of scale: models together and apart, steps a call, fake devices, the start."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.benchmark import networks, sizes
from jaxmed.benchmark.timing import Work, compile_work, count_flops
from jaxmed.models.resnet import ResNet, ResNetBackbone
from jaxmed.training.sharding import lift, make_mesh
from jaxmed.training.step import make_step
from jaxmed.training.together import step_together
from jaxmed.types import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments"
FOLDS = 5
STEPS = 8


def _folds_work(layout: str) -> Work:
    """A step of each of five models of the hippocampus preset, in one program or not."""
    model, task, batch = networks.make_unet(sizes.HIPPOCAMPUS)
    state, optimizer = networks.make_state(model, batch)
    step = make_step(model_apply=model.apply, task=task, optimizer=optimizer)
    items = FOLDS * len(batch["valid"])
    if layout == "apart":
        work = compile_work(step, state, jax.device_put(batch), items=items, unit="images")

        def run() -> None:
            for _ in range(FOLDS):
                work.run()

        return Work(run, items, "images", FOLDS * work.flops, work.peak_bytes, work.compile_s)
    one, number = state, state.step
    state = jax.tree.map(lambda x: jnp.stack([x] * FOLDS), state).replace(step=number)
    batch = {name: jnp.stack([x] * FOLDS) for name, x in batch.items()}
    together = step_together(step, layout=layout)
    return compile_work(
        # Of a loop, XLA counts one turn.
        *(together, state, batch),
        items=items,
        unit="images",
        donate=True,
        flops=FOLDS * count_flops(step, one, {name: x[0] for name, x in batch.items()}),
    )


def _small_steps_work(steps: int) -> Work:
    """Eight steps of a network so small that the host's part shows, `steps` a call."""
    model = ResNet(sizes.RESNET_CLASSES, ResNetBackbone(width=4, stem_strides=2))
    task, batch = networks.make_resnet()[1:]
    batch = {name: np.asarray(x[:8]) for name, x in batch.items()}
    state, optimizer = networks.make_state(model, batch)
    step = make_step(model_apply=model.apply, task=task, optimizer=optimizer)
    lifted = lift(step, mesh=make_mesh(jax.devices()[:1]))
    state = lifted.place_state(state)

    def run() -> None:
        nonlocal state
        for _ in range(STEPS // steps):
            if steps > 1:
                state, metrics = lifted.steps(state, [batch] * steps)
            else:
                state, metrics = lifted.step(state, lifted.place_batch(batch))
        jax.block_until_ready(metrics)

    return Work(run, STEPS * len(batch["valid"]), "images")


def _scaling_work(devices: int) -> Work:
    """A step over fake devices of one CPU: of interest are correctness and compile time only."""
    found = jax.devices()
    if len(found) < devices:
        raise UserError(f"scaling_{devices} needs {devices} devices; add --fake_devices={devices}")
    model, task, batch = networks.make_unet(sizes.SMALL_UNET)
    state, optimizer = networks.make_state(model, batch)
    step = make_step(model_apply=model.apply, task=task, optimizer=optimizer)
    lifted = lift(step, mesh=make_mesh(found[:devices]))
    placed, state = lifted.place_batch(batch), lifted.place_state(state)
    return compile_work(step, state, placed, items=len(batch["valid"]), unit="images", donate=True)


def _start_work() -> Work:
    """A training script from its start to the end of its first step, evaluation and report."""
    folder = sizes.scratch()
    runs = 0

    def run() -> Any:
        nonlocal runs
        runs += 1
        command = [
            *(sys.executable, str(SCRIPTS / "train.py")),
            f"--config={SCRIPTS.parent / 'configs' / 'segment_phantoms.py'}",
            *("--config.training.steps=1", "--config.data.count=40"),
            f"--workdir={folder / str(runs)}",
        ]
        return subprocess.run(command, check=True, capture_output=True)

    return Work(run, unit="starts")


SCALE_CASES: dict[str, Callable[[], Work]] = {
    "folds_apart": functools.partial(_folds_work, "apart"),
    "folds_together": functools.partial(_folds_work, "loop"),
    "folds_together_vmap": functools.partial(_folds_work, "vmap"),
    "steps_single": functools.partial(_small_steps_work, 1),
    "steps_in_one_call": functools.partial(_small_steps_work, STEPS),
    **{f"scaling_{n}": functools.partial(_scaling_work, n) for n in (1, 2, 4, 8)},
    "start_training": _start_work,
}
"""Every case by its name."""
