"""Models trained together: equal to models trained apart, in every task and on any devices."""

import csv
import functools
import json

import jax
import numpy as np
import pytest
from small_runs import prepared_experiment, small_config, take_steps

from jaxmed.build import datasets
from jaxmed.build.evaluations import evaluate_run
from jaxmed.build.experiment import Experiment
from jaxmed.build.members import (
    Member,
    fold_name,
    member_config,
    parse_vary,
    plan_members,
    rows_of,
    setting_of_best,
)
from jaxmed.build.predictions import predict_run
from jaxmed.build.runs import train_run
from jaxmed.build.trained import load_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.training.checkpoints import restore_members
from jaxmed.training.state import best_after
from jaxmed.types import UserError

VARY = "optimizer.learning_rate=1e-2,1e-3; model.dropout=0,0.3; augmentation.noise=0,0.8"


def test_every_combination_is_a_member():
    config = small_config(
        "classification",
        **{
            "training.folds": 3,
            "training.seeds": 2,
            "training.vary": "optimizer.learning_rate=1e-3,3e-4",
            "seed": 5,
        },
    )
    members = plan_members(config)
    assert len({member.name for member in members}) == 12
    assert members[0].name == "learning_rate=0.001 fold0 seed5"
    assert {member.fold for member in members} == {0, 1, 2}
    assert {member.seed for member in members} == {5, 6}
    assert member_config(config, members[-1]).optimizer.learning_rate == 3e-4
    assert member_config(config, members[-1]).seed == 6
    assert plan_members(small_config("classification")) == ()
    [only] = plan_members(small_config("classification", **{"training.vary": "model.dropout=0.1"}))
    assert only.name == "dropout=0.1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.learning_rat=1,2", "did you mean optimizer.learning_rate"),
        ("data.size=32,64", "cannot differ"),
        ("model.dropout", "different numbers"),
        ("model.dropout=a,b", "different numbers"),
        ("model.dropout=0.1,0.1", "different numbers"),
        ("model.dropout=0.1;model.dropout=0.2", "for each key once"),
        ("optimizer.ema=0,0.9", "on in some models and off in others"),
    ],
)
def test_what_cannot_vary_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_vary(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training.folds": 1}, "training.folds is 1"),
        ({"training.seeds": 0}, "training.seeds is 0"),
        ({"training.folds": 2, "sharding.mode": "pmap"}, "sharding.mode=jit"),
        ({"training.folds": 2, "sharding.members": "all"}, "sharding.members is 'all'"),
        ({"training.vary": "model.dropout=-1,0"}, "model.dropout is -1"),
        ({"training.vary": "augmentation.noise=2,0"}, "probability is 2"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        train_run(small_config("classification", **settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"augmentation.enabled": False}, "augmentation.noise"), ({}, "optimizer.momentum")],
)
def test_what_would_have_no_effect_is_refused(settings, key):
    config = small_config("classification", **settings, **{"training.vary": f"{key}=0.1,0.2"})
    with pytest.raises(UserError, match=f"{key} has no effect"):
        plan_members(config)


def test_averages_may_be_varied_where_the_config_has_none():
    experiment, _, _ = prepared_experiment(
        "classification", **{"optimizer.ema": 0.0, "training.vary": "optimizer.ema=0.5,0.9"}
    )
    assert jax.tree.leaves(experiment.abstract_state.ema)
    assert experiment.abstract_state.hyper["ema_decay"].shape == (2,)


def test_folds_in_place_of_train_and_val():
    split = {"fold0": [0, 1], "fold1": [2], "fold10": [5], "test": [3]}
    assert rows_of(split, "train", 0) == [2, 5]
    assert rows_of(split, "val", 10) == [5]
    assert rows_of(split, "val") == rows_of(split, "train") == [0, 1, 2, 5]
    assert rows_of(split, "test") == [3]
    assert rows_of({"train": [1], "val": [2]}, "val", None) == [2]


def test_the_setting_with_the_best_mean_is_chosen():
    members = [Member(f"{s}{f}", s, f, 0, {}) for s in "abc" for f in (0, 1)]
    assert setting_of_best(members, [0.5, 0.7, 0.9, 0.2, 0.99, -np.inf]) == [0, 1]
    with pytest.raises(UserError, match="train longer"):
        setting_of_best(members[4:], [0.99, -np.inf])


