"""Train a U-Net of MONAI on hippocampus for some minutes, and print its validation Dice.

    python -m jaxmed.benchmark.torch_training FOLDER --minutes=8

One JSON line an evaluation: minutes of training (the clock stands still while evaluating) and the
Dice, mean over the two classes of a case, then over cases. As a careful user would: everything in
memory, patches around the whole structure, the augmentations of MONAI's tutorials, AdamW with a
cosine schedule over the time there is.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai import transforms
from monai.data import CacheDataset, DataLoader, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import DynUNet

PATCH = (40, 56, 40)
BATCH = 4
FEATURES = [16, 32, 64, 128]
KEYS = ["image", "label"]


def find_cases(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The files of each part that split.csv names."""
    parts: dict[str, list[dict[str, str]]] = {}
    with (folder / "split.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row.get("id") or Path(row["file"]).name.removesuffix(".nii.gz")
            case = {
                "image": str(folder / "imagesTr" / f"{name}.nii.gz"),
                "label": str(folder / "labelsTr" / f"{name}.nii.gz"),
            }
            parts.setdefault(row["split"], []).append(case)
    return parts


def make_transforms() -> tuple[Any, Any]:
    """Of training and of evaluation."""
    load = [
        transforms.LoadImaged(KEYS),
        transforms.EnsureChannelFirstd(KEYS),
        transforms.Orientationd(KEYS, axcodes="RAS", labels=None),
        transforms.NormalizeIntensityd(["image"]),
    ]
    turn = float(np.deg2rad(20))
    vary = [
        transforms.SpatialPadd(KEYS, PATCH),
        transforms.RandSpatialCropd(KEYS, PATCH, random_size=False),
        transforms.RandFlipd(KEYS, prob=0.5, spatial_axis=0),
        transforms.RandAffined(
            KEYS,
            prob=0.4,
            rotate_range=[turn] * 3,
            scale_range=[(-0.2, 0.25)] * 3,
            mode=["bilinear", "nearest"],
            padding_mode="border",
        ),
        transforms.RandGaussianNoised(["image"], prob=0.1, std=0.1),
        transforms.RandGaussianSmoothd(["image"], prob=0.1),
        transforms.RandScaleIntensityd(["image"], factors=0.25, prob=0.2),
        transforms.RandAdjustContrastd(["image"], prob=0.2, gamma=(0.7, 1.5)),
    ]
    return transforms.Compose([*load, *vary]), transforms.Compose(load)


def make_model() -> Any:
    """The U-Net that the preset of jaxmed trains too."""
    levels = len(FEATURES)
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=3,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=FEATURES,
        norm_name="instance",
    )


def evaluate(model: Any, loader: Any) -> float:
    """Mean Dice of the validation cases."""
    metric = DiceMetric(include_background=False)
    truth_of = transforms.AsDiscrete(to_onehot=3)
    guess_of = transforms.AsDiscrete(argmax=True, to_onehot=3)
    model.eval()
    with torch.inference_mode():
        for batch in loader:
            out = sliding_window_inference(batch["image"], PATCH, BATCH, model, overlap=0.5)
            metric(
                [guess_of(x) for x in decollate_batch(out)],
                [truth_of(x) for x in decollate_batch(batch["label"])],
            )
    model.train()
    return float(metric.aggregate())


def main() -> None:
    """Train, evaluate now and then, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--every", type=float, default=1.0, help="minutes between evaluations")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    total = 60 * arguments.minutes
    clock = Clock()
    parts = find_cases(arguments.folder)
    for_training, for_evaluation = make_transforms()
    train = CacheDataset(parts["train"], for_training, progress=False)
    val = DataLoader(CacheDataset(parts["val"], for_evaluation, progress=False), batch_size=1)
    loader = DataLoader(
        train,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
    )
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=1e-4)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    due = 60 * arguments.every
    for steps, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(loader)), start=1):
        share = min(clock.seconds() / total, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.zero_grad()
        loss_of(model(batch["image"]), batch["label"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()
        now = clock.seconds()
        if now < min(due, total):
            continue
        dice = evaluate(model, val)
        told = {"minutes": round(now / 60, 2), "steps": steps, "dice": round(dice, 4)}
        print(json.dumps(told), flush=True)
        clock.leave_out_since(now)
        due += 60 * arguments.every
        if now >= total:
            return


class Clock:
    """Seconds since it was made, without those that are left out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Until now."""
        return time.perf_counter() - self._start

    def leave_out_since(self, then: float) -> None:
        """Leave out what was after `then` seconds."""
        self._start += self.seconds() - then


if __name__ == "__main__":
    main()
