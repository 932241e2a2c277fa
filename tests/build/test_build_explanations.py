"""Explanations of small runs of each task, from their data and from files."""

import csv
import functools
import json

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest
import tifffile
from small_runs import small_config

from jaxmed.build.explained import RunToExplain
from jaxmed.build.explanations import explain_run
from jaxmed.build.runs import train_run
from jaxmed.build.trained import load_run
from jaxmed.data.sources.base import make_example
from jaxmed.explanation.explainer import METHODS
from jaxmed.types import UserError

SETTINGS = {
    "classification": {},
    "detection": {},
    "segmentation": {"data.kind": "body", "data.ndim": 3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small finished run of a task, trained when first asked for."""

    @functools.cache
    def train(task):
        workdir = tmp_path_factory.mktemp("runs") / task
        train_run(small_config(task, **SETTINGS[task]), workdir)
        return workdir

    return train


@pytest.mark.slow
def test_a_classification_is_explained_with_all_methods_and_features(trained, tmp_path):
    rows = explain_run(
        trained("classification"), output=tmp_path, methods=list(METHODS), cases=1, features=True
    )
    assert [row["method"] for row in rows] == list(METHODS)
    # An even map, as of random weights, is compared with nothing.
    assert any({"correlation", "ssim"} <= row.keys() for row in rows)
    [integrated] = [row for row in rows if row["method"] == "integrated_gradients"]
    assert integrated["gap"] <= 0.01
    for row in rows:
        assert {"deletion", "insertion", "share", "failures"} <= row.keys()
        [path] = (tmp_path / "maps" / row["method"]).iterdir()
        assert np.squeeze(tifffile.imread(path)).shape == (32, 32)
    assert json.loads((tmp_path / "attributions.json").read_text())["maps"] == rows
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    with (tmp_path / "features.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 40 - 6  # without the test part
    for name in ("pca.png", "neighbours.png", "neighbours.csv", "probe.json", "laplace.json"):
        assert (tmp_path / name).is_file()


@pytest.mark.slow
def test_a_box_is_explained_in_a_file_of_another_size(trained, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
    iio.imwrite(tmp_path / "a.png", image)
    output = tmp_path / "out"
    [row] = explain_run(
        trained("detection"), [str(tmp_path / "a.png")], output=output, methods=["gradcam"]
    )
    assert row["target"].startswith("box of")
    assert np.squeeze(tifffile.imread(output / "maps/gradcam/a.tif")).shape == (40, 50)


@pytest.mark.slow
def test_a_volume_s_map_has_the_volume_s_geometry(trained, tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = [5, 6, 7]
    volume = np.random.default_rng(0).normal(0, 100, (40, 36, 33)).astype(np.float32)
    nib.Nifti1Image(volume, affine).to_filename(tmp_path / "v.nii.gz")
    output = tmp_path / "out"
    [row] = explain_run(
        trained("segmentation"),
        [str(tmp_path / "v.nii.gz")],
        output=output,
        methods=["gradient"],
        target="lesion",
    )
    assert row["target"].startswith("lesion")
    written = nib.load(output / "maps/gradient/v.nii.gz")
    assert written.shape[:3] == volume.shape
    np.testing.assert_allclose(written.affine, affine)
    assert written.get_fdata().max() > 0


@pytest.mark.slow
def test_mistakes_are_told(trained, tmp_path):
    workdir = trained("classification")
    for options, word in (
        ({"methods": ["gradcm"]}, "--method"),
        ({"target": "wolf"}, "round, elongated, atypical"),
        ({"layer": "no"}, "--layer"),
        ({"cases": 0}, "--cases"),
    ):
        with pytest.raises(UserError, match=word):
            explain_run(workdir, output=tmp_path, **options)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        explain_run(workdir, [str(tmp_path / "broken.png")], output=tmp_path / "out")


@pytest.mark.slow
def test_the_input_is_what_the_network_gets_in_prediction(trained):
    run = load_run(trained("classification"))
    explained = RunToExplain(run)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 1), np.uint8)
    case = explained.explain(run.experiment.prepare(make_example(image, index=0)), 2)
    assert case.score == pytest.approx(float(run.predict_image(image)[2]), abs=1e-5)
