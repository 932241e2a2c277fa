"""Sweeps: the space, the study that workers share, trials that fail, end early or are killed."""

import contextlib
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small_config

from jaxmed.build import study as study_module
from jaxmed.build import sweep_trials
from jaxmed.build.config import config_of_run, flatten, read_run, write_json
from jaxmed.build.members import parse_vary, vary_text
from jaxmed.build.runs import train_run
from jaxmed.build.study import Study
from jaxmed.build.sweep import MOST_FAILURES, sweep_run
from jaxmed.build.sweep_space import is_of_numbers, read_space, settings_of
from jaxmed.build.sweep_together import _Halving
from jaxmed.build.sweep_trials import counting_resumes
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.training.progress import TrainingDiverged
from jaxmed.types import UserError

SPACE = """
optimizer.learning_rate: {low: 1e-4, high: 1, log: true}
model.width: {low: 4, high: 12, step: 4}
data.size: [[28, 28], [32, 32]]
"""


@pytest.fixture
def space_file(tmp_path):
    def write(text):
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return write


def pretend(config, workdir, *, watch=None, stop=None):
    """A training whose score is best at a learning rate of 0.01, and grows with the steps."""
    workdir.mkdir(parents=True, exist_ok=True)
    config.training.steps = 8
    write_json(workdir / "config.json", {"config": config.to_dict(), "data": {}})
    best = 1 - abs(math.log10(config.optimizer.learning_rate) + 2) / 4
    values = [best + 0.01 * seed for seed in range(config.training.seeds)]
    for step in (2, 4, 8):
        if watch(step, [value - 0.1 / step for value in values]) and step < 8:
            return False
    found = [{"value": v, "low": v - 0.01, "high": v + 0.01, "n": 40} for v in values]
    entries = [{"metrics": {"f1": one}, "step": 8} for one in found]
    folder = workdir / "evaluation" / "val"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", {"main_score": "f1", **entries[0], "members": entries})
    return True


@pytest.fixture
def opened():
    """Opens the study in a folder."""
    with contextlib.ExitStack() as stack:
        yield lambda folder, space=(), **more: stack.enter_context(Study(folder, space, **more))


