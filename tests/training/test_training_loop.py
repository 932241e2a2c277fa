"""The loop: exact resume, what is saved and when, stopping early, by signal and on divergence."""

import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.loader import training_batches
from jaxmed.training.checkpoints import Checkpoints
from jaxmed.training.logging import Logger, read_log, rewind
from jaxmed.training.loop import train
from jaxmed.training.optimizers import make_optimizer, make_schedule
from jaxmed.training.progress import TrainingDiverged
from jaxmed.training.sharding import lift, make_mesh
from jaxmed.training.signals import StopSignal
from jaxmed.training.speed import InBackground
from jaxmed.training.state import init_state
from jaxmed.training.step import make_step

OPTIMIZER = make_optimizer("adamw")


class Fit:
    main_score = "score"

    def loss(self, apply, batch, *, key, total):
        outputs, model_state = apply(batch["image"], key=key)
        loss = total((outputs - batch["target"]) ** 2 @ batch["valid"])
        return loss, {"model_state": model_state, "metrics": {}}


def model_apply(variables, images, *, train, mutable, rngs):
    # Dropout-like noise, and a counter as model state.
    noise = jax.random.normal(rngs["dropout"], images.shape)
    outputs = (images + 0.1 * noise) @ variables["params"]["w"]
    return outputs, {"count": variables["count"] + 1}


def make_state(key):
    return init_state(
        lambda k: {"params": {"w": jax.random.normal(k, (3,))}, "count": jnp.zeros(())},
        OPTIMIZER,
        key=key,
        hyper={"learning_rate": 0.1, "weight_decay": 0.01, "ema_decay": 0.9},
        ema=True,
    )


class Points:
    def __len__(self):
        return 11

    def __getitem__(self, row):
        image = np.random.default_rng(row).random(3, np.float32)
        return {"image": image, "target": image.sum()[None][0:1].reshape(())}


def jitter(example, rng):
    return {**example, "image": example["image"] + rng.random(3, np.float32) / 10}


@pytest.fixture(scope="module")
def lifted():
    step = make_step(
        model_apply=model_apply,
        task=Fit(),
        optimizer=OPTIMIZER,
        augment=lambda key, e: {**e, "image": e["image"] * jax.random.uniform(key)},
        schedule=make_schedule("cosine", steps=20),
    )
    return lift(step, mesh=make_mesh(jax.devices()[:1]))


def test_the_log_tells_the_share_of_what_the_device_could_do(tmp_path, lifted):
    known = iter([None, *[1e6] * 100])
    run(tmp_path, lifted, steps=8, step_flops=lambda: next(known))
    found = [entry["mfu"] for entry in read_log(tmp_path / "metrics.jsonl") if "mfu" in entry]
    assert found[-1] > 0 and None in found


def test_a_number_is_worked_out_in_the_background():
    asked = threading.Event()

    def count():
        asked.wait(10)
        return 5.0

    number = InBackground(count)
    assert number() is None
    asked.set()
    for _ in range(1000):
        if number() is not None:
            break
        time.sleep(0.01)
    assert number() == 5.0
    broken = InBackground(lambda: 1 / 0)
    broken()
    assert isinstance(broken._future.exception(10), ZeroDivisionError)
    assert broken() is None


def test_steps_move_nothing_but_batches_and_compile_once():
    step = make_step(model_apply=model_apply, task=Fit(), optimizer=OPTIMIZER)
    lifted = lift(step, mesh=make_mesh(jax.devices()[:1]))
    state = lifted.init(make_state, jax.random.key(0))
    with training_batches(Points(), range(11), batch_size=4, seed=0, prepare=jitter) as batches:
        for _ in range(4):
            batch = lifted.place_batch(next(batches))
            # Explicit ones, of batches and logged metrics, are allowed.
            with jax.transfer_guard("disallow"):
                state, metrics = lifted.step(state, batch)
                assert lifted.fetch(metrics)["loss"] >= 0
    assert lifted._compiled._cache_size() == 1


