"""Shared set-up: four fake CPU devices, checked array shapes, real data where there is any."""

import atexit
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: less optimising takes a fifth off their time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
).strip()

import absl.flags
import jax
import jaxtyping
import pytest

# Scripts that tests start find what others of the same session compiled, and leave nothing in the
# home of the user.
_COMPILED = tempfile.TemporaryDirectory()
atexit.register(_COMPILED.cleanup)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)

# Must come before the first computation, which fixes the number of devices.
jax.config.update("jax_num_cpu_devices", 4)
# Worker processes of the data loader read absl flags, which pytest never parses.
absl.flags.FLAGS.mark_as_parsed()
# Every annotated array of the package is checked for its shape and type while the tests run.
jaxtyping.install_import_hook("jaxmed", "typechecker.check")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or a skip that says how to have it."""
    path = os.environ.get("JAXMED_TEST_DATA")
    if not path:
        pytest.skip("JAXMED_TEST_DATA does not name a folder of real images")
    return Path(path)
