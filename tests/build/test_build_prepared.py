"""Cases that are prepared on disk for training."""

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build.prepared import prepare_run
from jaxmed.build.runs import train_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.training.checkpoints import restore_variables


@pytest.mark.slow
def test_prepared_cases_train_the_same_and_are_used_again(tmp_path, capsys):
    write_phantoms(tmp_path / "data", layout="pairs", count=24, size=32)
    path = {"data.path": str(tmp_path / "data")}
    common = {**path, "training.steps": 3, "training.evaluate_every": 2}
    found = []
    for name, settings in (
        ("plain", {}),
        ("first", {"data.prepared": str(tmp_path / "sets")}),
        ("again", {"data.prepared": str(tmp_path / "sets"), "data.cache_gb": 0.0}),
        ("workers", {"data.prepared": str(tmp_path / "sets"), "data.workers": 2}),
    ):
        train_run(small_config("segmentation", "pairs", **common, **settings), tmp_path / name)
        assert ("prepared 17 cases" in capsys.readouterr().out) == (name == "first")
        found.append(restore_variables(tmp_path / name / "checkpoints")[0])
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    [image] = sorted((tmp_path / "data").rglob("images/**/*.png"))[:1]
    iio.imwrite(image, 255 - iio.imread(image))
    prepare_run(small_config("segmentation", "pairs", **common), tmp_path / "sets")
    assert "prepared 17 cases" in capsys.readouterr().out
    assert len(list((tmp_path / "sets").iterdir())) == 2