def run(workdir, lifted, steps=20, *, change=None, scores=None, stop=None, **options):
    """Train in `workdir`, going on from its checkpoint; returns the state and what happened.

    `change(step, batch)` may do anything before a batch; `scores` maps steps to scores.
    """
    key = jax.random.key(5)
    abstract = jax.eval_shape(make_state, key)
    events = []
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest_step() is None:
            state = lifted.init(make_state, key)
        else:
            state = lifted.place_state(checkpoints.restore(lifted.template(abstract)))
        start = int(state.step)

        def evaluate(state):
            events.append(("evaluate", int(state.step)))
            score = float(-jnp.abs(state.params["w"] - 1).sum())
            return {"score": score if scores is None else scores[int(state.step)]}

        save = checkpoints.save

        def save_and_tell(state, **kwargs):
            events.append(("save", int(state.step)))
            save(state, **kwargs)

        checkpoints.save = save_and_tell
        options = {"evaluate_every": 4, "checkpoint_every": 5, "log_every": 3, **options}
        with (
            training_batches(
                Points(), range(11), batch_size=4, seed=1, prepare=jitter, start_step=start
            ) as batches,
            Logger(
                workdir,
                steps=steps,
                start_step=start,
                evaluated_step=int(state.best["evaluated"]),
                tensorboard=False,
            ) as logger,
        ):
            source = batches
            if change is not None:
                source = (change(start + i, batch) for i, batch in enumerate(batches))
            state = train(
                state,
                lifted=lifted,
                batches=source,
                steps=steps,
                evaluate=evaluate,
                main_score="score",
                checkpoints=checkpoints,
                logger=logger,
                steps_per_epoch=11 / 4,
                stop=stop,
                **options,
            )
    return state, events


def numbers(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, numbers(one), numbers(other))


def lines(workdir):
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "images_per_second", "data_wait", "mfu")
    return [{k: v for k, v in entry.items() if k not in timing} for entry in entries]


def steps_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lifted):
    workdir = tmp_path_factory.mktemp("whole")
    state, events = run(workdir, lifted)
    return state, events, workdir


def test_evaluates_then_saves_and_ends_with_both(whole):
    state, events, workdir = whole
    assert int(state.step) == 20
    assert [s for what, s in events if what == "evaluate"] == [4, 8, 12, 16, 20]
    saved = [s for what, s in events if what == "save"]
    assert set(saved) >= {5, 10, 15, 20} and len(saved) == len(set(saved))
    assert events[-2:] == [("evaluate", 20), ("save", 20)]
    assert steps_of(workdir) == sorted({*sorted(saved)[-2:], int(state.best["step"])})


def test_log_lines(whole):
    entries = lines(whole[2])
    train_steps = [e["step"] for e in entries if e["split"] == "train"]
    assert train_steps == [3, 6, 9, 12, 15, 18, 20]
    assert [e["step"] for e in entries if e["split"] == "val"] == [4, 8, 12, 16, 20]
    assert entries[0].keys() >= {"step", "epoch", "loss", "grad_norm", "learning_rate"}
    raw = [json.loads(line) for line in (whole[2] / "metrics.jsonl").read_text().splitlines()]
    seconds = [e["seconds"] for e in raw]
    assert seconds == sorted(seconds)
    assert raw[0]["images_per_second"] > 0 and 0 <= raw[0]["data_wait"] <= 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [4, 7, 10, 19])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, lifted, whole, at):
    def kill(step, batch):
        if step == at:
            raise Killed
        return batch

    with pytest.raises(Killed):
        run(tmp_path, lifted, change=kill)
    state, _ = run(tmp_path, lifted)
    assert_same(state, whole[0])
    assert lines(tmp_path) == lines(whole[2])
    assert steps_of(tmp_path) == steps_of(whole[2])


@pytest.mark.parametrize("at", [4, 8, 10, 20])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, lifted, whole, at, number):
    def interrupt(step, batch):
        if step == at - 1:
            os.kill(os.getpid(), number)
        return batch

    former = signal.getsignal(number)
    with StopSignal() as stop:
        state, events = run(tmp_path, lifted, change=interrupt, stop=stop)
        assert stop.requested
    assert signal.getsignal(number) is former
    assert int(state.step) == at  # the step under way is finished
    assert events[-1] == ("save", at)
    assert ("evaluate", at) not in events
    # Evaluation of that step is made up for, once, and nothing else is done twice.
    state, later = run(tmp_path, lifted)
    assert_same(state, whole[0])
    assert lines(tmp_path) == lines(whole[2])
    evaluated = [s for what, s in events + later if what == "evaluate"]
    assert evaluated == [4, 8, 12, 16, 20]
    assert steps_of(tmp_path) == steps_of(whole[2])


