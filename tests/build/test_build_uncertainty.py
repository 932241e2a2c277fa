"""How unsure predictions are, from images to tables and maps."""

import csv

import nibabel as nib
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build.config import config_of_run, read_run, update
from jaxmed.build.predictions import predict_run
from jaxmed.build.runs import train_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.types import UserError


def config_with(run, **settings):
    config = config_of_run(read_run(run))
    update(config, settings, where="test")
    return config


def table(folder):
    with (folder / "predictions.csv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_classes_have_columns(tmp_path):
    config = small_config("classification", **{"model.dropout": 0.5, "training.seeds": 2})
    train_run(config, tmp_path / "run")
    write_phantoms(tmp_path / "data", layout="class_folders", count=6, size=32, parts=False)
    run, images = tmp_path / "run", [str(tmp_path / "data")]
    predict_run(run, images, output=tmp_path / "plain")
    predict_run(run, images, output=tmp_path / "unsure", uncertainty=True)
    plain, unsure = table(tmp_path / "plain"), table(tmp_path / "unsure")
    names = [name for name in next(iter(plain.values())) if name not in ("file", "prediction")]
    assert not {"entropy", "mutual_information"} & set(names)
    for file, row in unsure.items():
        assert {k: v for k, v in row.items() if k in plain[file]} == plain[file]
        p = np.array([float(row[name]) for name in ("round", "elongated", "atypical")])
        assert float(row["entropy"]) == pytest.approx(-(p * np.log(p)).sum() / np.log(3), abs=1e-4)
        assert 0 <= float(row["mutual_information"]) <= float(row["entropy"])
    # Two networks never agree wholly; dropout makes more of them, the same ones every time.
    assert max(float(row["mutual_information"]) for row in unsure.values()) > 0
    config = config_with(run, **{"evaluation.dropout_samples": 4})
    for name in ("a", "b"):
        predict_run(run, images, output=tmp_path / name, uncertainty=True, config=config)
    assert table(tmp_path / "a") == table(tmp_path / "b") != unsure


@pytest.mark.slow
def test_volumes_have_maps_in_their_own_geometry(tmp_path):
    write_phantoms(tmp_path / "data", layout="msd", count=10, size=24, ndim=3, kind="body")
    path = {"data.path": str(tmp_path / "data"), "data.patch": (16, 16, 16)}
    config = small_config("segmentation", "msd", **path, **{"model.dropout": 0.3})
    train_run(config, tmp_path / "run")
    image = sorted((tmp_path / "data/imagesTr").glob("*.nii.gz"))[0]
    options = {"uncertainty": True, "probabilities": True}
    own = config_with(tmp_path / "run", **{"evaluation.dropout_samples": 3})
    predict_run(tmp_path / "run", [str(image)], output=tmp_path / "out", config=own, **options)
    given = nib.load(image)
    maps = [nib.load(tmp_path / "out" / kind / image.name) for kind in KINDS]
    for found in maps:
        np.testing.assert_allclose(found.affine, given.affine)
        assert found.shape[:3] == given.shape[:3]
    entropy, information, p = (np.asarray(found.dataobj).squeeze() for found in maps)
    total = -(p * np.log(np.maximum(p, 1e-12))).sum(-1) / np.log(p.shape[-1])
    np.testing.assert_allclose(entropy, total, atol=1e-3)
    assert (information >= 0).all() and (information <= entropy + 1e-5).all()
    assert information.max() > 0
    # One network without dropout has nothing to disagree on, and writes no map of it.
    predict_run(tmp_path / "run", [str(image)], output=tmp_path / "one", uncertainty=True)
    assert (tmp_path / "one/entropy" / image.name).exists()
    assert not (tmp_path / "one/mutual_information").exists()


KINDS = ("entropy", "mutual_information", "probabilities")


@pytest.mark.slow
def test_what_cannot_be_done_is_refused(tmp_path):
    train_run(small_config("detection"), tmp_path / "boxes")
    write_phantoms(tmp_path / "data", layout="class_folders", count=2, size=32, parts=False)
    with pytest.raises(UserError, match="--uncertainty is not for boxes"):
        predict_run(
            tmp_path / "boxes", [str(tmp_path / "data")], output=tmp_path / "out", uncertainty=True
        )
    for task, told in (("detection", "does not work for detection"), ("segmentation", "dropout")):
        with pytest.raises(UserError, match=told):
            train_run(small_config(task, **{"evaluation.dropout_samples": 2}), tmp_path / task)
