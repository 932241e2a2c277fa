"""What the validation part fixes is kept, applied to all else, and never fixed anew there."""

import csv
import json

import imageio.v3 as imageio
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build.config import config_of_run, read_run
from jaxmed.build.decisions import DECISIONS_FILE, read_decisions
from jaxmed.build.evaluations import evaluate_run
from jaxmed.build.predictions import predict_run
from jaxmed.build.runs import train_run
from jaxmed.build.trained import load_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.types import UserError


def train(tmp_path, task, layout, **settings):
    write_phantoms(tmp_path / "data", layout=layout, count=60, size=24)
    path = {"data.path": str(tmp_path / "data"), "data.fractions": (0.4, 0.4, 0.2)}
    config = small_config(task, layout, **{**path, **settings})
    assert train_run(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_classes_are_decided_as_the_validation_part_says(tmp_path, capsys):
    run = train(tmp_path, "classification", "class_folders")
    kept = json.loads((run / DECISIONS_FILE).read_text())
    summary = json.loads((run / "evaluation/val/summary.json").read_text())
    told = summary["decisions"]
    assert kept["parameters_sha256"] == summary["parameters_sha256"]
    assert told["judged"] == "by cross-fitting" and told["temperature"] == kept["temperature"]
    assert {"accuracy", "ece", "brier", "set_coverage", "set_size"} <= told["metrics"].keys()
    # The test part changes nothing, and is judged by what was fixed.
    tested = evaluate_run(run, part="test")["decisions"]
    assert json.loads((run / DECISIONS_FILE).read_text()) == kept
    assert (tested["judged"], tested["set_threshold"]) == ("here", kept["set_threshold"])
    capsys.readouterr()
    predict_run(run, [str(tmp_path / "data")], output=tmp_path / "out")
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    fixed, cases = read_decisions(run, load_run(run))
    names = load_run(run).info.class_names
    assert cases == kept["cases"] == summary["cases"]
    for row in rows:
        said = np.array([[float(row[name]) for name in names]])
        decided = fixed.decide(said)
        assert row["decision"] == names[decided.predicted[0]] == row["prediction"]
        own = decided.probabilities[0, decided.predicted[0]]
        np.testing.assert_allclose(float(row["calibrated"]), own, atol=1e-4)
        assert set(row["set"].split("+")) - {""} <= set(names)
    # What mirrored views fix serves mirrored views.
    mirrored = config_of_run(read_run(run))
    mirrored.evaluation.flips = True
    evaluate_run(run, config=mirrored)
    capsys.readouterr()
    assert read_decisions(run, load_run(run)) == (None, 0)
    assert "with other settings (evaluation.flips: False -> True)" in capsys.readouterr().out
    fixed, _ = read_decisions(run, load_run(run, mirrored))
    assert fixed is not None and fixed.temperature != kept["temperature"]


@pytest.mark.slow
def test_several_labels_are_each_decided_as_the_validation_part_says(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("val", 60), ("test", 30)):
        labels = rng.random((count, 3)) < 0.5
        images = rng.normal(60, 20, (count, 24, 24))
        for c in range(3):
            images[:, 8 * c : 8 * c + 8] += 80 * labels[:, c, None, None]
        arrays[f"{part}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{part}_labels"] = labels.astype(np.uint8)
    np.savez(tmp_path / "shapes.npz", **arrays)
    path = {"data.path": str(tmp_path / "shapes.npz"), "training.steps": 20}
    rule = {"evaluation.operating_point": "youden"}
    assert train_run(small_config("classification", "medmnist", **path, **rule), tmp_path / "run")
    run = tmp_path / "run"
    kept = json.loads((run / DECISIONS_FILE).read_text())
    assert len(kept["slopes"]) == len(kept["intercepts"]) == len(kept["thresholds"]) == 3
    told = json.loads((run / "evaluation/val/summary.json").read_text())["decisions"]
    assert told["judged"] == "by cross-fitting"
    assert {"sensitivity", "specificity", "ece", "brier"} <= told["metrics"].keys()
    assert evaluate_run(run, part="test")["decisions"]["slopes"] == kept["slopes"]
    imageio.imwrite(tmp_path / "one.png", arrays["test_images"][0])
    predict_run(run, [str(tmp_path / "one.png")], output=tmp_path / "out")
    with (tmp_path / "out/predictions.csv").open() as file:
        [row] = csv.DictReader(file)
    names = load_run(run).info.class_names
    fixed, _ = read_decisions(run, load_run(run))
    decided = fixed.decide(np.array([[float(row[name]) for name in names]]))
    own = [float(row[f"calibrated/{name}"]) for name in names]
    np.testing.assert_allclose(own, decided.probabilities[0], atol=1e-4)
    chosen = [name for name, on in zip(names, decided.predicted[0], strict=True) if on]
    assert row["decision"] == "+".join(chosen)


@pytest.mark.slow
def test_decisions_of_other_weights_or_broken_ones_are_not_used(tmp_path, capsys):
    run = train(tmp_path, "classification", "class_folders")
    path = run / DECISIONS_FILE
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "parameters_sha256": "0"}))
    capsys.readouterr()
    assert evaluate_run(run, part="test")["decisions"] == {}
    assert "of other weights and not used" in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(UserError, match="make it anew with evaluate.py --split=val"):
        evaluate_run(run, part="test")
    path.unlink()
    image = next((tmp_path / "data").rglob("*.png"))
    predict_run(run, [str(image)], output=tmp_path / "out")
    assert "calibrated" not in (tmp_path / "out/predictions.csv").read_text()
    evaluate_run(run)
    assert json.loads(path.read_text()) == kept


