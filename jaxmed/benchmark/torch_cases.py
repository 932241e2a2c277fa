"""The same work as `cases.py` in PyTorch and MONAI, in a process of its own.

    python -m jaxmed.benchmark.torch_cases CASE

It answers each line on standard input with the seconds that one run took. Written as a careful
user of these libraries would, with their own defaults: training mode, no compilation, and float32
or, where our products are of bfloat16, automatic mixed precision (autocast). Arrays are in the
default layout; experiments/results/cpu.md says what channels last changes.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai import data, transforms
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.networks.nets import DynUNet, ResNet

from jaxmed.benchmark import sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _done() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _unet(size: sizes.UNetSize) -> tuple[Any, Any, Any, Any]:
    ndim, levels = len(size.shape), len(size.features)
    model = DynUNet(
        spatial_dims=ndim,
        in_channels=1,
        out_channels=sizes.CLASSES,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(size.features),
        norm_name="instance",
    ).to(DEVICE)
    x = torch.randn(size.batch, 1, *size.shape, device=DEVICE)
    y = torch.randint(0, sizes.CLASSES, (size.batch, 1, *size.shape), device=DEVICE)
    return model, DiceCELoss(to_onehot_y=True, softmax=True, batch=True), x, y


def _resnet() -> tuple[Any, Any, Any, Any]:
    batch, shape, channels = sizes.RESNET
    model = ResNet(
        "basic",
        [2, 2, 2, 2],
        [64, 128, 256, 512],
        spatial_dims=2,
        n_input_channels=channels,
        conv1_t_size=3,
        conv1_t_stride=1,
        no_max_pool=True,
        num_classes=sizes.RESNET_CLASSES,
    ).to(DEVICE)
    x = torch.randn(batch, channels, *shape, device=DEVICE)
    y = torch.randint(0, sizes.RESNET_CLASSES, (batch,), device=DEVICE)
    return model, torch.nn.CrossEntropyLoss(), x, y


def _work(use: Callable[..., Callable[[], Any]], make: Callable[[], Any]) -> Callable[[], Any]:
    return use(*make())


def _autocast(enabled: bool) -> Any:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=enabled)


def _step(model: Any, loss: Any, x: Any, y: Any, *, mixed: bool = False) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        with _autocast(mixed):
            outputs = model(x)
        loss(outputs.float(), y).backward()
        optimizer.step()
        _done()

    return run


def _forward(model: Any, loss: Any, x: Any, y: Any, *, mixed: bool = False) -> Callable[[], Any]:
    del loss, y
    model.eval()

    def run() -> None:
        with torch.inference_mode(), _autocast(mixed):
            model(x)
        _done()

    return run


def _convolution(size: sizes.ConvolutionSize, *, backward: bool) -> Callable[[], Any]:
    function = (torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(size.shape) - 2]
    x = torch.randn(size.batch, size.cin, *size.shape, device=DEVICE, requires_grad=backward)
    window = [3] * len(size.shape)
    w = torch.randn(size.cout, size.cin, *window, device=DEVICE, requires_grad=backward)

    def run() -> None:
        if backward:
            x.grad = w.grad = None
            y = function(x, w, padding=1)
            y.backward(torch.ones_like(y))
        else:
            with torch.inference_mode():
                function(x, w, padding=1)
        _done()

    return run


def _augmentation(shape: Sequence[int]) -> Callable[[], Any]:
    ndim, keys = len(shape), ["image", "mask"]
    turn = float(np.deg2rad(15))
    augment = transforms.Compose(
        [
            *(transforms.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(ndim)),
            transforms.RandAffined(
                keys,
                prob=1.0,
                rotate_range=[turn] * (1 if ndim == 2 else 3),
                scale_range=[(-0.2, 0.25)] * ndim,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            ),
            transforms.RandGaussianNoised("image", prob=1.0, std=0.1),
            transforms.RandScaleIntensityd("image", factors=0.25, prob=1.0),
            transforms.RandShiftIntensityd("image", offsets=0.1, prob=1.0),
            transforms.RandAdjustContrastd("image", prob=1.0, gamma=(0.7, 1.5)),
        ]
    )
    rng = np.random.default_rng(0)
    examples = [
        {
            "image": torch.as_tensor(rng.normal(size=(1, *shape)).astype(np.float32)),
            "mask": torch.as_tensor(rng.integers(0, sizes.CLASSES, (1, *shape))).float(),
        }
        for _ in range(sizes.AUGMENTED)
    ]
    return lambda: [augment(dict(example)) for example in examples]


def _prepare_nifti() -> Callable[[], Any]:
    image, mask = sizes.write_nifti()
    keys = ["image", "mask"]
    prepare = transforms.Compose(
        [
            transforms.LoadImaged(keys, ensure_channel_first=True),
            transforms.Orientationd(keys, axcodes="RAS", labels=None),
            transforms.Spacingd(keys, pixdim=sizes.NIFTI_TARGET, mode=["bilinear", "nearest"]),
            transforms.NormalizeIntensityd("image"),
        ]
    )
    return lambda: prepare({"image": str(image), "mask": str(mask)})


def _loader(*, on_disk: bool) -> Callable[[], Any]:
    """Random patches of volumes that were prepared once, with what is needed to find foreground."""
    folder, keys = sizes.scratch(), ["image", "mask"]
    shape = sizes.LARGE_VOLUME if on_disk else sizes.VOLUME
    for number in range(sizes.VOLUMES):
        np.save(folder / f"image{number}.npy", sizes.volume(number, shape))
    np.save(folder / "mask.npy", sizes.ball(shape).astype(np.uint8))
    items = [
        {"image": str(folder / f"image{number}.npy"), "mask": str(folder / "mask.npy")}
        for number in range(sizes.VOLUMES)
    ]
    indices = {"fg_indices_key": "mask_fg_indices", "bg_indices_key": "mask_bg_indices"}
    prepare = transforms.Compose(
        [
            transforms.LoadImaged(keys, ensure_channel_first=True),
            transforms.NormalizeIntensityd("image"),
            transforms.FgBgToIndicesd("mask"),
            transforms.RandCropByPosNegLabeld(
                keys, "mask", sizes.PATCH, pos=1, neg=2, num_samples=1, **indices
            ),
            transforms.DeleteItemsd(list(indices.values())),
        ]
    )
    if on_disk:
        dataset = data.PersistentDataset(items, prepare, cache_dir=folder / "cache")
    else:
        dataset = data.CacheDataset(items, prepare, progress=False)
    loader = data.DataLoader(
        dataset, num_workers=2, batch_size=sizes.PATCHES, shuffle=True, persistent_workers=True
    )
    batches = (batch for _ in itertools.count() for batch in loader)

    def run() -> None:
        for _ in range(sizes.BATCHES):
            next(batches)

    return run


def _surface_scores() -> Callable[[], Any]:
    def one_hot(mask: np.ndarray) -> Any:
        return torch.as_tensor(mask[None] == np.arange(sizes.CLASSES).reshape(-1, 1, 1, 1))[None]

    prediction, truth = (one_hot(mask) for mask in sizes.two_masks())
    thresholds = [1.0] * (sizes.CLASSES - 1)

    def run() -> None:
        compute_hausdorff_distance(prediction, truth, percentile=95, spacing=sizes.SURFACE_SPACING)
        compute_surface_dice(prediction, truth, thresholds, spacing=sizes.SURFACE_SPACING)

    return run


def _sliding_window() -> Callable[[], Any]:
    size = sizes.WINDOW
    model = _unet(sizes.UNETS["unet3d"])[0].eval()
    image = torch.randn(1, 1, *size.shape, device=DEVICE)

    def run() -> None:
        with torch.inference_mode():
            sliding_window_inference(
                image,
                size.window,
                size.batch,
                lambda x: torch.softmax(model(x), 1),
                overlap=size.overlap,
                mode="gaussian",
            )
        _done()

    return run


def _import() -> Callable[[], Any]:
    import subprocess

    words = "import torch, monai.transforms, monai.networks.nets, monai.data"
    return lambda: subprocess.run([sys.executable, "-c", words], check=True)


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "augmentation2d": lambda: _augmentation(sizes.AUGMENTATION_2D),
    "augmentation3d": lambda: _augmentation(sizes.AUGMENTATION_3D),
    "prepare_nifti": _prepare_nifti,
    "loader": lambda: _loader(on_disk=False),
    "loader_prepared": lambda: _loader(on_disk=True),
    "surface_scores": _surface_scores,
    "sliding_window": _sliding_window,
    "import": _import,
}
_NETWORKS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(_unet, size) for name, size in sizes.UNETS.items()},
    "resnet18": _resnet,
}
for _name, _make in _NETWORKS.items():
    for _use, _run in (("step", _step), ("forward", _forward)):
        CASES[f"{_use}_{_name}"] = functools.partial(_work, _run, _make)
        _mixed = functools.partial(_run, mixed=True)
        CASES[f"{_use}_{_name}_bfloat16"] = functools.partial(_work, _mixed, _make)
for _name, _conv in sizes.CONVOLUTIONS.items():
    CASES[_name] = functools.partial(_convolution, _conv, backward=False)
    CASES[f"{_name}_backward"] = functools.partial(_convolution, _conv, backward=True)


def main(name: str) -> None:
    """Answer to the other process, beginning with what this is; "-" where there is no such case."""
    import monai

    if name not in CASES:
        print("-", flush=True)
        return
    torch.manual_seed(0)
    run = CASES[name]()
    print(f"torch {torch.__version__}, monai {monai.__version__}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