@pytest.fixture
def sweep(tmp_path, space_file, monkeypatch, opened):
    """Runs a sweep of pretended trainings to its end, or till it stops; gives its study."""

    def run(train=pretend, text=SPACE, *, data=None, stops=False, **options):
        monkeypatch.setattr(sweep_trials, "train_run", train)
        where = {} if data is None else {"layout": "class_folders", "data.path": str(data)}
        config = small_config("classification", **where, **{"optimizer.clip_norm": 0.0})
        path, output = space_file(text), tmp_path / "out"
        options = {"trials": 8, **options}
        assert sweep_run(config, path, output, **options) is not stops
        return opened(output)

    return run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.learning_rat: [1.0, 2.0]", "did you mean optimizer.learning_rate"),
        ("learning_rate: [1.0, 2.0]", "did you mean optimizer.learning_rate"),
        ("training.ema: [0.9, 0.99]", "did you mean optimizer.ema"),
        ("optimizer.lr: [1.0, 2.0]", "'optimizer.lr'; train.py --dry_run lists the keys"),
        ("optimizer.learning_rate: [1, x]", "'x'; expected a number"),
        ("optimizer.learning_rate: {low: 0, high: 1, log: true}", "log needs low > 0"),
        ("optimizer.learning_rate: {low: 1, high: 0.1}", "expected low < high"),
        ("optimizer.learning_rate: {low: 0.1, high: .inf}", "expected a number"),
        ("optimizer.learning_rate: {low: 0.1, hi: 1}", "or a range such as"),
        ("optimizer.learning_rate: 0.1", "expected a list of values, or a range"),
        ("optimizer.learning_rate: [0.1]", "two or more different values"),
        ("optimizer.learning_rate: {low: -1, high: 1}", "expected no negative number"),
        ("model.width: {low: 4.5, high: 8}", "expected a whole number"),
        ("model.width: [true, 8]", "True; expected a whole number"),
        ("model.name: {low: 1, high: 2}", "takes no numbers"),
        ("model.dropout: [0.0, 1.5]", "expected a share"),
        ("data.size: [[32, a], [28, 28]]", "expected numbers"),
        ("optimizer.momentum: [0.8, 0.9]", "has no effect here"),
        ("seed: [0, 1]", "could not be compared"),
        ("data.workers: [0, 1]", "does not change the score"),
        ("evaluation.coverage: [0.8, 0.9]", "does not change the score"),
        ("training.epochs: [1, 2]", "no effect beside training.steps"),
        ("model.init: [runs/a, runs/b]", "could not be compared"),
        ("model.width: {low: 4, low: 8, high: 16}", "low is there twice"),
        ("training.seeds: [1, 2]", "see --seeds"),
        ("[1, 2]", "expected lines such as"),
        ("", "expected lines such as"),
        ("a: [1", "cannot be read"),
        ("data.size: &a [1, 2]\nmodel.width: *a", "has aliases"),
        ("model.width: [4, 8]\nmodel.width: [8, 16]", "model.width is there twice"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_mistakes_in_the_space_are_told_before_anything_runs(space_file, text, said):
    path = space_file(text)
    with pytest.raises(UserError, match="space.yaml") as error:
        read_space(path, small_config("classification"))
    assert said in str(error.value)


def test_a_space_of_all_kinds_of_values(space_file):
    text = SPACE + "optimizer.name: [adamw, sgd]\noptimizer.momentum: [0.8, 0.9]\n"
    config = small_config("classification")
    space = read_space(space_file(text), config)
    rate, width, size, name, momentum = space
    assert (rate.low, rate.high, rate.log) == (1e-4, 1.0, True)
    assert width.grid() == [4, 8, 12]
    params = {rate.key: 0.1, width.key: 8, size.key: "[28, 28]", name.key: "sgd", momentum.key: 0.8}
    assert settings_of(space, params)["data.size"] == (28, 28)
    assert not is_of_numbers(space)
    assert [dimension.count for dimension in space] == [math.inf, 3, 2, 2, 2]


def test_settings_written_for_one_program_are_read_again():
    settings = [
        {"optimizer.learning_rate": 0.1 + 0.2, "model.dropout": 0.1},
        {"optimizer.learning_rate": 1e-7, "model.dropout": 0.1},
    ]
    assert parse_vary(vary_text(settings)) == settings
    assert len(parse_vary("model.dropout=0.1,0.2 | model.dropout=0.3")) == 3
    for text, said in (
        ("model.dropout=0.1 | model.dropout=0.1", "are the same"),
        ("model.dropout=0.1 | optimizer.momentum=0.1", "the same keys"),
        ("model.dropout=0.1 |", "expected keys with numbers"),
        ("optimizer.ema=0 | optimizer.ema=0.9", "on in some models"),
    ):
        with pytest.raises(UserError, match=said):
            parse_vary(text)


def test_the_best_is_found_and_the_worse_end_early(sweep, tmp_path):
    study = sweep(trials=16)
    trials = study.trials()
    states = [trial.state for trial in trials]
    assert len(states) == 16
    assert states.count("pruned") >= 4
    assert set(states) == {"finished", "pruned"}
    for trial in trials:
        assert max(trial.curve) == (8 if trial.state == "finished" else trial.step)
    scores = [trial.score for trial in trials if trial.state == "finished"]
    best = runpy.run_path(str(tmp_path / "out/best.py"))["get_config"]()
    assert 1 - abs(math.log10(best.optimizer.learning_rate) + 2) / 4 == pytest.approx(max(scores))
    shares, step = study.importance()
    assert shares["optimizer.learning_rate"] > 0.5
    assert step == 2
    assert "Trial" in (tmp_path / "out/sweep.html").read_text()
    assert len((tmp_path / "out/ranking.csv").read_text().splitlines()) == 17
    assert not list((tmp_path / "out").glob("*.part"))


def test_going_on_repeats_no_trial_and_more_may_be_asked_for(sweep):
    first = [trial.params for trial in sweep(trials=5, sampler="random", pruner="none").trials()]
    study = sweep(trials=9, sampler="random", pruner="none")
    both = [trial.params for trial in study.trials()]
    assert both[:5] == first
    rates = {params["optimizer.learning_rate"] for params in both}
    assert len(rates) == 9
    assert len(sweep(trials=9, sampler="random").trials()) == 9
    shares, step = study.importance()
    assert shares["optimizer.learning_rate"] > 0.5
    assert step is None


def test_a_grid_has_each_combination_once(sweep):
    text = "model.width: [4, 8]\ndata.size: [[28, 28], [32, 32]]"
    trials = sweep(text=text, sampler="grid", pruner="none", trials=50).trials()
    assert len(trials) == 4
    assert len({tuple(trial.params.values()) for trial in trials}) == 4


def test_failures_are_noted_and_left_out(sweep, capsys):
    faults = [
        TrainingDiverged("training diverged at step 3"),
        UserError("model.width is too small"),
        MemoryError("no room"),
        RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 9 bytes"),
    ]

    def train(config, workdir, **more):
        number = int(workdir.name)
        if number < len(faults):
            raise faults[number]
        return pretend(config, workdir, **more)

    trials = sweep(train, trials=7).trials()
    assert [trial.state for trial in trials[:4]] == ["failed"] * 4
    messages = [trial.message for trial in trials[:4]]
    assert messages[0] == "diverged: training diverged at step 3"
    assert messages[1] == "model.width is too small"
    assert messages[2] == "the computer's memory is used up"
    assert messages[3] == f"out of memory on the device ({faults[3]})"
    assert all(trial.score is not None for trial in trials[4:])
    assert "trial 1 failed: model.width is too small" in capsys.readouterr().out


def test_where_all_fails_the_sweep_ends(sweep):
    def train(config, workdir, **more):
        raise UserError("no such file")

    with pytest.raises(UserError, match=rf"first {MOST_FAILURES} trials failed.*no such file"):
        sweep(train, trials=50)


def test_a_fault_of_the_program_is_not_passed_over(sweep, tmp_path, opened):
    def train(config, workdir, **more):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        sweep(train)
    [trial] = opened(tmp_path / "out").trials()
    assert (trial.state, trial.message) == ("failed", "ZeroDivisionError: a bug")


def test_a_full_disk_fails_no_trial(sweep, tmp_path, opened):
    def train(config, workdir, **more):
        raise UserError("cannot save") from OSError(28, "No space left on device")

    with pytest.raises(UserError):
        sweep(train)
    # It has no score yet, and goes on once there is room.
    [before] = opened(tmp_path / "out").trials()
    after = sweep(trials=1).trials()
    assert [before.state, after[0].state] == ["running", "finished"]
    assert before.params == after[0].params


@pytest.mark.parametrize("ends", ["finished", "failed"])
def test_lost_data_fail_no_trial(sweep, tmp_path, opened, ends):
    data = tmp_path / "data"
    write_phantoms(data, layout="class_folders", size=32, count=12)
    lost = sorted(data.rglob("*.png"))[3]
    pixels = lost.read_bytes()

    def train(config, workdir, **more):
        if workdir.name == "1":
            lost.unlink()
            if ends == "failed":
                raise UserError(f"{lost}: no such file")
        return pretend(config, workdir, **more)

    with pytest.raises(UserError, match=r"(?s)data have changed.No trial is to blame"):
        sweep(train, data=data, pruner="none", trials=4)
    states = [trial.state for trial in opened(tmp_path / "out").trials()]
    # Nothing is trained on what is left.
    assert states == ["finished", *{"finished": ["finished"], "failed": []}[ends], "running"]
    lost.write_bytes(pixels)
    after = sweep(data=data, pruner="none", trials=4).trials()
    assert [trial.state for trial in after] == ["finished"] * 4


def test_asha_compares_after_the_steps_of_the_first_evaluation_of_all(sweep):
    def train(config, workdir, **more):
        # As the plan chooses it, for each trial by itself.
        config.training.evaluate_every = 4 if workdir.name == "0" else 2
        return pretend(config, workdir, **more)

    early = [trial.step for trial in sweep(train, trials=12).trials() if trial.state == "pruned"]
    assert len(early) > 2
    assert set(early) == {4}


def test_the_mean_over_seeds_counts(sweep, tmp_path):
    text = "optimizer.learning_rate: [0.01, 0.1]"
    trials = sweep(text=text, sampler="grid", pruner="none", seeds=3).trials()
    best = max(trials, key=lambda trial: trial.score)
    assert best.params["optimizer.learning_rate"] == 0.01
    assert best.score == pytest.approx(1.01)
    assert best.seeds == pytest.approx((1, 1.01, 1.02))
    assert best.curve[2] == pytest.approx(1.01 - 0.05)
    assert (best.low, best.high) == pytest.approx((1.0, 1.02))
    assert runpy.run_path(str(tmp_path / "out/best.py"))["get_config"]().training.seeds == 3


def test_a_signal_at_the_evaluation_that_prunes_ends_the_sweep(sweep):
    def train(config, workdir, *, watch, stop):
        finished = pretend(config, workdir, watch=watch)
        stop.requested = not finished
        return finished

    states = [trial.state for trial in sweep(train, stops=True).trials()]
    assert states == ["finished"] * (len(states) - 1) + ["pruned"]
    assert len(states) < 8
    after = [trial.state for trial in sweep().trials()]
    assert (len(after), after[: len(states)]) == (8, states)


@pytest.mark.parametrize("values", ["[0.0, 0.9]", "{low: 0.0, high: 0.9}"])
def test_what_one_program_cannot_mix_is_refused_before_it_begins(sweep, tmp_path, values):
    with pytest.raises(UserError, match=r"ema cannot be on.*take 0 out of its values in .*space"):
        sweep(text=f"optimizer.ema: {values}", together=4)
    assert not (tmp_path / "out").exists()


def test_another_sweep_in_the_same_folder_is_refused(sweep):
    sweep(trials=1)
    with pytest.raises(UserError, match="holds another sweep .*--space model.width"):
        sweep(text=SPACE.replace("high: 12", "high: 16"))
    with pytest.raises(UserError, match="--sampler: tpe -> random"):
        sweep(sampler="random")


def test_a_diverged_seed_fails_its_trial_and_means_are_over_seeds(tmp_path, space_file, opened):
    space = read_space(space_file(SPACE), small_config("classification"))
    study = opened(tmp_path / "study", space)
    [first] = study.claim(trials=2)
    [second] = study.claim(trials=2)
    entries = [
        {"metrics": {"f1": {"value": v, "low": v - 0.1, "high": v + 0.2, "n": 9}}, "step": 4}
        for v in (0.4, 0.6)
    ]
    training = {"evaluate_every": 2}
    assert not sweep_trials.tell_score(study, first, 2, [0.4, -math.inf], training)
    with pytest.raises(UserError, match="diverged before step 2"):
        sweep_trials.finish_trial(study, first, entries, "f1", 2)
    with pytest.raises(UserError, match="undefined, or a model diverged"):
        sweep_trials.finish_trial(study, second, entries[:1], "f1", 2)
    sweep_trials.finish_trial(study, second, entries, "f1", 2)
    trial = study.trials()[second]
    assert trial.score == pytest.approx(0.5)
    assert (trial.low, trial.high) == pytest.approx((0.4, 0.7))
    assert trial.spread == pytest.approx(0.1 * math.sqrt(2))


def test_workers_share_a_study_and_take_up_what_another_lost(tmp_path, space_file, opened):
    space = read_space(space_file(SPACE), small_config("classification"))
    one, other = (opened(tmp_path / "study", space, pruner="median") for _ in range(2))
    first, second = one.claim(trials=3)[0], other.claim(trials=3)[0]
    assert [first, second] == [0, 1]
    assert one.claim(trials=2) == []
    lost = one.params(first)
    one.report(first, 2, 0.5)
    one.release(first)  # as the system does where a process ends
    assert other.claim(trials=2) == [first]
    assert other.params(first) == lost
    assert other.trials()[first].curve == {2: 0.5}
    assert other.report(first, 2, 0.7) is False  # which was told before
    other.finish(first, 0.9)
    assert [trial.state for trial in one.trials()] == ["finished", "running"]


def test_a_group_is_taken_up_whole_and_nothing_that_another_just_ended(
    tmp_path, space_file, opened, monkeypatch
):
    space = read_space(space_file(SPACE), small_config("classification"))
    one, other = (opened(tmp_path / "study", space) for _ in range(2))
    assert one.claim(trials=5, at_once=3) == [0, 1, 2]
    assert [one.group(number) for number in range(3)] == [[0, 1, 2]] * 3
    one.finish(0, 0.5)
    one.release(0)
    assert other.claim(trials=5, at_once=3) == [1, 2]
    hold = one._hold

    def hold_late(number):
        if other.running([1, 2]):  # this one has looked, and still takes them for running
            other.finish(1, 0.5)
            other.finish(2, 0.5)
            other.release(0)
        return hold(number)

    monkeypatch.setattr(one, "_hold", hold_late)
    assert one.claim(trials=4) == [3]


def test_what_kills_its_process_time_and_again_is_given_up(tmp_path, space_file, opened):
    space = read_space(space_file(SPACE), small_config("classification"))
    study = opened(tmp_path / "study", space)
    numbers = study.claim(trials=1)
    for _ in range(5):  # a signal, or a full disk, which leave time to say so
        with contextlib.suppress(OSError), counting_resumes(study, numbers, tmp_path):
            raise OSError(28, "No space left on device")
    killed = []
    for _ in range(sweep_trials.MOST_RESUMES):
        killed.append(counting_resumes(study, numbers, tmp_path))
        killed[-1].__enter__()
    with pytest.raises(UserError, match="ended 3 times after step 0"):
        counting_resumes(study, numbers, tmp_path).__enter__()
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    with counting_resumes(study, numbers, tmp_path):
        pass


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_no_settings_are_tried_twice_and_a_finished_space_ends_the_sweep(sweep, capsys, sampler):
    text = "optimizer.learning_rate: [0.001, 0.01, 0.1]\nmodel.width: {low: 4, high: 8, step: 2}"
    trials = sweep(text=text, sampler=sampler, pruner="none", trials=40).trials()
    assert len({tuple(trial.params.items()) for trial in trials}) == len(trials) == 9
    assert "all combinations of the space were tried" in capsys.readouterr().out


def test_whole_numbers_by_factors_are_as_many_as_there_are(sweep):
    trials = sweep(text="model.width: {low: 1, high: 4, log: true}", trials=9).trials()
    assert sorted(trial.params["model.width"] for trial in trials) == [1, 2, 3, 4]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
@pytest.mark.parametrize("lost", ["add_trial", "add_trial after"])
def test_a_worker_lost_while_it_begins_a_trial_leaves_none_or_a_whole_one(
    tmp_path, space_file, opened, monkeypatch, sampler, lost
):
    space = read_space(
        space_file("model.width: {low: 4, high: 24, step: 4}"), small_config("classification")
    )
    study = opened(tmp_path / "study", space, sampler=sampler)
    study.claim(trials=6)
    add = study._study.add_trial

    def interrupt(trial):
        if lost.endswith("after"):
            add(trial)
        raise KeyboardInterrupt

    monkeypatch.setattr(study._study, "add_trial", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study.claim(trials=6)
    monkeypatch.undo()
    study.close()
    other = opened(tmp_path / "study", space, sampler=sampler)
    while numbers := other.claim(trials=6):
        for number in numbers:
            other.finish(number, 0.5)
        other.release(numbers[0])
    trials = other.trials()
    assert {trial.state for trial in trials} == {"finished"}
    assert sorted(trial.params["model.width"] for trial in trials) == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
@pytest.mark.parametrize(
    ("steps", "values"),
    [
        ("low: 0.1, high: 0.3, step: 0.1", [0.1, 0.2, 0.3]),
        ("low: 0.1, high: 0.7, step: 0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ("low: 0.1, high: 0.75, step: 0.2", [0.1, 0.3, 0.5, 0.7]),
        ("low: 0.05, high: 0.35, step: 0.1", [0.05, 0.15, 0.25, 0.35]),
    ],
)
def test_every_step_of_a_range_is_tried_once(tmp_path, space_file, opened, sampler, steps, values):
    space = read_space(space_file(f"model.dropout: {{{steps}}}"), small_config("classification"))
    assert space[0].grid() == values
    for seed in range(4):
        study = opened(tmp_path / str(seed), space, sampler=sampler, seed=seed)
        numbers = study.claim(trials=50, at_once=50)
        found = [study.params(number)["model.dropout"] for number in numbers]
        assert sorted(found) == pytest.approx(values)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer.name: [adamw, sdg]",
        "model.name: [resnet18, resnet99]",
        "model.name: [unet, resnet18]\noptimizer.name: [adamw, sgd]",
        "model.norm: [batch, foo]",
        "data.size: [[32, 32], [32, 32, 32]]",
        "data.normalization: [zscore, z]",
        "plan: [auto, nowhere.json]",
    ],
)
def test_words_that_are_none_are_told_before_anything_runs(sweep, tmp_path, text):
    key = text.split(":")[0]
    with pytest.raises(UserError, match=rf"space.yaml: {key}="):
        sweep(text=text)
    assert not (tmp_path / "out").exists()


def test_lists_that_belong_together_are_tried_together(sweep):
    """Of the four two make sense; the others are failures as any."""
    text = "data.intensity.mean: [[1.0, 1.0, 1.0], [1.0]]\ndata.channels: [1, 3]"
    assert len(sweep(text=text, sampler="grid", pruner="none", trials=9).trials()) == 4


def test_the_order_of_a_space_does_not_matter(space_file):
    """A key that matters only beside one value of another, which is no default."""
    config = small_config("classification", **{"augmentation.affine": 0.0})
    lines = [
        "augmentation.enabled: [true, false]",
        "augmentation.affine: [0.5, 0.0]",
        "augmentation.rotation: [10.0, 20.0]",
    ]
    for order in itertools.permutations(lines):
        assert len(read_space(space_file("\n".join(order)), config)) == 3


def test_a_space_too_large_for_a_grid_is_refused_without_listing_it(sweep):
    with pytest.raises(UserError, match="has 99,999,999,999,999 combinations"):
        sweep(text="model.width: {low: 1, high: 99999999999999}", sampler="grid")


def test_another_plan_is_another_sweep(sweep, tmp_path):
    sweep(trials=1)
    config = small_config("classification", **{"optimizer.clip_norm": 0.0, "plan": "none"})
    with pytest.raises(UserError, match="holds another sweep .*plan"):
        sweep_run(config, tmp_path / "space.yaml", tmp_path / "out", trials=2)


def test_a_trial_whose_worker_is_lost_after_its_last_step_is_not_pruned(sweep, tmp_path, opened):
    """The pruner dislikes the last score, which ends nothing any more: the best one counts."""

    def train(config, workdir, *, watch, stop):
        if workdir.name == "3" and not (workdir / "lost").exists():
            workdir.mkdir(parents=True, exist_ok=True)
            pretended = config.copy_and_resolve_references()
            pretended.training.steps = 8
            write_json(workdir / "config.json", {"config": pretended.to_dict(), "data": {}})
            for step, score in ((2, 0.99), (4, 0.99), (8, -1.0)):
                watch(step, score)
            (workdir / "lost").touch()
            raise KeyboardInterrupt
        return pretend(config, workdir, watch=watch)

    with pytest.raises(KeyboardInterrupt):
        sweep(train, trials=6)
    after = sweep(train, trials=6).trials()
    assert after[3].state == "finished"


def test_trials_of_one_program_are_compared_at_the_same_steps(tmp_path, space_file, opened):
    """A trial that is trained alone meets those that were trained together at its first rung."""
    space = read_space(space_file(SPACE), small_config("classification"))
    study = opened(tmp_path / "study", space)
    group = study.claim(trials=5, at_once=4)
    run = small_config("classification", **{"training.evaluate_every": 50, "training.steps": 400})
    write_json(tmp_path / "config.json", {"config": run.to_dict(), "data": {}})
    watch = _Halving(study, group, tmp_path, 1, 0)
    for step in (50, 100, 200):
        watch(step, [0.1 + step / 1000 + place / 100 for place in range(4)])
    [alone] = study.claim(trials=5)
    training = run.to_dict()["training"]
    assert [
        sweep_trials.tell_score(study, alone, step, [score], training)
        for step, score in ((50, 0.2), (100, 0.19))
    ] == [False, True]


@pytest.mark.parametrize("content", [None, b"", b"SQLite format 3\0 and so on", b"\0" * 9000])
def test_a_study_that_is_gone_or_damaged_is_not_begun_anew(sweep, tmp_path, content):
    sweep(trials=2)
    path = tmp_path / "out/study.db"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"study\.db: .*restore it from a copy"):
        sweep(trials=3)


