"""Doubtful labels of a set in which labels were flipped."""

import csv

import imageio.v3 as iio
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build.audit import FILES, audit_run
from jaxmed.build.config import config_of_run, read_run
from jaxmed.build.runs import train_run
from jaxmed.types import UserError


def disk(y, x):
    return y**2 + x**2 < 30


def cross(y, x):
    return np.minimum(abs(y), abs(x)) < 1.5


def stripes(y, x):
    return x % 6 < 3


FIGURES = {"disk": disk, "cross": cross, "stripes": stripes}


def draw_figure(path, rng):
    """One of three figures somewhere in a noisy picture, in the folder of its name."""
    y, x = np.mgrid[:24, :24] - rng.uniform(8, 16, size=(2, 1, 1))
    picture = 90 + 70 * FIGURES[path.parent.name](y, x) + rng.normal(0, 20, (24, 24))
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, np.clip(picture, 0, 255).astype(np.uint8))


@pytest.mark.slow
def test_flipped_labels_are_found_by_models_that_did_not_see_them(tmp_path, capsys):
    root = tmp_path / "data"
    names, rng = list(FIGURES), np.random.default_rng(0)
    files = [root / names[i % len(names)] / f"{i:03}.png" for i in range(240)]
    for file in files:
        draw_figure(file, rng)
    files.sort()
    wrong = set(rng.choice(len(files), size=len(files) // 20, replace=False).tolist())
    lines = []
    for i, file in enumerate(files):
        others = [name for name in names if name != file.parent.name]
        label = rng.choice(others) if i in wrong else file.parent.name
        lines.append(f"{file.relative_to(root).as_posix()},{label}")
    (root / "manifest.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    config = small_config(
        "classification",
        "class_folders",
        **{
            "data.path": str(root),
            "data.batch_size": 16,
            "data.fractions": (0.8, 0.2, 0.0),
            "model.width": 8,
            "training.steps": 60,
            "training.folds": 3,
            "training.evaluate_every": 20,
            "optimizer.learning_rate": 3e-3,
        },
    )
    assert train_run(config, tmp_path / "run")
    capsys.readouterr()
    ranked = audit_run(tmp_path / "run", output=tmp_path / "audit")
    flipped = {files[i].stem for i in wrong}
    first = [case["id"] for case in ranked[: len(wrong)]]
    precision = np.mean([name in flipped for name in first])
    assert precision >= 0.8
    assert not any(case["seen"] for case in ranked)
    assert all((tmp_path / "audit" / name).is_file() for name in FILES)
    with (tmp_path / "audit" / "cases.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [case["id"] for case in ranked]
    with (tmp_path / "audit" / "influence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["does"] for row in rows} == {"supports", "opposes"}
    assert "seen by the model" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_cases_of_every_task_are_ranked_and_what_was_seen_is_said(tmp_path, capsys, task):
    train_run(small_config(task), tmp_path / "run")
    ranked = audit_run(tmp_path / "run", output=tmp_path / "audit")
    assert {case["part"] for case in ranked} == {"train", "val"}
    assert all((case["seen"] == "yes") == (case["part"] == "train") for case in ranked)
    assert all(np.isfinite(case["loss"]) and case["gradient_norm"] > 0 for case in ranked)
    assert "were seen by the model that judges them" in capsys.readouterr().out
    config = config_of_run(read_run(tmp_path / "run"))
    config.data.count = 30
    with pytest.raises(UserError, match="not the data that"):
        audit_run(tmp_path / "run", output=tmp_path / "other", config=config)
