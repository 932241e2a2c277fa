"""What both sides of a comparison work on: sizes, and data made with NumPy."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np

CLASSES = 3


@dataclasses.dataclass(frozen=True)
class UNetSize:
    """A U-Net of four levels and its batch."""

    batch: int
    shape: tuple[int, ...]
    features: tuple[int, ...]


UNETS = {
    "unet2d": UNetSize(8, (256, 256), (32, 64, 128, 256)),
    "unet3d": UNetSize(2, (64, 64, 64), (16, 32, 64, 128)),
}

HIPPOCAMPUS = UNetSize(4, (40, 56, 40), (16, 32, 64, 128))
SMALL_UNET = UNetSize(8, (64, 64), (8, 16, 32, 64))

RESNET = (128, (28, 28), 3)
"""Batch, shape and channels: those of MedMNIST."""
RESNET_CLASSES = 9


@dataclasses.dataclass(frozen=True)
class ConvolutionSize:
    """A 3-wide convolution."""

    batch: int
    shape: tuple[int, ...]
    cin: int
    cout: int


CONVOLUTIONS = {
    f"convolution{len(shape)}d_{width}": ConvolutionSize(batch, shape, width, width)
    for batch, shape, width in (
        (8, (256, 256), 32),
        (8, (128, 128), 64),
        (8, (64, 64), 128),
        (8, (32, 32), 256),
        (2, (64, 64, 64), 32),
        (2, (32, 32, 32), 64),
        (2, (16, 16, 16), 128),
    )
}

AUGMENTED = 4
AUGMENTATION_2D = (256, 256)
AUGMENTATION_3D = (64, 64, 64)

NIFTI_SHAPE, NIFTI_SPACING = (192, 192, 64), (0.8, 0.8, 2.5)
NIFTI_TARGET = (1.0, 1.0, 2.0)

SURFACE_SHAPE, SURFACE_SPACING = (128, 128, 64), (1.0, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class WindowSize:
    """A volume and the windows that it is predicted in."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    batch: int
    overlap: float


WINDOW = WindowSize((128, 128, 96), (64, 64, 64), 4, 0.5)


VOLUMES, VOLUME, PATCH, PATCHES = 16, (96, 96, 96), (64, 64, 64), 8
"""Of a set to be cut into batches of random patches: cases, their shape, patches' and how many."""
BATCHES = 20
"""That are timed as one, since those that were made ahead come for nothing."""


LARGE_VOLUME = (192, 192, 128)
"""Of a set that lies on the disk since it would not fit into the memory."""


def volume(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """One of the volumes of such a set."""
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def scratch() -> Path:
    """A folder that goes when the program ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_nifti() -> tuple[Path, Path]:
    """A compressed volume of a scanner's orientation and its mask; the paths of the two."""
    import nibabel as nib

    rng = np.random.default_rng(0)
    affine = np.diag([-NIFTI_SPACING[0], -NIFTI_SPACING[1], NIFTI_SPACING[2], 1.0])
    smooth = rng.normal(0, 300, NIFTI_SHAPE).astype(np.int16)
    folder = scratch()
    paths = folder / "image.nii.gz", folder / "mask.nii.gz"
    nib.save(nib.Nifti1Image(smooth, affine), paths[0])
    nib.save(nib.Nifti1Image(ball(NIFTI_SHAPE).astype(np.uint8), affine), paths[1])
    return paths


def ball(shape: tuple[int, ...], *, shift: float = 0.0) -> np.ndarray:
    """Two classes, one inside the other, in the middle or somewhat beside it."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) - shift for n in shape), indexing="ij")
    radius = np.sqrt(np.sum(np.square(axes), axis=0))
    return (radius < 0.6).astype(np.int32) + (radius < 0.3)


def two_masks() -> tuple[np.ndarray, np.ndarray]:
    """A prediction and the truth."""
    return ball(SURFACE_SHAPE, shift=0.05), ball(SURFACE_SHAPE)


def boxes() -> tuple[np.ndarray, np.ndarray]:
    """1,000 boxes (1000, 4) and their scores."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 400, (1000, 2))
    found = np.concatenate([low, low + rng.uniform(10, 60, low.shape)], -1).astype(np.float32)
    return found, rng.uniform(size=1000).astype(np.float32)
