"""Doubtful labels of a set in which labels were flipped."""

import csv

import imageio.v3 as iio
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build.audit import FILES, audit_run
from jaxmed.build.config import config_of_run, read_run
from jaxmed.build.runs import train_run
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.types import UserError

SIDE = 32
"""Voxels of the picture of a cell."""


def cut_cells(count):
    """Pictures of phantom cells, one in the middle of each, and the kinds of the cells.

    Cut out of whole fields, as cells are for such sets; those at a border are left out.
    """
    fields = Phantoms("cells", task="detection", size=128, count=count)
    pictures, kinds = [], []
    for field in fields:
        places = field["boxes"].reshape(-1, 2, 2).mean(1).round().astype(int) - SIDE // 2
        for (y, x), kind in zip(places, field["box_label"], strict=True):
            picture = field["image"][max(y, 0) : y + SIDE, max(x, 0) : x + SIDE, 0]
            if picture.shape == (SIDE, SIDE) and min(y, x) >= 0:
                pictures.append(picture)
                kinds.append(fields.info.class_names[kind])
    return pictures[:count], kinds[:count]


@pytest.mark.slow
def test_flipped_labels_are_found_by_models_that_did_not_see_them(tmp_path, capsys):
    root, rng = tmp_path / "data", np.random.default_rng(0)
    pictures, kinds = cut_cells(900)
    names, files = sorted(set(kinds)), []
    for i, (picture, kind) in enumerate(zip(pictures, kinds, strict=True)):
        files.append(root / kind / f"{i:03}.png")
        files[i].parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(files[i], picture)
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
            "data.batch_size": 32,
            "data.fractions": (0.8, 0.2, 0.0),
            "model.width": 16,
            "training.steps": 250,
            "training.folds": 3,
            "training.evaluate_every": 125,
            "augmentation.rot90": True,
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
