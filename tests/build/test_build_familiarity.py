"""Images of another kind than those trained on are told, by what the validation part fixed."""

import csv
import io
import json
import weakref

import imageio.v3 as imageio
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from small_runs import small_config

from jaxmed.build.config import config_of_run, read_run, update
from jaxmed.build.evaluations import evaluate_run
from jaxmed.build.familiarity import FAMILIARITY_FILE, tell_unfamiliar
from jaxmed.build.predictions import predict_run
from jaxmed.build.preparation import Prepare
from jaxmed.build.runs import train_run
from jaxmed.build.trained import load_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.types import UserError


class Held:
    """What lives as long as the example it is in."""


def write_images(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        imageio.imwrite(folder / f"{i:03d}.png", image)
    return folder


def predict(run, folder, table="predictions.csv"):
    """Distances, and which images were called unfamiliar."""
    out = folder.parent / f"{folder.name}_out"
    predict_run(run, [str(folder)], output=out)
    with (out / table).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(folder.glob("*.png")))
    flags = np.array([row["unfamiliar"] == "yes" for row in rows])
    return np.array([float(row["distance"]) for row in rows]), flags


def ct_as_picture(volume):
    return ((np.clip(volume[..., 0], -75, 175) + 75) * 255 / 250).astype(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier of cells that saw a few hundred images, and where it is."""
    folder = tmp_path_factory.mktemp("familiarity")
    settings = {"data.count": 400, "training.steps": 60, "training.evaluate_every": 30}
    more = {"data.batch_size": 16, "model.width": 8, "evaluation.familiarity": 300}
    train_run(small_config("classification", **settings, **more), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_other_kinds_of_images_are_flagged(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    cells = Phantoms(size=32, seed=9)
    same = [cells[i]["image"][..., 0] for i in range(80)]
    body = Phantoms("body", size=32)
    others = {
        "ct": [ct_as_picture(body[i]["image"]) for i in range(40)],
        "noise": [rng.integers(0, 256, (32, 32), np.uint8) for _ in range(40)],
        "negatives": [255 - image for image in same[:40]],
    }
    known, flags = predict(run, write_images(tmp_path / "same", same))
    assert flags.mean() < 0.2
    for name, images in others.items():
        capsys.readouterr()
        away, flags = predict(run, write_images(tmp_path / name, images))
        truth = np.repeat([0, 1], [len(known), len(away)])
        assert roc_auc_score(truth, np.concatenate([known, away])) >= 0.95, name
        assert flags.mean() >= 0.8, name
        said = capsys.readouterr().out
        assert said.count("is unlike the images that the run was trained on") == flags.sum()


@pytest.mark.slow
@pytest.mark.parametrize("judged", [300, 0])
def test_images_are_let_go_as_they_are_predicted(run, tmp_path, monkeypatch, judged):
    alive, most = weakref.WeakSet(), []
    whole = Prepare.__call__

    def prepare(self, example):
        prepared = whole(self, example)
        alive.add(held := Held())
        most.append(len(alive))
        return {**prepared, "held": held}

    monkeypatch.setattr(Prepare, "__call__", prepare)
    config = config_of_run(read_run(run))
    update(config, {"evaluation.familiarity": judged}, where="")
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32), np.uint8)
    predict_run(
        run, [str(write_images(tmp_path / "in", images))], output=tmp_path / "out", config=config
    )
    assert len(most) == 200 and max(most) < 150


def test_a_share_that_may_be_chance_is_not_told():
    def told(low):
        share = {"value": 0.12, "low": low, "high": 0.3, "n": 25}
        return tell_unfamiliar({"metrics": {"unfamiliar": share}})

    assert told(0.0) == told(0.05) == [] != told(0.11)
    assert told(None)  # all are, in every resample


@pytest.mark.slow
def test_another_set_is_told_to_be_unfamiliar(run, tmp_path):
    summary = json.loads((run / "evaluation/val/summary.json").read_text())
    fixed = summary["familiarity"]
    assert fixed["training_cases"] == 280 and "metrics" not in fixed
    before = (run / FAMILIARITY_FILE).read_bytes()
    own = evaluate_run(run, part="test")["familiarity"]
    assert own["farthest"] == pytest.approx(fixed["farthest"])
    share = own["metrics"]["unfamiliar"]
    assert share["value"] <= 0.2 and share["n"] == 60
    rng = np.random.default_rng(0)
    for name in load_run(run).info.class_names:
        write_images(tmp_path / "noise" / name, rng.integers(0, 256, (10, 32, 32), np.uint8))
    config = config_of_run(read_run(run))
    update(config, {"data.layout": "class_folders", "data.path": str(tmp_path / "noise")}, where="")
    other = evaluate_run(run, part="all", config=config)
    assert other["familiarity"]["metrics"]["unfamiliar"]["value"] > 0.8
    assert any("of the cases are unlike the training images" in note for note in other["notes"])
    assert "unlike those of training" in (run / "report.html").read_text()
    assert (run / FAMILIARITY_FILE).read_bytes() == before


@pytest.mark.slow
def test_what_is_of_other_weights_or_broken_is_not_used(run, tmp_path, capsys):
    path = run / FAMILIARITY_FILE
    kept = path.read_bytes()
    images = write_images(tmp_path / "images", [np.zeros((32, 32), np.uint8)])
    try:
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, "parameters_sha256": "0"})
        predict_run(run, [str(images)], output=tmp_path / "a")
        assert "of other weights and not used" in capsys.readouterr().out
        assert "distance" not in (tmp_path / "a/predictions.csv").read_text()
        with np.load(io.BytesIO(kept)) as arrays:
            np.savez(path, **{name: arrays[name] for name in arrays if name != "windows"})
        predict_run(run, [str(images)], output=tmp_path / "earlier")
        assert "of an earlier version and not used" in capsys.readouterr().out
        path.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(UserError, match="make it anew with evaluate.py --split=val"):
            predict_run(run, [str(images)], output=tmp_path / "b")
    finally:
        path.write_bytes(kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, layout", [("segmentation", "pairs"), ("detection", "coco")], ids=lambda x: x
)
def test_masks_and_boxes_have_a_table_of_their_own(task, layout, tmp_path):
    write_phantoms(tmp_path / "data", layout=layout, count=140, size=40)
    settings = {"data.path": str(tmp_path / "data")}
    config = small_config(task, layout, **settings, **{"evaluation.familiarity": 100})
    assert train_run(config, tmp_path / "run")
    images = [
        case["image"][..., 0] for case in map(Phantoms(size=40, seed=3).__getitem__, range(6))
    ]
    away, _ = predict(
        tmp_path / "run", write_images(tmp_path / "images", images), "familiarity.csv"
    )
    assert np.isfinite(away).all()