def test_a_sweep_goes_on_in_a_version_that_has_more_keys(sweep, tmp_path):
    sweep(trials=1)
    path = tmp_path / "out/sweep.json"
    earlier = json.loads(path.read_text())
    del earlier["config"]["loss"]["label_smoothing"]
    path.write_text(json.dumps(earlier))
    assert len(sweep(trials=2).trials()) == 2


@pytest.mark.parametrize("content", ["[]", "null", '{"config": 3}', "{"])
def test_a_damaged_description_of_a_sweep_is_told(sweep, tmp_path, content):
    sweep(trials=1)
    (tmp_path / "out/sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json: cannot be read"):
        sweep(trials=2)


def test_a_study_that_is_locked_fails_no_trial(sweep, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(study_module, "PATIENCE", 0.2)

    def train(config, workdir, *, watch, stop):
        holder = sqlite3.connect(tmp_path / "out/study.db")
        holder.execute("BEGIN EXCLUSIVE")
        try:
            return pretend(config, workdir, watch=watch)
        finally:
            holder.close()

    with pytest.raises(UserError, match=r"study\.db: .*locked.*No trial is to blame"):
        sweep(train, trials=1)
    assert [trial.state for trial in sweep(trials=1).trials()] == ["finished"]


def test_the_table_is_written_without_the_winner_s_folder(sweep, tmp_path, capsys):
    best = max(sweep(trials=3, pruner="none").trials(), key=lambda trial: trial.score)
    shutil.rmtree(tmp_path / "out/trials" / str(best.number))
    sweep(trials=3, pruner="none")
    assert f"trials/{best.number} of the winner is gone" in capsys.readouterr().out


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from small_runs import small_config
from test_build_sweep import pretend
from jaxmed.build import sweep, sweep_trials

def train(config, workdir, *, watch, stop):
    def watch_and_die(step, score):
        ends = watch(step, score)
        if workdir.name == "2" and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return ends
    return pretend(config, workdir, watch=watch_and_die)

sweep_trials.train_run = train
config = small_config("classification", **{"optimizer.clip_norm": 0.0})
sweep.sweep_run(config, sys.argv[1], sys.argv[2], trials=5, pruner="none")
"""


@pytest.mark.slow
def test_a_trial_whose_worker_was_killed_is_gone_on_with(sweep, tmp_path, space_file, opened):
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[2])]
    command = [sys.executable, "-c", KILLED, str(space_file(SPACE)), str(tmp_path / "out"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    before = opened(tmp_path / "out").trials()
    assert [trial.state for trial in before] == ["finished", "finished", "running"]
    assert set(before[2].curve) == {2, 4}
    after = sweep(trials=5, pruner="none").trials()
    assert [trial.state for trial in after] == ["finished"] * 5
    assert after[2].params == before[2].params
    assert set(after[2].curve) == {2, 4, 8}
    assert len({trial.params["optimizer.learning_rate"] for trial in after}) == 5


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A finished sweep of four learning rates, trained together, of which two stop half-way."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "space.yaml").write_text("optimizer.learning_rate: [1e-4, 1e-3, 1e-2, 1e-1]")
    config = small_config("classification")
    options = {"trials": 4, "sampler": "grid", "together": 4}
    halve = _Halving.__call__

    def halve_and_signal(self, step, scores):
        if ends := halve(self, step, scores):
            os.kill(os.getpid(), signal.SIGTERM)
        return ends

    with pytest.MonkeyPatch.context() as patch:  # a signal at the very evaluation that halves
        patch.setattr(_Halving, "__call__", halve_and_signal)
        assert not sweep_run(config, folder / "space.yaml", folder / "out", **options)
    assert not (folder / "out/together/0/rung1").exists()
    assert sweep_run(config, folder / "space.yaml", folder / "out", **options)
    return folder / "out"


@pytest.mark.slow
def test_trained_together_the_worse_half_stops(together, opened):
    trials = opened(together).trials()
    assert sorted(trial.state for trial in trials) == ["finished", "finished", "pruned", "pruned"]
    halved = json.loads((together / "together/0/rung0/halved.json").read_text())
    assert halved["step"] == 2
    early = {trial.number: trial.curve[2] for trial in trials}
    kept = sorted(early, key=lambda number: -early[number])[:2]
    assert sorted(halved["kept"]) == sorted(kept)
    assert [t.number for t in trials if t.state == "finished"] == sorted(kept)
    assert all(set(t.curve) == ({2, 4} if t.number in kept else {2}) for t in trials)
    assert (together / "sweep.html").is_file()


@pytest.mark.slow
def test_the_winner_trained_by_itself_scores_the_same(together, tmp_path, opened):
    best = max(opened(together).trials(), key=lambda t: (t.state == "finished", t.score or 0))
    config = runpy.run_path(str(together / "best.py"))["get_config"]()
    assert config.optimizer.learning_rate == best.params["optimizer.learning_rate"]
    assert not config.training.vary
    assert train_run(config, tmp_path / "alone")
    summary = sweep_trials.read_summary(tmp_path / "alone")
    assert summary["metrics"][summary["main_score"]]["value"] == pytest.approx(best.score, abs=1e-3)
    run = flatten(config_of_run(read_run(tmp_path / "alone")))
    assert run["training.steps"] == 4
    lines = (tmp_path / "alone/metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    curve = {e["step"]: e[summary["main_score"]] for e in log if e["split"] == "val"}
    assert curve == pytest.approx(dict(best.curve), abs=1e-3)
