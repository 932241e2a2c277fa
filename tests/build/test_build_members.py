"""Models trained together: equal to models trained apart, in every task and on any devices."""

import csv
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from small_runs import prepared_experiment, small_config, take_steps

from jaxmed.build import datasets
from jaxmed.build.config import config_of_run
from jaxmed.build.evaluations import evaluate_run
from jaxmed.build.experiment import Experiment
from jaxmed.build.explanations import explain_run
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
from jaxmed.build.resolve import fold_gaps
from jaxmed.build.runs import train_run
from jaxmed.build.trained import load_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.evaluation.evaluate import summarize_cases
from jaxmed.tasks.classification import Classification
from jaxmed.training.checkpoints import restore_members
from jaxmed.training.progress import Progress, TrainingDiverged
from jaxmed.training.signals import StopSignal
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.learning_rat=1,2", "did you mean optimizer.learning_rate"),
        ("data.size=32,64", "cannot differ"),
        ("model.dropout", "expected numbers"),
        ("model.dropout=a,b", "model.dropout=a is no number"),
        ("optimizer.learning_rate=1e-3,model.dropout=0,0.2", "a semicolon between keys"),
        ("model.dropout=0.1", "has one value; set it for all models"),
        ("model.dropout=0.1,0.1", "none twice"),
        ("optimizer.learning_rate=1e-3,inf", "learning_rate=inf; expected finite"),
        ("model.dropout=0.1,0.3;model.dropout=0.2", "for each key once"),
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
        ({"training.vary": "model.dropout=-1,0"}, "training.vary: model.dropout is -1"),
        ({"training.vary": "model.dropout=0,1"}, "model.dropout is 1.0; expected a share"),
        ({"model.dropout": 2.0}, "model.dropout is 2.0; expected a share"),
        ({"training.vary": "model.width=8,16"}, "cannot differ between models; these can"),
        ({"training.folds": 99}, "training.folds is 99; train and val have"),
        ({"training.vary": "augmentation.noise=2,0"}, "noise is 2.0; expected a probability"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        train_run(small_config("classification", **settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"augmentation.enabled": False}, "augmentation.noise"),
        ({"augmentation.affine": 0.0}, "augmentation.rotation"),
        ({"augmentation.flip_axes": (-1,)}, "augmentation.flip"),
        ({}, "optimizer.momentum"),
    ],
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


def test_a_key_that_matters_to_some_models_may_vary():
    vary = "augmentation.affine=0,0.5; augmentation.rotation=5,10.0000001"
    members = plan_members(
        small_config("classification", **{"training.vary": vary, "augmentation.affine": 0.0})
    )
    assert [m.name for m in members][1] == "affine=0 rotation=10.0000001"


def test_folds_in_place_of_train_and_val():
    split = {"fold0": [0, 1], "fold1": [2], "fold10": [5], "test": [3]}
    assert rows_of(split, "train", 0) == [2, 5]
    assert rows_of(split, "val", 10) == [5]
    assert rows_of(split, "val") == rows_of(split, "train") == [0, 1, 2, 5]
    assert rows_of(split, "test") == [3]
    assert rows_of({"train": [1], "val": [2]}, "val", None) == [2]
    with pytest.raises(UserError, match="fold0 is not in the split"):
        rows_of({"train": [1], "val": [2]}, "val", 0)


def test_the_setting_with_the_best_mean_is_chosen():
    members = [Member(f"{s}{f}", s, f, 0, {}) for s in "abc" for f in (0, 1)]
    best = {
        "score": np.float32([0.5, 0.7, 0.9, 0.2, 0.99, -np.inf]),
        "step": np.array([4, 4, 4, 4, 4, 4]),
    }
    assert setting_of_best(members, best) == [0, 1]
    best["step"][5] = 0  # diverged at once
    assert setting_of_best(members, best) == [0, 1]
    last = {name: values[4:] for name, values in best.items()}
    assert setting_of_best(members[4:], last) == [4 - 4]
    last["step"][0] = 0
    with pytest.raises(UserError, match="every model diverged"):
        setting_of_best(members[4:], last)


