"""Whole runs on phantoms: trained, killed, resumed, evaluated, predicted; and the workdir."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import jax
import nibabel as nib
import numpy as np
import pytest
from small_runs import NETWORK, SMALL, small_config

from jaxmed.build.checks import check_numbers
from jaxmed.build.config import base_config, config_of_run, flatten, read_run, update
from jaxmed.build.evaluations import evaluate_run, find_part
from jaxmed.build.predictions import predict_run
from jaxmed.build.runs import train_run
from jaxmed.build.trained import check_image, load_run
from jaxmed.build.workdir import read_split_ids
from jaxmed.data.images import read_image
from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.training.checkpoints import restore_variables
from jaxmed.types import UserError

ROOT = Path(__file__).resolve().parents[2]


def digest(workdir, step=None):
    found, _ = restore_variables(workdir / "checkpoints", step=step)
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(found):
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small finished run of each task, by name."""
    runs = {}
    for name, task, settings in (
        ("classification", "classification", {}),
        ("detection", "detection", {}),
        ("segmentation", "segmentation", {}),
        ("instances", "segmentation", {"data.masks": "instance"}),
        ("volumes", "segmentation", {"data.kind": "body", "data.ndim": 3}),
    ):
        runs[name] = tmp_path_factory.mktemp("runs") / name
        train_run(small_config(task, **settings, **{"evaluation.explain": True}), runs[name])
    return runs


