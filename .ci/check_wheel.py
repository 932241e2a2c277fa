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
from jaxmed.types import UserError

assert Path(jaxmed.__file__).is_relative_to(sys.prefix), jaxmed.__file__
assert metadata.version("jaxmed") == jaxmed.__version__
assert resources.files("jaxmed").joinpath("py.typed").is_file()
# Run by an interpreter that has PyTorch.
WITH_EXTRAS = {"jaxmed.benchmark.torch_cases", "jaxmed.benchmark.torch_training"}
names = {module.name for module in pkgutil.walk_packages(jaxmed.__path__, "jaxmed.")}
names -= WITH_EXTRAS
lacking = []
for name in sorted(names):
    try:
        importlib.import_module(name)
    except UserError as error:  # which says which extra it needs
        assert "EXTRAS=" in str(error), error
        lacking.append(name)
assert len(lacking) < 10, lacking
print(
    f"jaxmed {jaxmed.__version__}: {len(names) - len(lacking)} modules import, away from the "
    f"checkout; {len(lacking)} ask for an extra"
)

for ndim in (2, 3):
    images = jnp.zeros((1, *(16,) * ndim, 1))
    logits, _ = UNet(classes=2, features=(4, 8)).init_with_output(jax.random.key(0), images)
    assert logits.shape == (*images.shape[:-1], 2), logits.shape
    assert jnp.isfinite(logits).all()
print("a small U-Net runs on an image and on a volume")
