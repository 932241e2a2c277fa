"""Mistakes of the user: exit code 2 and one line that says which, what was found, what to do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from jaxmed.data.sources.phantom_files import write_phantoms

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )


def complaint(script, *arguments):
    """What a failed run says is wrong."""
    done = run(script, *arguments)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    _, error, told = ("\n" + done.stderr).partition("\nerror: ")
    assert error and "\nerror: " not in told, done.stderr
    return f"error: {told}".rstrip()


def train(config, tmp_path, *arguments):
    workdir = tmp_path / "run"
    return complaint("train.py", f"--config=configs/{config}", f"--workdir={workdir}", *arguments)


def test_a_wrong_path(tmp_path):
    line = train("classify_folders.py", tmp_path, f"--config.data.path={tmp_path}/nowhere")
    assert "nowhere" in line


def test_no_path(tmp_path):
    assert "data.path" in train("classify_folders.py", tmp_path)


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    line = train("segment_pairs.py", tmp_path, f"--config.data.path={tmp_path}/empty")
    assert "empty" in line
    assert "images" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.training.step=3", "did you mean --config.training.steps?"),
        ("--config.optimzer.name=sgd", "did you mean --config.optimizer.name?"),
        ("--training.steps=3", "did you mean --config.training.steps?"),
        ("--config.training.steps=many", "is 'many'; expected a whole number"),
        ("--config.optimizer.learning_rate=x", "is 'x'; expected a number"),
        ("--config.data.download=maybe", "is 'maybe'; expected true or false"),
        ("--config.data.size=large", "data.size is ('large',)"),
        ("--config.data.fractions=0.8,0.2", "expected 3 numbers"),
        ("--config.training.steps=-5", "no negative number"),
        ("--config.data.normalization=clip", "dataset, zscore"),
        ("--config.model.name=unet", "resnet18"),
        ("--workdri=x", "workdir"),
        ("--config.optimizer.name=adamm", "sgd, adam, adamw"),
        ("--config.model.name=resnet19", "resnet18"),
        ("--config.sharding.mode=pjit", "jit, pmap"),
        ("--config.data.size=8,8,8", "as in --config.data.size=64,64"),
        ("--confg.training.steps=3", "did you mean --config.training.steps?"),
        ("--config.data.class_names=a,b", "--config.data.class_names=\"('a', 'b')\""),
        ("--config.model.init=nowhere", "model.init=nowhere: no run"),
    ],
)
def test_a_mistyped_override(tmp_path, override, expected):
    line = train("classify_phantoms.py", tmp_path, "--config.data.count=20", override)
    assert expected in line


def test_a_config_that_is_not_there(tmp_path):
    assert "configs/nothing.py" in train("nothing.py", tmp_path)


def test_a_preset_that_is_not_there(tmp_path):
    line = train("segment_msd.py:hipocampus", tmp_path)
    assert ":hippocampus" in line


@pytest.mark.parametrize("dry_run", [(), ("--dry_run",)])
def test_a_workdir_beneath_a_file(tmp_path, dry_run):
    (tmp_path / "file").write_text("")
    line = complaint(
        "train.py",
        "--config=configs/classify_phantoms.py",
        f"--workdir={tmp_path}/file/run",
        *dry_run,
    )
    assert f"{tmp_path}/file/run" in line


def test_a_truncated_picture(tmp_path):
    write_phantoms(tmp_path / "set", layout="class_folders", count=12, size=32)
    path = next((tmp_path / "set").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:200])
    line = train("classify_folders.py", tmp_path, f"--config.data.path={tmp_path}/set")
    assert path.name in line


def test_all_broken_files_are_told_at_once_or_left_out(tmp_path):
    write_phantoms(tmp_path / "set", layout="pairs", count=40, size=32)
    masks = sorted((tmp_path / "set").rglob("masks/*.png"))
    iio.imwrite(masks[0], np.full((32, 32), 200, np.uint8))
    image = masks[30].parent.with_name("images") / masks[30].name
    image.write_bytes(image.read_bytes()[:200])
    iio.imwrite(masks[7], np.zeros((20, 32), np.uint8))
    path = f"--config.data.path={tmp_path}/set"
    line = train("segment_pairs.py", tmp_path, path)
    assert "3 problems" in line
    assert masks[7].name in line
    assert masks[0].name in line
    assert image.name in line
    assert "--config.data.invalid=drop" in line
    # A manifest still names them; and a pair that is left out already for its shapes.
    names = [mask.stem for mask in masks]
    parts = ["val" if i % 5 == 4 else "train" for i in range(len(names))]
    lines = [f"{name},{part}" for name, part in zip(names, parts, strict=True)]
    (tmp_path / "set/split.csv").write_text("\n".join(["id,split", *lines]))
    done = run(
        "train.py", "--config=configs/segment_pairs.py", path, "--config.data.invalid=drop",
        "--config.training.steps=1", "--config.data.batch_size=2", "--config.model.features=4,8",
        f"--workdir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    notes = json.loads((tmp_path / "run/config.json").read_text())["data"]["notes"]
    told = " ".join(notes)
    assert all(name in told for name in (masks[0].name, image.name, masks[7].name))
    assert len(set(notes)) == len(notes)
    split = json.loads((tmp_path / "run/split.json").read_text())
    left = {name for part in split.values() for name in part}
    assert left == set(names) - {names[0], names[7], names[30]}


def test_a_mask_of_another_shape(tmp_path):
    write_phantoms(tmp_path / "set", layout="pairs", count=12, size=32)
    path = next((tmp_path / "set").rglob("masks/*.png"))
    iio.imwrite(path, iio.imread(path)[:-4])
    line = train("segment_pairs.py", tmp_path, f"--config.data.path={tmp_path}/set")
    assert path.stem in line


def test_labels_outside_the_class_list(tmp_path):
    write_phantoms(tmp_path / "set", layout="msd", kind="body", count=8, size=32)
    file = tmp_path / "set" / "dataset.json"
    dataset = json.loads(file.read_text())
    dataset["labels"] = {"0": "background", "1": "organ"}
    file.write_text(json.dumps(dataset))
    line = train("segment_msd.py", tmp_path, f"--config.data.path={tmp_path}/set")
    assert "organ" in line
    assert "2" in line


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (5, 5, 500, 9)])
def test_a_box_of_no_area_or_outside_its_image(tmp_path, box):
    write_phantoms(tmp_path / "set", layout="coco", count=12, size=32)
    for file in (tmp_path / "set").rglob("*.json"):
        dataset = json.loads(file.read_text())
        x, y, right, low = box
        dataset["annotations"][0]["bbox"] = [x, y, right - x, low - y]
        file.write_text(json.dumps(dataset))
    path = f"--config.data.path={tmp_path}/set"
    line = train("detect_coco.py", tmp_path, path)
    assert "data.invalid=drop" in line
    done = run(
        "train.py", "--config=configs/detect_coco.py", path, "--config.data.invalid=drop",
        "--config.training.steps=1", "--dry_run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Left out" in done.stdout


def test_data_of_another_task(tmp_path):
    write_phantoms(tmp_path / "set", layout="pairs", count=12, size=32)
    line = train(
        "classify_folders.py",
        tmp_path,
        f"--config.data.path={tmp_path}/set",
        "--config.data.layout=pairs",
    )
    assert "segment_*" in line


def test_a_workdir_that_is_no_run(tmp_path):
    assert "config.json" in complaint("evaluate.py", f"--workdir={tmp_path}")
    assert "config.json" in complaint(
        "predict.py", f"--workdir={tmp_path}", f"--output={tmp_path}/out", ROOT / "README.md"
    )


def test_dry_run_tells_shapes_parameters_and_memory_and_writes_nothing(tmp_path):
    done = run(
        "train.py",
        "--config=configs/segment_phantoms.py",
        "--config.data.count=20",
        "--config.model.width=64",
        f"--workdir={tmp_path}/run",
        "--dry_run",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for told in (
        "optimizer.learning_rate = ",
        "encoder0",
        "a step needs some",
        "image",
        "voxels a class in the training part:\n  background: ",
        "minutes on two CPU cores",
    ):
        assert told in done.stdout
    assert "note: model.width is set" in done.stdout
    assert "data.size =" not in done.stdout  # which segmentation has no use for
    assert not (tmp_path / "run").exists()


def test_leaving_out_must_leave_every_class(tmp_path):
    write_phantoms(tmp_path / "set", layout="class_folders", count=24, size=32, parts=False)
    folder = next(p for p in sorted((tmp_path / "set").rglob("*")) if any(p.glob("*.png")))
    for path in (tmp_path / "set").rglob(f"{folder.name}/*.png"):
        path.write_bytes(path.read_bytes()[:200])
    path = f"--config.data.path={tmp_path}/set"
    line = train("classify_folders.py", tmp_path, path, "--config.data.invalid=drop")
    assert folder.name in line


def test_overrides_without_a_config_or_a_run(tmp_path):
    line = complaint("train.py", f"--workdir={tmp_path}/run", "--config.seed=3")
    assert "--config=configs/NAME.py" in line
    line = complaint("evaluate.py", f"--workdir={tmp_path}", "--config.seed=3")
    assert "config.json" in line


def test_help_lists_the_flags():
    done = run("train.py", "--help")
    assert "--workdir" in done.stdout
    assert "--config" in done.stdout


def test_pictures_are_not_written_over_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        iio.imwrite(tmp_path / folder / "x.png", np.zeros((8, 8), np.uint8))
    line = complaint(
        "predict.py",
        f"--workdir={tmp_path}",
        f"--output={tmp_path}/out",
        tmp_path / "a/x.png",
        tmp_path / "b/x.png",
    )
    assert "same name" in line


def test_work_goes_on_where_nobody_reads_what_it_says(tmp_path):
    command = [sys.executable, "-u", str(ROOT / "experiments/plan.py"), f"--output={tmp_path}"]
    command += ["--config=configs/classify_phantoms.py", "--config.data.count=30"]
    command += ["--config.data.extent=32,", "--config.training.steps=9"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "30 cases" in process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 0, errors
    assert "Broken" not in errors and (tmp_path / "plan.json").is_file()


def test_words_that_name_nothing_are_refused_before_data_are_read(tmp_path):
    for key in ("optimizer.name", "optimizer.schedule", "model.norm", "model.name"):
        told = complaint(
            "train.py",
            "--config=configs/classify_folders.py",
            f"--workdir={tmp_path}/run",
            f"--config.data.path={tmp_path}/nowhere",
            f"--config.{key}=nothing",
        )
        assert f"{key} is 'nothing'" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_once_what_is_done_is_written(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib\n"
        "from jaxmed.build import cli\n"
        "def main(positional):\n"
        "    print('begun')\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        print('went on')\n"
        "    finally:\n"
        "        pathlib.Path('table.csv').write_text('rows')\n"
        "cli.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (130, "begun\n")
    assert done.stderr.startswith("stopped before its end")
    assert (tmp_path / "table.csv").read_text() == "rows"