SCORES = {
    "classification": {
        *("accuracy", "balanced_accuracy", "recall", "precision", "f1", "auroc"),
        *("average_precision", "ece", "auroc/atypical"),
    },
    "detection": {"ap50", "ap", "froc", "ap50/round"},
    "segmentation": {"dice", "iou", "hd95", "nsd", "dice/elongated"},
    "instances": {"dice", "instance_ap50", "panoptic_quality"},
    "volumes": {"dice", "dice/lesion"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_the_workdir_holds_what_people_rely_on(trained, name):
    workdir = trained[name]
    run = json.loads((workdir / "config.json").read_text())
    assert run["config"]["training"]["steps"] == 4
    assert run["seed"] == 0
    assert {"jax", "jaxmed"} <= run["versions"].keys()
    assert len(run["data"]["sha256"]) == 64
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if e["split"] == "train"] == [1, 2, 3, 4]
    assert [e["step"] for e in lines if e["split"] == "val"] == [2, 4]
    assert all({"loss", "grad_norm", "seconds", "epoch"} <= e.keys() for e in lines if "loss" in e)
    steps = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert 4 in steps
    assert iio.imread(workdir / "batch.png").ndim == 3
    summary = json.loads((workdir / "evaluation/val/summary.json").read_text())
    assert summary["step"] in steps
    assert len(summary["parameters_sha256"]) == 64
    assert SCORES[name] <= summary["metrics"].keys()
    for entry in summary["metrics"].values():
        assert {"value", "low", "high", "n"} <= entry.keys()
        if entry["value"] is not None and not entry.get("no_spread"):
            assert entry["low"] - 1e-9 <= entry["high"]
    with (workdir / "evaluation/val/cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    split = json.loads((workdir / "split.json").read_text())
    assert [row["id"] for row in rows] == split["val"]
    assert not set(split["train"]) & set(split["val"])
    page = (workdir / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "Cases of validation" in page
    assert page.count("<script") == 1
    assert "http" not in page.replace("http-equiv", "")
    worst = page[page.index("Worst") : page.index("Typical")]
    cases = worst.count('<article class="card">')
    assert worst.count("blue against it") + worst.count("none, ") == cases > 0
    assert "Worst" in (workdir / "report.md").read_text()


@pytest.mark.slow
def test_evaluating_again_gives_the_same_and_the_test_part_is_apart(trained):
    workdir = trained["classification"]
    before = json.loads((workdir / "evaluation/val/summary.json").read_text())
    assert not (workdir / "evaluation/test").exists()
    again = evaluate_run(workdir, part="val")
    assert again["metrics"] == before["metrics"]
    assert again["parameters_sha256"] == before["parameters_sha256"]
    test = evaluate_run(workdir, part="test")
    assert (workdir / "evaluation/test/summary.json").exists()
    assert test["also_in_training"] == 0


@pytest.mark.slow
def test_another_data_set_is_evaluated_whole(trained, tmp_path):
    write_phantoms(tmp_path / "other", layout="pairs", count=6, size=40, seed=5, parts=False)
    workdir = trained["segmentation"]
    run = json.loads((workdir / "config.json").read_text())
    config = base_config("segmentation")
    update(
        config,
        {
            **flatten(run["config"]),
            "data.layout": "pairs",
            "data.path": str(tmp_path / "other"),
            "data.class_names": tuple(run["data"]["info"]["class_names"]),
        },
        where="test",
    )
    summary = evaluate_run(workdir, part="all", config=config)
    assert summary["cases"] == 6
    with pytest.raises(UserError, match="--split=all"):
        evaluate_run(workdir, part="test", config=config)


@pytest.mark.slow
def test_pictures_are_classified_and_tabled(trained, tmp_path, capsys):
    write_phantoms(tmp_path / "new", layout="pairs", count=3, size=48, parts=False)
    images = tmp_path / "new/images"
    first = next(images.iterdir())
    iio.imwrite(images / "colour.jpg", np.repeat(iio.imread(first)[..., None], 3, -1))
    iio.imwrite(images / "flat.png", np.full((48, 48), 7, np.uint8))
    iio.imwrite(images / "mask.png", np.eye(48, dtype=np.uint8))
    gray = iio.imread(first)
    iio.imwrite(images / "opacity.png", np.stack([gray, gray, gray, gray], -1))
    predict_run(trained["classification"], [str(images)], output=tmp_path / "out", overlay=True)
    said = capsys.readouterr().out
    assert "flat.png has only one value" in said
    assert "mask.png has only 2 different values: is it a mask?" in said
    assert "note: the opacity (alpha) channel varies; it was left out: 1 file, opacity.png" in said
    assert said.count("note: ") == 3
    trained_on = json.loads((tmp_path / "out/predicted_by.json").read_text())["trained_on"]
    assert trained_on == load_run(trained["classification"]).info.name
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(r["file"] for r in rows) == sorted(p.name for p in images.iterdir())
    for row in rows:
        own = ["file", "prediction", "round", "elongated", "atypical"]
        assert list(row) == [*own, "decision", "calibrated", "set"]
        probabilities = [float(row[name]) for name in ("round", "elongated", "atypical")]
        np.testing.assert_allclose(sum(probabilities), 1, atol=1e-5)
        assert float(row[row["prediction"]]) == max(probabilities)
    assert len(list((tmp_path / "out/overlays").iterdir())) == 7


@pytest.mark.slow
def test_detections_are_coco_results_in_the_file_s_own_pixels(trained, tmp_path):
    write_phantoms(tmp_path / "new", layout="pairs", count=2, size=(40, 60), parts=False)
    predict_run(
        trained["detection"], [str(tmp_path / "new/images")], output=tmp_path / "out", overlay=True
    )
    boxes = json.loads((tmp_path / "out/detections.json").read_text())
    assert boxes
    for box in boxes:
        x, y, width, height = box["bbox"]
        assert 0 <= x <= x + width <= 60.001
        assert 0 <= y <= y + height <= 40.001
        assert box["file_name"].endswith(".png")
        assert 0 < box["score"] <= 1
        assert box["category_id"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "instances"])
def test_masks_of_pictures_have_their_size(trained, tmp_path, name):
    write_phantoms(tmp_path / "new", layout="pairs", count=2, size=(40, 61), parts=False)
    images = tmp_path / "new/images"
    predict_run(trained[name], [str(images)], output=tmp_path / "out", overlay=True)
    for image in images.iterdir():
        written = iio.imread(tmp_path / "out" / image.name)
        assert written.shape == (40, 61)
        alone = load_run(trained[name]).predict_image(read_image(image).array)
        np.testing.assert_array_equal(alone, written)


@pytest.mark.slow
def test_a_mask_of_an_oblique_volume_has_its_shape_and_affine(trained, tmp_path):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, 2.0, 4.0])
    affine[:3, 3] = [10, -20, 30]
    volume = nib.Nifti1Image(rng.normal(0, 100, (37, 21, 18)).astype(np.float32), affine)
    nib.save(volume, tmp_path / "scan.nii.gz")
    predict_run(
        trained["volumes"], [str(tmp_path / "scan.nii.gz")], output=tmp_path / "out", overlay=True
    )
    predict_run(
        trained["volumes"],
        [str(tmp_path / "scan.nii.gz")],
        output=tmp_path / "out",
        probabilities=True,
    )
    mask = nib.load(tmp_path / "out/scan.nii.gz")
    classes = nib.load(tmp_path / "out/probabilities/scan.nii.gz")
    np.testing.assert_array_equal(classes.affine, mask.affine)
    np.testing.assert_array_equal(np.argmax(classes.dataobj, -1), np.asarray(mask.dataobj))
    assert mask.shape == (37, 21, 18)
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    assert np.asarray(mask.dataobj).max() <= 2