def test_a_model_without_a_score_keeps_its_last_weights_and_a_diverged_one_is_told():
    best = {
        "score": np.float32([-np.inf, -np.inf, 0.5]),
        "step": np.int32([0, 0, 2]),
        "bad_evaluations": np.int32([0, 0, 0]),
        "evaluated": np.int32([2, 2, 2]),
        "diverged": np.int32([0, 0, 0]),
    }
    after, improved = best_after(best, score=[None, -np.inf, -np.inf], step=4)
    assert improved.tolist() == [True, False, False]
    assert after["step"].tolist() == [4, 0, 2]
    assert after["diverged"].tolist() == [0, 4, 4]
    assert after["bad_evaluations"].tolist() == [1, 1, 1]
    after, _ = best_after(after, score=[0.1, -np.inf, -np.inf], step=6)
    assert after["diverged"].tolist() == [0, 4, 4]
    np.testing.assert_array_equal(after["score"], np.float32([0.1, -np.inf, 0.5]))


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
    # With batch norm, rounding of small batches would soon be enlarged beyond any tolerance.
    settings |= {"model.norm": "group", "optimizer.name": "sgd", "optimizer.learning_rate": 0.1}
    results = []
    for devices in (1, 4):
        made = prepared_experiment("classification", **settings, **{"sharding.devices": devices})
        results.append(take_steps(*made))
        if devices == 4:
            assert made[0].mesh.devices.shape == shape
    (one, one_losses), (many, many_losses) = results
    np.testing.assert_allclose(one_losses, many_losses, rtol=1e-4)
    start = jax.device_get(made[0].fresh_state(made[0].lift()).params)
    for before, x, y in zip(*map(jax.tree.leaves, (start, one.params, many.params)), strict=True):
        # Far closer to each other than to where they began.
        moved = np.abs(x - before).max()
        assert np.abs(x - y).max() <= 1e-2 * moved + 1e-7
    assert moved > 1e-3


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


def test_statistics_are_all_of_a_fold_or_all_of_the_config(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"data.intensity.mean": [100.0], "data.intensity.std": [30.0]}))
    settings = {"training.folds": 2, "data.normalization": "dataset"}
    for more in ({"plan": str(plan)}, {"data.intensity.mean": (100.0,)}):
        experiment, _, _ = prepared_experiment(
            "classification",
            **settings,
            **{"data.size": (32, 32), "data.fit": "pad", "data.channels": 1},
            **more,
        )
        assert {config.data.intensity.mean for config in experiment.member_configs} == {(100.0,)}
        assert len({config.data.intensity.std for config in experiment.member_configs}) == 1


def test_scores_of_folds_are_means_over_them():
    # Each model ranks its own cases rightly; the second is twice as sure of everything.
    task = Classification(("a", "b"))
    truth = [0, 0, 1, 1, 0, 0, 1, 1]
    sure = [0.1, 0.15, 0.2, 0.25, 0.6, 0.7, 0.8, 0.9]
    rows = {
        i: {"label": np.asarray(t), "probability": np.array([1 - p, p])}
        for i, (t, p) in enumerate(zip(truth, sure, strict=True))
    }
    scores = {i: task.score(row["probability"], {"label": row["label"]}) for i, row in rows.items()}
    pooled = summarize_cases(task, scores, resamples=50)
    apart = summarize_cases(task, scores, folds=[{0, 1, 2, 3}, {4, 5, 6, 7}], resamples=50)
    assert pooled["auroc"]["value"] < 0.8
    assert apart["auroc"]["value"] == 1 and apart["auroc"]["no_spread"]  # in no resample else
    assert apart["auroc"]["n"] == 8
    assert apart["accuracy"]["value"] == pooled["accuracy"]["value"] == 0.5


def test_folds_that_lack_a_class_or_hold_all_of_it_are_told():
    source = Phantoms("cells", task="classification", size=16, count=6)
    first, second, third = source.info.class_names
    source.labels = [0, 0, 1, 1, 0, 2]
    split = {"fold0": [0, 2], "fold1": [1, 3], "fold2": [4, 5], "test": []}
    assert fold_gaps(source, split) == [
        f"fold0 has no case of {third}: its scores of these are undefined",
        f"fold1 has no case of {third}: its scores of these are undefined",
        f"fold2 has no case of {second}: its scores of these are undefined",
        f"all cases of {third} are in fold2: its model never learns these",
    ]
    source.labels = np.array([[1, 0, 0], [0, 1, 1]])
    told = fold_gaps(source, {"fold0": [0], "fold1": [1]})
    assert told == [
        f"fold0 has no case of {second}, {third}: its scores of these are undefined",
        f"all cases of {first} are in fold0: its model never learns these",
        f"fold1 has no case of {first}: its scores of these are undefined",
        f"all cases of {second}, {third} are in fold1: its model never learns these",
    ]


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
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["cases"]
    assert all(row["id"] in split[fold_name(int(row["fold"]))] for row in rows)
    # What single models fix on their folds would not suit all of them together.
    assert summary["decisions"] == {} and not (folds / "whole/decisions.json").exists()
    assert any("no temperature, threshold or sets are fixed" in note for note in summary["notes"])
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
    of_folds = [np.mean([told[name] for name in split[fold_name(i)]]) for i in range(3)]
    assert summary["metrics"]["dice"]["value"] == pytest.approx(np.mean(of_folds), 1e-4)


