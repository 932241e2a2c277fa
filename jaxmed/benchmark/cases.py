"""The named cases: what the library does, each as work to be timed.

The same names in `torch_cases.py` are the same work in PyTorch and MONAI; sizes that both read are
in `sizes.py`.
"""

from __future__ import annotations

import atexit
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed import boxes
from jaxmed.augmentation import intensity as look
from jaxmed.augmentation import spatial as place
from jaxmed.augmentation.compose import compose
from jaxmed.benchmark import networks, sizes
from jaxmed.benchmark.explanation_cases import EXPLANATION_CASES
from jaxmed.benchmark.scale_cases import SCALE_CASES
from jaxmed.benchmark.timing import Work, compile_work
from jaxmed.build.preparation import Prepare, PrepareForTraining, TrainingView
from jaxmed.data.images import read_image
from jaxmed.data.loader import training_batches
from jaxmed.data.shards import Shards, write_shards
from jaxmed.data.sources.base import make_example
from jaxmed.evaluation.bootstrap import bootstrap_weights
from jaxmed.inference.predictor import Predictor
from jaxmed.metrics.segmentation import score_masks
from jaxmed.models.convolution import convolution, use_onednn
from jaxmed.preprocessing import intensity, spatial
from jaxmed.tasks.segmentation import Segmentation
from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.state import network_variables
from jaxmed.training.step import make_step
from jaxmed.types import DatasetInfo, Example

CASES: dict[str, Callable[[], Work]] = {**SCALE_CASES, **EXPLANATION_CASES}
"""Every case by its name."""


def _case(name: str) -> Callable[[Callable[[], Work]], Callable[[], Work]]:
    def add(make: Callable[[], Work]) -> Callable[[], Work]:
        CASES[name] = make
        return make

    return add


def _step_work(model: Any, task: Any, batch: dict[str, Any]) -> Work:
    state, optimizer = networks.make_state(model, batch)
    step = make_step(model_apply=model.apply, task=task, optimizer=optimizer)
    placed = jax.device_put(batch)
    return compile_work(step, state, placed, items=len(batch["valid"]), unit="images", donate=True)


def _forward_work(model: Any, task: Any, batch: dict[str, Any]) -> Work:
    del task
    variables = network_variables(networks.make_state(model, batch)[0])
    return compile_work(
        lambda v, x: model.apply(v, x, train=False),
        variables,
        jax.device_put(batch["image"]),
        items=len(batch["image"]),
        unit="images",
    )


def _network_work(use: Callable[..., Work], make: Callable[[], Any]) -> Work:
    return use(*make())


_NETWORKS: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    **{name: functools.partial(networks.make_unet, size) for name, size in sizes.UNETS.items()},
    "resnet18": networks.make_resnet,
    "detector2d": lambda: networks.make_detector(8, (192, 192)),
    "detector3d": lambda: networks.make_detector(2, (48, 48, 48)),
}
for _name, _make in _NETWORKS.items():
    CASES[f"step_{_name}"] = functools.partial(_network_work, _step_work, _make)
    CASES[f"forward_{_name}"] = functools.partial(_network_work, _forward_work, _make)


def _bfloat16(make: Callable[[], Work]) -> Callable[[], Work]:
    """The same work with products of bfloat16 on the CPU, whatever its arrays are."""

    def made() -> Work:
        with use_onednn(bfloat16=True):
            return make()

    return made


for _name in [f"{use}_{net}" for use in ("step", "forward") for net in list(_NETWORKS)[:3]]:
    CASES[f"{_name}_bfloat16"] = _bfloat16(CASES[_name])


def _convolution_work(size: sizes.ConvolutionSize, *, backward: bool, onednn: bool) -> Work:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (size.batch, *size.shape, size.cin))
    kernel = jax.random.normal(keys[1], (*(3,) * len(size.shape), size.cin, size.cout))

    def forward(x, kernel):
        with use_onednn(onednn):
            return convolution(x, kernel)

    def both(x, kernel):
        y, pullback = jax.vjp(forward, x, kernel)
        return y, pullback(jnp.ones_like(y))

    products = 2.0 * size.batch * float(np.prod(size.shape)) * kernel.size
    return compile_work(
        both if backward else forward,
        x,
        kernel,
        items=size.batch,
        unit="images",
        flops=products * (3 if backward else 1),
    )


for _name, _size in sizes.CONVOLUTIONS.items():
    for _ending, _backward, _onednn in (
        ("", False, True),
        ("_backward", True, True),
        ("_xla", False, False),
        ("_backward_xla", True, False),
    ):
        CASES[f"{_name}{_ending}"] = functools.partial(
            _convolution_work, _size, backward=_backward, onednn=_onednn
        )


def _augmentation_work(shape: Sequence[int]) -> Work:
    augment = compose(
        place.flip(),
        place.affine(rotation=15.0, scale=(0.8, 1.25), probability=1.0),
        look.gaussian_noise(probability=1.0),
        look.brightness(probability=1.0),
        # Without what MONAI does not do: its own leave the range and the statistics.
        look.contrast(preserve_range=False, probability=1.0),
        look.gamma(retain_stats=False, probability=1.0),
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(sizes.AUGMENTED, *shape, 1)).astype(np.float32),
        "mask": rng.integers(0, sizes.CLASSES, (sizes.AUGMENTED, *shape)).astype(np.int32),
    }
    return compile_work(
        lambda keys, batch: jax.vmap(augment)(keys, batch),
        jax.random.split(jax.random.key(0), sizes.AUGMENTED),
        jax.device_put(batch),
        items=sizes.AUGMENTED,
        unit="images",
    )