def test_an_exhausted_member_stays_as_it_is():
    best = {
        "score": np.float32([0.5, 0.5]),
        "step": np.int32([1, 1]),
        "bad_evaluations": np.int32([2, 1]),
        "evaluated": np.int32([3, 3]),
    }
    after, improved = best_after(best, score=[0.9, 0.9], step=4, early_stopping=2)
    assert improved.tolist() == [False, True]
    assert after["step"].tolist() == [1, 4]
    after, improved = best_after(best, score=[None, 0.9], step=4)
    assert improved.tolist() == [False, True]
    assert after["evaluated"].tolist() == [4, 4]


def one_by_one(experiment, source, split):
    """What the first and the last model become when they are trained by themselves."""
    for place in (0, len(experiment.members) - 1):
        member, config = experiment.members[place], experiment.member_configs[place]
        config.sharding.devices = 1
        alone = Experiment(config, source.info, ())
        own = {"train": rows_of(split, "train", member.fold)}
        yield place, *take_steps(alone, source, own)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("task", "layout", "settings"),
    [
        slow("classification", "vmap", {"training.folds": 2, "training.vary": VARY}),
        ("classification", "loop", {"training.seeds": 2, "training.vary": VARY}),
        slow("detection", "vmap", {"training.folds": 2}),
        slow("detection", "loop", {"training.folds": 2}),
        slow("segmentation", "vmap", {"training.vary": VARY.replace("noise", "rotation")}),
        slow("segmentation", "loop", {"training.folds": 2}),
    ],
)
def test_together_equals_apart(task, layout, settings):
    settings = {"sharding.members": layout, **settings}
    experiment, source, split = prepared_experiment(task, **settings)
    together, losses = take_steps(experiment, source, split)
    assert int(together.step) == 3
    for place, alone, own_losses in one_by_one(experiment, source, split):
        np.testing.assert_allclose(losses[:, place], own_losses, rtol=2e-4)
        for name in ("params", "model_state", "ema"):
            jax.tree.map(
                lambda x, y, place=place: np.testing.assert_allclose(x[place], y, atol=2e-4),
                getattr(together, name),
                getattr(alone, name),
            )


@pytest.mark.parametrize(
    ("members", "shape", "layout"),
    [
        slow(4, (4, 1), "loop"),
        (2, (2, 2), "vmap"),
        slow(2, (2, 2), "loop"),
        slow(3, (1, 4), "vmap"),
    ],
)
def test_many_devices_share_the_models_and_their_batches(members, shape, layout):
    settings = {"training.seeds": members, "sharding.members": layout}
    results = []
    for devices in (1, 4):
        made = prepared_experiment("classification", **settings, **{"sharding.devices": devices})
        results.append(take_steps(*made))
        if devices == 4:
            assert made[0].mesh.devices.shape == shape
    # Sums over devices round differently, which batch norm of small batches soon enlarges.
    np.testing.assert_allclose(results[0][1][:2], results[1][1][:2], rtol=1e-4)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=3e-3)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=3e-3),
        results[0][0].ema,
        results[1][0].ema,
    )


def test_statistics_are_of_each_folds_own_training_part():
    experiment, source, split = prepared_experiment(
        "classification", **{"training.folds": 2, "data.normalization": "dataset"}
    )
    means = [config.data.intensity.mean[0] for config in experiment.member_configs]
    assert means[0] != means[1]
    for fold, mean in enumerate(means):
        images = [source[row]["image"] for row in rows_of(split, "train", fold)]
        np.testing.assert_allclose(mean, np.mean(images), rtol=0.02)
    assert experiment.streams == ([0, 1], [0, 1])


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """A finished run of three folds, one that was stopped half way and went on, and its data."""
    folder = tmp_path_factory.mktemp("folds")
    settings = {"training.folds": 3, "training.seeds": 2, "training.steps": 4, "data.count": 48}
    train_run(small_config("segmentation", **settings), folder / "whole")
    half = {**settings, "optimizer.schedule": "constant", "optimizer.warmup": 0.0}
    train_run(small_config("segmentation", **half), folder / "straight")
    train_run(small_config("segmentation", **{**half, "training.steps": 2}), folder / "stopped")
    train_run(small_config("segmentation", **half), folder / "stopped")
    return folder