@pytest.mark.slow
def test_voxels_are_calibrated_as_the_validation_part_says(tmp_path):
    run = train(tmp_path, "segmentation", "pairs", **{"training.steps": 20})
    kept = json.loads((run / DECISIONS_FILE).read_text())
    summary = json.loads((run / "evaluation/val/summary.json").read_text())
    assert {"voxel_ece", "voxel_brier", "aurc"} <= summary["metrics"].keys()
    told = summary["decisions"]
    assert told["judged"] == "by cross-fitting" and told["temperature"] == kept["temperature"]
    before, after = summary["metrics"]["voxel_ece"], told["metrics"]["voxel_ece"]
    assert after["value"] < before["value"] and after["low"] < after["value"] < after["high"]
    tested = evaluate_run(run, part="test")["decisions"]
    assert tested["temperature"] == kept["temperature"] and tested["judged"] == "here"
    assert json.loads((run / DECISIONS_FILE).read_text()) == kept
    for part in ("val", "test"):
        assert (run / "evaluation" / part / "calibration.png").is_file()


@pytest.mark.slow
def test_boxes_are_drawn_and_counted_from_the_chosen_score_on(tmp_path, capsys):
    run = train(tmp_path, "detection", "voc", **{"training.steps": 30})
    kept = json.loads((run / DECISIONS_FILE).read_text())
    assert 0 < kept["score_threshold"] < 1
    told = json.loads((run / "evaluation/val/summary.json").read_text())
    assert told["scoring"] == {"score_threshold": kept["score_threshold"]}
    capsys.readouterr()
    image = next((tmp_path / "data").rglob("*.png"))
    predict_run(run, [str(image)], output=tmp_path / "out")
    boxes = json.loads((tmp_path / "out/detections.json").read_text())
    chances = sorted((box["score"], box["probability"]) for box in boxes)
    assert [p for _, p in chances] == sorted(p for _, p in chances)
    assert all(0 <= p <= 1 for _, p in chances)
    sure = sum(box["score"] >= kept["score_threshold"] for box in boxes)
    assert f"{sure} object" in capsys.readouterr().out
    config = config_of_run(read_run(run))
    config.evaluation.score_threshold = 0.99
    summary = evaluate_run(run, part="test", config=config)
    assert summary["scoring"] == {"score_threshold": 0.99}
    # One that was given stands, and what was chosen stays as it was.
    assert summary["decisions"]["metrics"]["false_positives_an_image"]["value"] == 0
    assert json.loads((run / DECISIONS_FILE).read_text()) == kept


def test_a_rule_that_is_none_is_told_before_training(tmp_path):
    config = small_config("classification", **{"evaluation.operating_point": "sensitivity=95"})
    with pytest.raises(UserError, match="evaluation.operating_point is 'sensitivity=95'; expected"):
        train_run(config, tmp_path / "run")
