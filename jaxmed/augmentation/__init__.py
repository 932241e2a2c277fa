"""Random changes of training examples, on the device, inside the jitted step.

Makers such as `flip(...)` return an `Augment`: a function (key, example) -> example of one example
with float32 `image` and, where present, `mask`, `boxes` and `box_label`; other keys pass through.
2-D or 3-D is read off the image. Use them under `jax.vmap` over the batch, with a key an example.
"""

from jaxmed.augmentation.artefacts import bias_field, ringing
from jaxmed.augmentation.compose import compose, random_apply
from jaxmed.augmentation.intensity import (
    brightness,
    colour_jitter,
    contrast,
    cutout,
    gamma,
    gaussian_blur,
    gaussian_noise,
    low_resolution,
)
from jaxmed.augmentation.spatial import affine, flip, quarter_turns

__all__ = [
    "affine",
    "bias_field",
    "brightness",
    "colour_jitter",
    "compose",
    "contrast",
    "cutout",
    "flip",
    "gamma",
    "gaussian_blur",
    "gaussian_noise",
    "low_resolution",
    "quarter_turns",
    "random_apply",
    "ringing",
]