CASES["augmentation2d"] = lambda: _augmentation_work(sizes.AUGMENTATION_2D)
CASES["augmentation3d"] = lambda: _augmentation_work(sizes.AUGMENTATION_3D)


@_case("prepare_nifti")
def prepare_nifti() -> Work:
    """Read a compressed NIfTI with its mask, turn, resample and normalise both."""
    image, mask = sizes.write_nifti()

    def run() -> Any:
        read = read_image(image)
        example = make_example(read.array, index=0, spacing=read.spacing)
        example["mask"] = read_image(mask, indices=True).array[..., 0].astype(np.int32)
        example = spatial.resample(example, spacing=sizes.NIFTI_TARGET)
        return intensity.zscore(example)

    return Work(run, unit="cases")


def _prepared_volume(number: int, shape: tuple[int, ...]) -> Example:
    example = make_example(sizes.volume(number, shape)[..., None], index=number)
    example["mask"] = sizes.ball(shape)
    return PrepareForTraining(Prepare(channels=1, normalization="zscore"))(example)


def _loader_work(cases: Any) -> Work:
    """Batches of random patches, a third on foreground."""
    batches = training_batches(
        cases,
        range(sizes.VOLUMES),
        batch_size=sizes.PATCHES,
        seed=0,
        prepare=TrainingView(patch=sizes.PATCH),
    )
    atexit.register(batches.close)

    def run() -> None:
        for _ in range(sizes.BATCHES):
            next(batches)

    return Work(run, items=sizes.BATCHES * sizes.PATCHES, unit="patches")


@_case("loader")
def loader() -> Work:
    """Of prepared volumes in memory."""
    return _loader_work([_prepared_volume(i, sizes.VOLUME) for i in range(sizes.VOLUMES)])


@_case("loader_prepared")
def loader_prepared() -> Work:
    """Of larger prepared volumes on disk, read anew for each patch."""
    folder, names = sizes.scratch(), [str(number) for number in range(sizes.VOLUMES)]
    read = functools.partial(_prepared_volume, shape=sizes.LARGE_VOLUME)
    write_shards(read, range(sizes.VOLUMES), names, folder, key="")
    info = DatasetInfo("volumes", "segmentation", 3, 1, ("background", "outer", "inner"))
    return _loader_work(Shards(folder, key="", info=info))


@_case("surface_scores")
def surface_scores() -> Work:
    """HD95, NSD, Dice and IoU of one case."""
    prediction, truth = sizes.two_masks()
    names = ("background", *(f"class{i}" for i in range(1, sizes.CLASSES)))
    return Work(
        lambda: score_masks(prediction, truth, spacing=sizes.SURFACE_SPACING, class_names=names),
        unit="cases",
    )


def _window_case(size: sizes.WindowSize, *, whole: bool) -> Work:
    unet = sizes.UNETS["unet3d"]
    model, task, _ = networks.make_unet(unet)
    example = {"image": np.zeros((1, *size.window, 1), np.float32)}
    variables = network_variables(networks.make_state(model, example)[0])

    @jax.jit
    def forward(image):
        return task.predict(model.apply(variables, image, train=False), {})

    image = np.random.default_rng(0).normal(size=(*size.shape, 1)).astype(np.float32)
    predictor = Predictor(
        lambda batch: forward(batch["image"]),
        window=size.window,
        batch_size=size.batch,
        blend=True,
        overlap=size.overlap,
    )
    if whole:
        return Work(lambda: list(predictor([{"image": image}])), unit="cases")
    batch = jnp.zeros((size.batch, *size.window, 1))
    windows = len(predictor._regions(size.shape))
    batches = -(-windows // size.batch)

    def run() -> None:
        for _ in range(batches):
            jax.block_until_ready(forward(batch))

    return Work(run, unit="cases")


CASES["sliding_window"] = lambda: _window_case(sizes.WINDOW, whole=True)
CASES["sliding_window_network"] = lambda: _window_case(sizes.WINDOW, whole=False)


@_case("nms")
def non_maximum_suppression() -> Work:
    """Of the boxes of one image."""
    found, scores = sizes.boxes()
    return compile_work(
        lambda b, s: boxes.nms(b, s, iou_threshold=0.5, max_boxes=100),
        jnp.asarray(found),
        jnp.asarray(scores),
        items=1,
        unit="images",
    )


@_case("bootstrap")
def bootstrap() -> Work:
    """10,000 resamples of the Dice of 500 cases of 3 classes."""
    rng = np.random.default_rng(0)
    names = ("background", "a", "b", "c")
    rows = [
        {"dice": v.mean(), **{f"dice/{n}": x for n, x in zip(names[1:], v, strict=True)}}
        for v in rng.uniform(size=(500, 3))
    ]
    task = Segmentation(names)

    def run() -> Any:
        weights = bootstrap_weights(len(rows), resamples=10_000, seed=0)
        return task.summarize(rows, weights=weights)

    return Work(run, items=10_000, unit="resamples")


@_case("checkpoint_save")
def checkpoint_save() -> Work:
    """The whole state of the 2-D U-Net, until it is on disk."""
    model, _, batch = networks.make_unet(sizes.UNETS["unet2d"])
    state, _ = networks.make_state(model, batch)
    folder = sizes.scratch()
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        with Checkpoints(folder / str(step)) as checkpoints:
            checkpoints.save(state.replace(step=jnp.asarray(step)), wait=True)

    return Work(run, unit="saves")


@_case("import")
def import_time() -> Work:
    """Start Python and import what a training script does."""
    command = [sys.executable, "-c", "import jaxmed.build.cli, jaxmed.build.runs"]
    return Work(lambda: subprocess.run(command, check=True), unit="starts")
