"""The networks that are timed, each with its task and a batch of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.benchmark import sizes
from jaxmed.models.detector import Detector
from jaxmed.models.resnet import ResNet, ResNetBackbone
from jaxmed.models.unet import UNet
from jaxmed.tasks.classification import Classification
from jaxmed.tasks.detection import Detection
from jaxmed.tasks.segmentation import Segmentation
from jaxmed.training.optimizers import make_optimizer
from jaxmed.training.state import TrainState, init_state


def default_dtype() -> Any:
    """Float32 on the CPU, bfloat16 elsewhere, as in training."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def make_unet(case: sizes.UNetSize) -> tuple[Any, Any, dict[str, Any]]:
    """A U-Net with its task and a batch."""
    model = UNet(sizes.CLASSES, features=case.features, dtype=default_dtype())
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(case.batch, *case.shape, 1)).astype(np.float32),
        "mask": rng.integers(0, sizes.CLASSES, (case.batch, *case.shape)).astype(np.int32),
        "valid": np.ones(case.batch, np.float32),
    }
    names = ("background", *(f"class{i}" for i in range(1, sizes.CLASSES)))
    return model, Segmentation(names), batch


def make_resnet() -> tuple[Any, Any, dict[str, Any]]:
    """A ResNet-18 with its task and a batch."""
    batch, shape, channels = sizes.RESNET
    rng = np.random.default_rng(0)
    model = ResNet(sizes.RESNET_CLASSES, ResNetBackbone(dtype=default_dtype()))
    data = {
        "image": rng.normal(size=(batch, *shape, channels)).astype(np.float32),
        "label": rng.integers(0, sizes.RESNET_CLASSES, batch).astype(np.int32),
        "valid": np.ones(batch, np.float32),
    }
    return model, Classification([str(i) for i in range(sizes.RESNET_CLASSES)]), data


def make_detector(batch: int, shape: Sequence[int]) -> tuple[Any, Any, dict[str, Any]]:
    """A detector with its task and a batch."""
    model = Detector(
        3, ResNetBackbone(width=32, stem_strides=2, dtype=default_dtype()), dtype=default_dtype()
    )
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.7 * np.array(shape), (batch, 20, len(shape)))
    high = low + rng.uniform(0.1, 0.3, low.shape) * np.array(shape)
    data = {
        "image": rng.normal(size=(batch, *shape, 1)).astype(np.float32),
        "boxes": np.concatenate([low, high], -1).astype(np.float32),
        "box_label": rng.integers(0, 3, (batch, 20)).astype(np.int32),
        "valid": np.ones(batch, np.float32),
    }
    return model, Detection(("a", "b", "c")), data


def make_state(model: Any, batch: dict[str, Any]) -> tuple[TrainState, Any]:
    """A fresh state for AdamW, and the optimizer."""
    optimizer = make_optimizer("adamw")
    state = jax.jit(
        lambda key: init_state(
            lambda k: model.init(k, jnp.zeros((1, *batch["image"].shape[1:]))),
            optimizer,
            key=key,
            hyper={"learning_rate": 1e-3, "weight_decay": 1e-2},
        )
    )(jax.random.key(0))
    return state, optimizer
