"""Large pictures are predicted in parts, with the same result as whole."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import imageio.v3 as iio
import jax
import numpy as np
import pytest
import tifffile
from small_runs import prepared_experiment

from jaxmed.build import large, predictions
from jaxmed.build.trained import TrainedRun
from jaxmed.data.images import read_image
from jaxmed.preprocessing.intensity import NORMALIZATIONS
from jaxmed.types import UserError

NORMAL = ("dataset", *NORMALIZATIONS)


def random_run(task, *, seed=0, **settings):
    """A run of random weights, strong enough that it is sure of what it says."""
    experiment, _, _ = prepared_experiment(task, **settings)
    state = experiment.init_state(jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 2.5 if x.ndim > 1 else x, state.params)
    variables = jax.device_get({"params": params, **state.model_state})
    data = {"dtypes": ["uint8"], "median_shape": [40, 48]}
    return TrainedRun(experiment, variables, experiment.info, 0, "", {"data": data, "planned": {}})


def picture(shape, seed=0):
    """Cells of noise, lighter from left to right, so that parts differ from the whole."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (shape[0] // 4 + 1, shape[1] // 4 + 1, 3))
    fine = np.repeat(np.repeat(coarse, 4, 0), 4, 1)[: shape[0], : shape[1]]
    return (fine + np.linspace(0, 50, shape[1])[:, None]).astype(np.uint8)


def predict(run, files, output, monkeypatch, *, limit, **options):
    monkeypatch.setattr(predictions, "load_run", lambda *_: run)
    monkeypatch.setattr(large, "LARGE", limit)
    predictions.predict_run("run", [str(f) for f in files], output=output, **options)


def assert_same_objects(one, other):
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert ((pairs[0] == 0) == (pairs[1] == 0)).all()


@pytest.mark.parametrize(
    ("masks", "normalization"), [("instance", "dataset"), *(("semantic", n) for n in NORMAL)]
)
def test_masks_of_parts_are_those_of_the_whole(tmp_path, monkeypatch, masks, normalization):
    run = random_run("segmentation", **{"data.masks": masks, "data.normalization": normalization})
    image = picture((301, 190))
    tifffile.imwrite(
        tmp_path / "a.tif", image, photometric="rgb", tile=(32, 48), compression="zlib"
    )
    iio.imwrite(tmp_path / "b.png", image[:, ::-1])
    np.save(tmp_path / "c.npy", image[::-1])
    tifffile.imwrite(tmp_path / "d.tif", image[:20, :], photometric="rgb")  # less than a window
    files = [tmp_path / name for name in ("a.tif", "b.png", "c.npy", "d.tif")]
    predict(run, files, tmp_path / "whole", monkeypatch, limit=10**9)
    predict(run, files, tmp_path / "parts", monkeypatch, limit=100)
    for file in files:
        one, other = (
            read_image(tmp_path / name / file.name).array[..., 0] for name in ("whole", "parts")
        )
        assert len(np.unique(one)) > 1, "something must be found"
        if masks == "instance":
            assert_same_objects(one.astype(int), other.astype(int))
        elif normalization == "zscore":  # the one whose statistics differ in the last digits
            assert (one != other).mean() < 1e-3
        else:
            np.testing.assert_array_equal(one, other)
    with tifffile.TiffFile(tmp_path / "parts/a.tif") as tif:
        assert tif.pages[0].is_tiled and tif.pages[0].dtype == (
            np.uint32 if masks == "instance" else np.uint8
        )


def test_a_single_tile_is_predicted_as_ever(tmp_path, monkeypatch):
    run = random_run("detection")
    iio.imwrite(tmp_path / "a.png", picture((40, 48)))
    found = []
    for name, limit in (("whole", 10**9), ("parts", 100)):
        predict(run, [tmp_path / "a.png"], tmp_path / name, monkeypatch, limit=limit)
        found.append(json.loads((tmp_path / name / "detections.json").read_text()))
    whole, parts = found
    assert parts and parts == [box for box in whole if box["score"] >= 0.01]


