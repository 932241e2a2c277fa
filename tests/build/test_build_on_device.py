"""Cases that the device holds, and several steps a call: the same training."""

import functools

import jax
import numpy as np
import pytest
from small_runs import prepared_experiment, small_config, take_steps

from jaxmed.build.preparation import ChoiceOfView, TrainingView, cut_held, hold_examples
from jaxmed.build.runs import train_run
from jaxmed.data.loader import stack_examples
from jaxmed.training.checkpoints import restore_variables
from jaxmed.types import UserError


def make_cases(shapes):
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.normal(size=(*shape, 1)).astype(np.float32),
            "mask": rng.integers(0, 3, shape).astype(np.int32),
            "spacing": np.ones(2, np.float32),
            "index": np.asarray(row, np.int32),
        }
        for row, shape in enumerate(shapes)
    ]


def test_a_cut_on_the_device_is_the_cut_on_the_host():
    cases = make_cases([(5, 7), (9, 4), (12, 12), (6, 6)])
    view = TrainingView(patch=(6, 6), foreground=0.5, fill=-3.0)
    held = hold_examples(cases.__getitem__, range(4), view, max_bytes=2**20).arrays
    assert held["image"].shape == (4, 12, 12, 1)
    choose = ChoiceOfView(view, {row: row for row in range(4)})
    extra = {"valid": np.float32(1)}
    drawn = [(case, seed) for case in cases for seed in range(10)]
    choices = [
        {**choose(c, np.random.default_rng(s)), "index": c["index"], **extra} for c, s in drawn
    ]
    views = [{**view(c, np.random.default_rng(s)), **extra} for c, s in drawn]
    found = cut_held(*jax.device_put((held, stack_examples(choices))), patch=(6, 6))
    expected = stack_examples(views)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_does_not_fit_is_not_held():
    cases = make_cases([(8, 8)] * 3)
    view = TrainingView(patch=(6, 6))
    read = []
    too_big = hold_examples(
        lambda row: read.append(row) or cases[row], range(3), view, max_bytes=3 * 8 * 8 * 4
    )
    assert too_big is None
    assert read == [0]
    mixed = [*cases[:2], {**cases[2], "image": np.zeros((8, 8, 1), np.uint8)}]
    assert hold_examples(mixed.__getitem__, range(3), view, max_bytes=2**20) is None


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        slow("classification", "pmap"),
        slow("detection", "jit"),
        slow("segmentation", "jit"),
        slow("segmentation", "together"),
        slow("classification", "together"),
    ],
)
def test_held_equals_streamed(task, mode):
    if mode == "together":
        settings = {"training.folds": 2}
    else:
        settings = {"sharding.mode": mode, "sharding.devices": 4}
    streamed, held = (
        take_steps(*prepared_experiment(task, **settings, **{"data.on_device": how}))
        for how in ("never", "always")
    )
    np.testing.assert_allclose(streamed[1], held[1], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *(s[0] for s in (streamed, held))
    )


@pytest.mark.slow
def test_several_steps_a_call_equal_single_ones(tmp_path):
    common = {
        "training.steps": 20,
        "training.log_every": 10,
        "training.evaluate_every": 10,
        "training.checkpoint_every": 10,
    }
    found = []
    for name, settings in (
        ("one", {}),
        ("four", {"training.steps_per_call": 4}),
        ("held", {"training.steps_per_call": 4, "data.on_device": "always"}),
        ("pmap", {"training.steps_per_call": 4, "sharding.mode": "pmap"}),
    ):
        train_run(small_config("segmentation", **common, **settings), tmp_path / name)
        found.append(restore_variables(tmp_path / name / "checkpoints", step=20)[0])
    for other in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found[0], other)


@pytest.mark.slow
def test_resumed_with_several_steps_a_call_equals_uninterrupted(tmp_path):
    settings = {
        "training.steps_per_call": 4,
        "training.log_every": 7,
        "training.evaluate_every": 10,
        "training.checkpoint_every": 10,
        "optimizer.schedule": "constant",
        "optimizer.warmup": 0.0,
    }
    for name, steps in (("straight", 20), ("stopped", 10), ("stopped", 20)):
        train_run(
            small_config("segmentation", **{**settings, "training.steps": steps}), tmp_path / name
        )
    straight, stopped = (
        restore_variables(tmp_path / name / "checkpoints", step=20)[0]
        for name in ("straight", "stopped")
    )
    jax.tree.map(np.testing.assert_array_equal, straight, stopped)


def test_a_wrong_word_is_told(tmp_path):
    with pytest.raises(UserError, match="data.on_device is 'yes'"):
        train_run(small_config("classification", **{"data.on_device": "yes"}), tmp_path / "run")