@pytest.mark.slow
def test_a_volume_is_refused_by_a_network_of_pictures(trained, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match="--probabilities is for segmentations"):
        inputs = [str(tmp_path / "a.nii.gz")]
        predict_run(trained["detection"], inputs, output=tmp_path / "out", probabilities=True)
    with pytest.raises(UserError, match="3 dimensions"):
        predict_run(trained["segmentation"], [str(tmp_path / "a.nii.gz")], output=tmp_path / "out")


@pytest.mark.slow
def test_a_broken_file_keeps_no_other_from_being_predicted(trained, tmp_path, capsys):
    write_phantoms(tmp_path / "new", layout="pairs", count=3, size=48, parts=False)
    files = sorted((tmp_path / "new/images").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    iio.imwrite(files[1], iio.imread(files[1]).astype(np.uint16) * 200)
    with pytest.raises(UserError, match="2 of 3 files could not be predicted") as caught:
        predict_run(
            trained["classification"], [str(tmp_path / "new/images")], output=tmp_path / "out"
        )
    assert files[0].name in str(caught.value)
    # 16 bits, where training had 8 and scaled them by its own mean.
    assert files[1].name in capsys.readouterr().err
    with (tmp_path / "out/predictions.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == [files[2].name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("detection", {"evaluation.flips": True}, "evaluation.flips"),
        ("segmentation", {"evaluation.flips": True, "augmentation.flip": 0.0}, "mirrors none"),
        ("segmentation", {"evaluation.overlap": 1.5}, "overlap"),
        ("segmentation", {"data.patch": (30, 30)}, "multiples"),
        ("classification", {"model.width": 9}, "model.width is 9; .* was trained with"),
    ],
)
def test_a_trained_network_refuses_what_it_cannot_do(trained, name, settings, expected):
    config = config_of_run(read_run(trained[name]))
    update(config, settings, where="test")
    with pytest.raises(UserError, match=expected):
        load_run(trained[name], config)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_same_config(trained):
    workdir = trained["classification"]
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.001 -> 0.01"):
        train_run(small_config("classification", **{"optimizer.learning_rate": 0.01}), workdir)
    with pytest.raises(UserError, match="other data"):
        train_run(small_config("classification", **{"data.count": 41}), workdir)
    with pytest.raises(UserError, match="schedule cosine .*--config.model.init="):
        train_run(small_config("classification", **{"training.steps": 40}), workdir)
    with pytest.raises(UserError, match="holds a run of classification on phantoms, not of seg"):
        train_run(small_config("segmentation"), workdir)
    before = digest(workdir)
    train_run(small_config("classification", **{"training.log_every": 3}), workdir)
    assert digest(workdir) == before