@pytest.mark.slow
def test_the_model_that_explains_did_not_see_the_case(folds, tmp_path):
    rows = explain_run(folds / "whole", output=tmp_path, methods=["gradient"], cases=3)
    split = json.loads((folds / "whole/split.json").read_text())
    assert len(rows) == 3 and {row["case"] for row in rows} <= set(split["fold0"])


@pytest.mark.slow
def test_a_run_without_its_split_is_not_cut_anew(folds, tmp_path):
    shutil.copytree(folds / "whole", tmp_path / "run")
    (tmp_path / "run/split.json").unlink()
    settings = {"training.folds": 3, "training.seeds": 2, "training.steps": 4, "data.count": 48}
    config = small_config("segmentation", **settings)
    with pytest.raises(UserError, match=r"split\.json: cannot be read"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run/split.json").exists()
    config.training.folds = 4
    with pytest.raises(UserError, match=r"training\.folds=3, not 4"):
        train_run(config, tmp_path / "run")


@pytest.mark.slow
def test_what_models_were_before_all_diverged_is_evaluated(tmp_path, monkeypatch, capsys):
    watch = Progress._watch

    def diverge(self, step):
        if step == 4:
            raise TrainingDiverged("training diverged at step 4")
        watch(self, step)

    config = small_config("classification", **{"training.seeds": 2})
    monkeypatch.setattr(Progress, "_watch", diverge)
    assert train_run(config, tmp_path / "run")
    assert "at their best is evaluated" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run/evaluation/val/summary.json").read_text())
    assert [member["step"] for member in summary["members"]] == [2, 2]
    page = (tmp_path / "run/report.html").read_text()
    assert "too good for that; the test part tells" in page
    assert page.index("auroc", page.index("Each model on its own part")) > 0


@pytest.mark.slow
def test_models_that_were_stopped_early_are_not_called_diverged(tmp_path, capsys):
    settings = {"training.evaluate_every": 0, "training.steps": 4}
    stop = StopSignal()
    stop.requested = True
    for more in ({"training.seeds": 2}, {}):
        folder = tmp_path / ("many" if more else "one")
        assert not train_run(small_config("classification", **settings, **more), folder, stop=stop)
    with pytest.raises(UserError, match="were not evaluated yet; go on with training"):
        load_run(tmp_path / "many")
    evaluate_run(tmp_path / "one")
    said = capsys.readouterr().out.split("the same command goes on from there")[-1]
    assert "not evaluated in training (step 0)" in " ".join(said.split())


@pytest.mark.slow
def test_folds_may_start_from_other_weights_but_not_from_other_folds(folds, tmp_path):
    settings = {"training.folds": 2, "data.count": 48}
    with pytest.raises(UserError, match="holds models trained together"):
        init = {"model.init": str(folds / "whole")}
        train_run(small_config("segmentation", **settings, **init), tmp_path / "run")
    one = {"data.count": 12, "training.steps": 2}
    train_run(small_config("segmentation", **one), tmp_path / "one")
    init = {"model.init": str(tmp_path / "one")}
    train_run(small_config("segmentation", **settings, **init), tmp_path / "run")
    notes = json.loads((tmp_path / "run/config.json").read_text())["data"]["notes"]
    assert any("too good" in note for note in notes)


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
    told = [note for note in summary["notes"] if "learning_rate=1e+30 had diverged" in note]
    assert len(told) == 1
    with pytest.raises(UserError, match="each model in .* has its own value"):
        config = config_of_run(run.run)
        config.optimizer.learning_rate = 0.5
        load_run(tmp_path / "run", config)
