"""Run in an environment that holds the wheel and nothing else: does all of it import and work?"""

import importlib
import pkgutil
import sys
from importlib import metadata, resources
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxmed
from jaxmed.models.unet import UNet

assert Path(jaxmed.__file__).is_relative_to(sys.prefix), jaxmed.__file__
assert metadata.version("jaxmed") == jaxmed.__version__
assert resources.files("jaxmed").joinpath("py.typed").is_file()
# Run by an interpreter that has PyTorch.
WITH_EXTRAS = {"jaxmed.benchmark.torch_cases", "jaxmed.benchmark.torch_training"}
names = {module.name for module in pkgutil.walk_packages(jaxmed.__path__, "jaxmed.")}
names -= WITH_EXTRAS
for name in sorted(names):
    importlib.import_module(name)
print(f"jaxmed {jaxmed.__version__}: {len(names)} modules import, away from the checkout")

for ndim in (2, 3):
    images = jnp.zeros((1, *(16,) * ndim, 1))
    logits, _ = UNet(classes=2, features=(4, 8)).init_with_output(jax.random.key(0), images)
    assert logits.shape == (*images.shape[:-1], 2), logits.shape
    assert jnp.isfinite(logits).all()
print("a small U-Net runs on an image and on a volume")