@pytest.mark.slow
def test_a_longer_run_under_a_constant_schedule_goes_on(tmp_path):
    constant = {"optimizer.schedule": "constant", "optimizer.warmup": 0.0}
    train_run(small_config("classification", **constant), tmp_path / "a")
    longer = small_config("classification", **constant, **{"training.steps": 6})
    train_run(longer, tmp_path / "a")
    train_run(longer, tmp_path / "b")
    assert digest(tmp_path / "a", 6) == digest(tmp_path / "b", 6)


@pytest.mark.slow
def test_more_epochs_go_on_under_a_constant_schedule_only(tmp_path):
    def config(schedule, epochs):
        settings = {"optimizer.schedule": schedule, "training.epochs": epochs, "training.steps": 0}
        return small_config("classification", **settings)

    def last(run):
        return max(int(p.name) for p in (tmp_path / run / "checkpoints").glob("[0-9]*"))

    for schedule in ("constant", "cosine"):
        train_run(config(schedule, 0.5), tmp_path / schedule)
    first = last("constant")
    train_run(config("constant", 1.5), tmp_path / "constant")
    assert last("constant") > first
    with pytest.raises(UserError, match=r"training.steps: .*--config.model.init=") as error:
        train_run(config("cosine", 1.5), tmp_path / "cosine")
    assert "warmup" not in str(error.value)


@pytest.mark.slow
def test_coloured_images_are_not_made_gray_unasked(trained):
    run, volumes = load_run(trained["segmentation"]), load_run(trained["volumes"])
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    gray = np.repeat(colours[..., :1], 3, -1)
    with pytest.raises(UserError, match="a.png: is coloured"):
        check_image(run, colours, "a.png")
    check_image(run, gray, "gray.png")
    run.run["planned"].pop("data.channels")
    check_image(run, colours, "a.png")
    for image in (colours, gray):  # of volumes they are kinds of scans
        with pytest.raises(UserError, match="a.nii: has 3 channels"):
            check_image(volumes, image[None], "a.nii")


@pytest.mark.slow
def test_a_run_goes_on_without_the_one_it_started_from_and_takes_no_colours(tmp_path, capsys):
    write_phantoms(tmp_path / "set", layout="class_folders", count=24, size=32)
    path = {"data.path": str(tmp_path / "set"), "data.size": (32, 32)}
    train_run(small_config("classification", "class_folders", **path), tmp_path / "first")
    config = small_config(
        "classification", "class_folders", **path, **{"model.init": str(tmp_path / "first")}
    )
    train_run(config, tmp_path / "second")
    assert "have ids that" not in capsys.readouterr().out  # the same split: none was trained on
    (tmp_path / "first").rename(tmp_path / "moved")
    train_run(config, tmp_path / "second")
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="first: no run with a checkpoint"):
        train_run(config, tmp_path / "third")
    for file in (tmp_path / "set").rglob("*.png"):
        gray = iio.imread(file)
        iio.imwrite(file, np.stack([gray, 255 - gray, gray], -1))
    other = config_of_run(read_run(tmp_path / "second"))
    with pytest.raises(UserError, match="24 problems\n.* is coloured"):
        evaluate_run(tmp_path / "second", part="all", config=other)


@pytest.mark.slow
def test_weights_that_saw_the_validation_cases_are_told(tmp_path, capsys):
    write_phantoms(tmp_path / "set", layout="class_folders", count=24, size=32, parts=False)
    path = {"data.path": str(tmp_path / "set"), "data.size": (32, 32)}
    train_run(small_config("classification", "class_folders", **path), tmp_path / "first")
    init = {"model.init": str(tmp_path / "first"), "seed": 5}  # another split
    train_run(small_config("classification", "class_folders", **path, **init), tmp_path / "second")
    assert "was trained on, whose weights are the start" in capsys.readouterr().out
    notes = read_run(tmp_path / "second")["data"]["notes"]
    assert any("have ids that" in note for note in notes)