def test_every_tile_is_a_case_of_its_own(tmp_path, monkeypatch):
    """Each box is what the tile whose core holds it gives alone."""
    run = random_run("detection", **{"data.normalization": "value_range"})
    image = picture((100, 130))
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=(16, 16))
    predict(run, [tmp_path / "a.tif"], tmp_path / "out", monkeypatch, limit=100)
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert found
    alone = []
    for top in (0, 20, 40, 60):
        for left in np.linspace(0, 82, 5).round().astype(int):
            boxes = run.predict_image(image[top : top + 40, left : left + 48])["boxes"]
            alone.append(boxes + np.array([top, left, top, left]))
    alone = np.concatenate(alone)
    for box in found:
        x, y, width, height = box["bbox"]
        assert x >= 0 and x + width <= 130.01 and y >= 0 and y + height <= 100.01
        difference = np.abs(alone - [y, x, y + height, x + width]).max(1).min()
        assert difference < 0.01


def test_what_must_be_resampled_is_refused_and_what_is_broken_is_named(
    tmp_path, monkeypatch, capsys
):
    run = random_run("segmentation")
    image = picture((120, 90))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(16, 16), compression="zlib")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].dataoffsets[-1]
    content[place : place + 40] = bytes(40)  # the last tile
    (tmp_path / "b.tif").write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 2 files.*\n.*b\.tif"):
        predict(run, [path, tmp_path / "b.tif"], tmp_path / "out", monkeypatch, limit=100)
    assert [p.name for p in (tmp_path / "out").glob("*.tif")] == ["a.tif"], "whole or not at all"
    run = random_run("segmentation", **{"data.spacing": (2.0, 2.0)})
    with pytest.raises(UserError, match="give spacing, in mm: the run resamples to"):
        run.predict_image(image)
    with pytest.raises(UserError, match="data.spacing 2 x 2"):
        predict(run, [path], tmp_path / "spaced", monkeypatch, limit=100)


def test_floating_pictures_with_nan_are_refused(tmp_path, monkeypatch):
    run = random_run("segmentation", **{"data.normalization": "percentile"})
    image = picture((120, 90)).astype(np.float32)
    image[110, 3, 0] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=(16, 16))
    with pytest.raises(UserError, match="NaN"):
        predict(run, [tmp_path / "a.tif"], tmp_path / "out", monkeypatch, limit=100)
    with pytest.raises(UserError, match="NaN"):
        run.predict_image(image)


def test_what_large_pictures_lack_is_told(tmp_path, monkeypatch, capsys):
    run = random_run("segmentation")
    tifffile.imwrite(tmp_path / "a.tif", picture((120, 90)), photometric="rgb", tile=(16, 16))
    files = [tmp_path / "a.tif"]
    predict(run, files, tmp_path / "out", monkeypatch, limit=100, probabilities=True)
    assert "note: a.tif is too large for overlays and maps" in capsys.readouterr().out


PROGRAM = """
    import resource, sys
    import test_build_large as t
    from jaxmed.build import predictions
    settings = {"data.normalization": "zscore", "evaluation.overlap": 0.1}
    run = t.random_run("segmentation", **settings)
    predictions.load_run = lambda *_: run
    predictions.predict_run("run", [sys.argv[1]], output=sys.argv[2])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_grows_with_the_width_not_the_area(tmp_path):
    """A 4,100 x 4,100 picture takes 202 MB at float32, and its probabilities as much and more."""
    small = picture((64, 64))
    tifffile.imwrite(tmp_path / "small.tif", small, photometric="rgb")
    tile = picture((256, 256))
    with tifffile.TiffWriter(tmp_path / "big.tif") as writer:
        writer.write(
            (tile for _ in range(17**2)),
            shape=(4100, 4100, 3),
            dtype=np.uint8,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
        )
    peaks = {}
    for name in ("small", "big"):
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
        command += [str(tmp_path / f"{name}.tif"), str(tmp_path / "out")]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        peaks[name] = int(done.stdout.split()[-1])
    assert read_image(tmp_path / "out/big.tif").array.shape == (4100, 4100, 1)
    assert peaks["big"] - peaks["small"] < 100, f"peaks in MB: {peaks}"