def test_the_second_signal_acts_at_once():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    try:
        _send_two_signals()
    finally:
        signal.signal(signal.SIGINT, former)


def _send_two_signals():
    with StopSignal() as stop:
        stop.SAME_SECONDS = 60
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # handed on by a parent
        stop.SAME_SECONDS = 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_finished_run_does_nothing_and_may_be_lengthened(tmp_path, lifted):
    first, _ = run(tmp_path, lifted, steps=8)
    again, events = run(tmp_path, lifted, steps=8)
    assert events == []
    assert_same(first, again)
    state, _ = run(tmp_path, lifted, steps=10)
    assert int(state.step) == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_divergence_ends_the_run_before_it_is_saved(tmp_path, lifted, bad):
    def spoil(step, batch):
        if step == 9:  # its metrics would be fetched only after the save at 10
            batch = {**batch, "target": np.full_like(batch["target"], bad)}
        return batch

    with pytest.raises(TrainingDiverged, match=r"at step 10: loss (nan|inf), grad_norm .*learning"):
        run(tmp_path, lifted, change=spoil, log_every=100)
    assert max(steps_of(tmp_path)) < 10
    state, _ = run(tmp_path, lifted)
    assert np.isfinite(state.params["w"]).all()


def test_early_stopping_counts_evaluations_and_survives_a_resume(tmp_path, lifted):
    scores = dict(zip(range(2, 22, 2), [0.1, 0.5, 0.4, np.nan, 0.5, 0.9, 1, 1, 1, 1], strict=True))
    options = {"scores": scores, "evaluate_every": 2, "early_stopping": 3}

    def kill(step, batch):
        if step == 7:
            raise Killed
        return batch

    with pytest.raises(Killed):
        run(tmp_path, lifted, change=kill, checkpoint_every=1, **options)
    state, events = run(tmp_path, lifted, **options)
    assert int(state.step) == 10  # best at 4, then worse, undefined and equal
    assert int(state.best["step"]) == 4
    assert events[-1] == ("save", 10)
    assert {4, 10} < set(steps_of(tmp_path)) and len(steps_of(tmp_path)) == 3
    assert run(tmp_path, lifted, **options)[1] == []  # it stays stopped
    state, _ = run(tmp_path, lifted, **{**options, "early_stopping": 0})
    assert int(state.step) == 20


def test_without_evaluation_or_checkpoints(lifted):
    state = lifted.init(make_state, jax.random.key(0))
    with training_batches(Points(), range(11), batch_size=2, seed=0, prepare=jitter) as batches:
        state = train(state, lifted=lifted, batches=batches, steps=3)
        assert int(state.step) == 3
        with pytest.raises(ValueError, match="dice.*score"):
            train(
                state,
                lifted=lifted,
                batches=batches,
                steps=4,
                evaluate=lambda s: {"score": 1.0},
                main_score="dice",
            )


def test_batches_must_not_end(lifted):
    state = lifted.init(make_state, jax.random.key(0))
    with pytest.raises(ValueError, match="endless"):
        train(state, lifted=lifted, batches=iter([]), steps=3)


def test_log_file_is_rewound_and_holds_no_nan(tmp_path):
    with Logger(tmp_path) as logger:
        logger.log(5, "train", {"loss": 0.5, "rate": float("nan")})
        logger.log(5, "val", {"dice": np.float32(0.5)})
        logger.log(10, "train", {"loss": 0.25})
        logger.log(10, "val", {"dice": 0.75})
        logger.log(15, "train", {"loss": 0.1})
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text().splitlines()[0])["rate"] is None
    with path.open("a") as file:
        file.write('{"step": 7, "spl')  # killed while writing
    assert rewind(path, 10, evaluated_step=5) > 0
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["step"], e["split"]) for e in entries] == [(5, "train"), (5, "val"), (10, "train")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert rewind(tmp_path / "none.jsonl", 0, evaluated_step=0) == 0


def test_bar_and_quiet_logger(tmp_path, capsys):
    with Logger(tmp_path / "a", steps=10, bar=True, tensorboard=False) as logger:
        logger.progress(3)
        logger.log(3, "train", {"loss": 0.5})
    assert "loss 0.5" in capsys.readouterr().out
    with Logger(tmp_path / "b", quiet=True) as logger:
        logger.log(3, "train", {"loss": 0.5})
        logger.progress(4)
        logger.say("nothing")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "b").exists()