def test_names_of_classes_may_hold_a_comma():
    config = base_config("classification", "class_folders")
    config.data.class_names = ("cyst, simple", "Crohn's")
    check_numbers(config)
    config.data.class_names = ("a,b",)
    with pytest.raises(UserError, match="one name"):
        check_numbers(config)


def test_cases_that_are_gone_are_named(tmp_path):
    write_phantoms(tmp_path / "set", layout="class_folders", count=4, size=32, parts=False)
    source = ClassFolders(tmp_path / "set")
    split = {"train": list(source.ids[:2]), "val": [source.ids[2]], "test": ["gone"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(
        UserError, match="test: 1 cases of the run are not in the data any more .gone"
    ):
        find_part(tmp_path, source, "test", is_own=False)


@pytest.mark.slow
def test_weights_of_another_run_are_the_start(trained, tmp_path, capsys):
    config = small_config(
        "classification",
        **{"model.init": str(trained["classification"]), "data.kind": "body", "data.channels": 1},
    )
    train_run(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert "fresh: " in told
    assert "head/kernel" in told.split("fresh: ")[1].splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding",
    [
        {"sharding.devices": 2},
        {"sharding.devices": 4},
        {"sharding.devices": 4, "sharding.fsdp": True},
        {"sharding.devices": 4, "sharding.mode": "pmap"},
    ],
)
def test_many_devices_agree_with_one(trained, tmp_path, sharding):
    train_run(small_config("segmentation", **sharding), tmp_path / "run")
    one, _ = restore_variables(trained["segmentation"] / "checkpoints", step=4)
    many, _ = restore_variables(tmp_path / "run/checkpoints", step=4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one["params"], many["params"]
    )


def start(workdir):
    """A training in a process of its own, its output in a file beside the workdir."""
    flags = {**SMALL, **NETWORK["classification"], "training.steps": 12}
    flags["training.checkpoint_every"] = 3
    flags = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in flags.items()}
    with workdir.with_suffix(".txt").open("a") as output:
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "experiments/train.py"),
                "--config=configs/classify_phantoms.py",
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in flags.items()),
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def output(workdir):
    return workdir.with_suffix(".txt").read_text()


def wait_for(path, process, workdir):
    for _ in range(2400):
        if path.exists():
            return
        assert process.poll() is None, output(workdir)
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, number):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(300) == 0, output(whole)
    process = start(killed)
    wait_for(killed / "checkpoints/6", process, killed)
    process.send_signal(number)
    # As of any interrupted command: 130 tells a script around it that the run is not finished.
    assert process.wait(120) == (130 if number == signal.SIGTERM else -number)
    assert not (killed / "checkpoints/12").exists(), "it was killed too late to tell"
    assert start(killed).wait(300) == 0, output(killed)
    assert "going on from step" in output(killed)
    assert ("stopped and saved at step" in output(killed)) == (number == signal.SIGTERM)
    assert digest(killed, 12) == digest(whole, 12)

    def log(workdir):
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        drop = ("seconds", "images_per_second", "data_wait", "mfu")
        return [{k: v for k, v in line.items() if k not in drop} for line in lines]

    assert log(killed) == log(whole)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "does not list cases by part"),
        ('{"train": ["a"], "test": ["b"]}', "no cases of val"),
        ('{"train": ["a"], "val": ["a"]}', "a case is in two parts"),
        ('{"train": "ab", "val": ["c"]}', "does not list cases by part"),
    ],
)
def test_a_split_that_was_changed_by_hand_is_told(tmp_path, content, said):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(UserError, match=rf"split\.json: cannot be read .*{said}"):
        read_split_ids(tmp_path)


def test_a_description_of_a_run_that_is_gone_or_empty_is_told(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        read_run(tmp_path)
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.json: is gone, and checkpoints are there"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {}, "data": {}}')
    with pytest.raises(UserError, match=r"config\.json: cannot be read .*no task"):
        read_run(tmp_path)