@pytest.mark.slow
def test_a_cross_validation_is_evaluated_as_one(folds):
    summary = json.loads((folds / "whole/evaluation/val/summary.json").read_text())
    split = json.loads((folds / "whole/split.json").read_text())
    assert set(split) == {fold_name(0), fold_name(1), fold_name(2), "test"}
    assert summary["cases"] == sum(len(split[fold_name(i)]) for i in range(3))
    assert len(summary["ensemble"]) == len(summary["members"]) == 6
    assert {"mean", "std"} == summary["spread"]["dice"].keys()
    with (folds / "whole/evaluation/val/cases.csv").open() as file:
        assert len(list(csv.DictReader(file))) == summary["cases"]
    page = (folds / "whole/report.html").read_text()
    assert "fold1 seed1" in page
    assert "standard deviation" in page
    lines = [json.loads(x) for x in (folds / "whole/metrics.jsonl").read_text().splitlines()]
    assert all("loss/fold2 seed0" in line for line in lines if line["split"] == "train")
    assert all("dice/fold2 seed0" in line for line in lines if line["split"] == "val")


@pytest.mark.slow
def test_no_fold_is_predicted_by_a_model_that_saw_it(folds):
    run = load_run(folds / "whole")
    source = datasets.make_source(run.experiment.config)
    summary = evaluate_run(folds / "whole", part="val", source=source)
    split = json.loads((folds / "whole/split.json").read_text())
    own = run.predict_with([i for i, m in enumerate(run.experiment.members) if m.fold == 1])
    row = source.ids.index(split[fold_name(1)][0])
    [(example, raw)] = own([run.experiment.prepare(source[row])])
    task = run.experiment.task
    score = task.score(task.restore(raw, example), source[row])["dice"]
    with (folds / "whole/evaluation/val/cases.csv").open() as file:
        told = {line["id"]: float(line["dice"]) for line in csv.DictReader(file)}
    assert told[source.ids[row]] == pytest.approx(score, abs=1e-5)
    assert summary["metrics"]["dice"]["value"] == pytest.approx(np.mean(list(told.values())), 1e-4)


@pytest.mark.slow
def test_resumed_together_equals_uninterrupted(folds):
    straight, stopped = (
        restore_members(folds / name / "checkpoints") for name in ("straight", "stopped")
    )
    jax.tree.map(np.testing.assert_array_equal, straight, stopped)


@pytest.mark.slow
def test_the_ensemble_is_the_mean_of_its_members(folds, tmp_path):
    run = load_run(folds / "whole")
    assert run.chosen == tuple(range(6))
    image = datasets.make_source(run.experiment.config)[0]
    example = run.experiment.prepare(image)
    [(_, together)] = run.predict([example])
    each = [next(run.predict_with([i])([example]))[1] for i in run.chosen]
    np.testing.assert_allclose(together, np.mean(each, 0), atol=1e-5)
    write_phantoms(tmp_path / "images", layout="pairs", count=8)
    inputs = sorted((tmp_path / "images").rglob("images/**/*.png"))[:1]
    predict_run(folds / "whole", [str(inputs[0])], output=tmp_path / "out")
    assert list((tmp_path / "out").iterdir())
    evaluate_run(folds / "whole", part="test")
    summary = json.loads((folds / "whole/evaluation/test/summary.json").read_text())
    assert len(summary["ensemble"]) == 6
    assert "members" not in summary


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_the_best_setting_predicts(tmp_path, task):
    vary = {"training.vary": "optimizer.learning_rate=1e-2,1e30", "optimizer.clip_norm": 0.0}
    train_run(small_config(task, **vary), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert [run.experiment.members[i].name for i in run.chosen] == ["learning_rate=0.01"]
    summary = json.loads((tmp_path / "run/evaluation/val/summary.json").read_text())
    assert [m["name"] for m in summary["members"] if m["chosen"]] == ["learning_rate=0.01"]
