"""The step and its lifting: one device, jit over a mesh, pmap and split parameters agree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.training.optimizers import make_optimizer, make_schedule
from jaxmed.training.sharding import (
    check_batch_size,
    lift,
    make_mesh,
    place_batch,
    state_shardings,
)
from jaxmed.training.state import best_after, evaluation_variables, init_state
from jaxmed.training.step import make_step, update
from jaxmed.types import UserError

HYPER = {"learning_rate": 0.05, "weight_decay": 0.1, "clip_norm": 1.0, "ema_decay": 0.9}


class Net(nn.Module):
    """Convolution, synchronised batch norm, convolution."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.BatchNorm(not train, axis_name=self.axis_name, name="norm")(x)
        return nn.Conv(1, (1, 1), name="head")(nn.relu(x))


class Dice:
    """Batch Dice plus a mean over the valid examples: both need the whole batch."""

    main_score = "dice"

    def loss(self, apply, batch, *, key, total):
        outputs, model_state = apply(batch["image"], key=key)
        p = jax.nn.sigmoid(outputs[..., 0])
        w = batch["valid"][:, None, None]
        both = total((w * p * batch["mask"]).sum())
        either = total((w * (p + batch["mask"])).sum())
        count = jnp.maximum(total(batch["valid"].sum()), 1)
        error = total((w * (p - batch["mask"]) ** 2).sum()) / count
        loss = 1 - 2 * both / either + 0.1 * error
        return loss, {"model_state": model_state, "metrics": {"error": error}}


def flip_and_shift(key, example):
    flip, shift = jax.random.split(key)
    is_flipped = jax.random.bernoulli(flip)
    turned = {k: jnp.where(is_flipped, example[k][::-1], example[k]) for k in ("image", "mask")}
    turned["image"] = turned["image"] + 0.3 * jax.random.normal(shift)
    return {**example, **turned}


def scale(batch):
    return {**batch, "image": batch["image"].astype(jnp.float32) / 255}


def make_batch(step, size=8):
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 255, (size, 6, 6, 1), np.uint8),
        "mask": rng.integers(0, 2, (size, 6, 6)).astype(np.int32),
        "valid": (np.arange(size) < size - 3).astype(np.float32),  # all on the last devices
    }


def run(mode, devices, *, fsdp=False, steps=5, optimizer=None, hyper=None, axis=None):
    optimizer = optimizer or make_optimizer("sgd")
    model = Net(axis_name=axis)
    step = make_step(
        model_apply=model.apply,
        task=Dice(),
        optimizer=optimizer,
        augment=flip_and_shift,
        prepare_batch=scale,
        schedule=make_schedule("cosine", steps=10, warmup_steps=2),
    )

    def make_state(key):
        shown = jnp.zeros((1, 6, 6, 1))
        return init_state(
            lambda k: model.init(k, shown, train=False),
            optimizer,
            key=key,
            hyper=hyper or HYPER,
            ema=True,
        )

    mesh = make_mesh(jax.devices()[:devices])
    key = jax.random.key(7)
    shardings = state_shardings(jax.eval_shape(make_state, key), mesh, fsdp=fsdp, min_size=8)
    lifted = lift(step, mode=mode, mesh=mesh, state_shardings=shardings)
    state = lifted.init(make_state, key)
    history = []
    for number in range(steps):
        state, metrics = lifted.step(state, lifted.place_batch(make_batch(number)))
        history.append(lifted.fetch(metrics))
    return lifted, state, history


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


def arrays(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def one_device():
    lifted, state, history = run("jit", 1)
    return arrays(lifted.global_state(state)), history


@pytest.fixture(scope="module")
def compiled():
    """Names of the programs compiled so far."""
    names = []

    def listen(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


@pytest.mark.parametrize(
    ("mode", "fsdp", "axis"), [("jit", False, None), ("jit", True, None), ("pmap", False, "data")]
)
def test_many_devices_agree_with_one(one_device, compiled, mode, fsdp, axis):
    lifted, state, history = run(mode, 4, fsdp=fsdp, axis=axis)
    after = arrays(lifted.global_state(state))
    assert_close(after, one_device[0])
    for one, other in zip(one_device[1], history, strict=True):
        assert one.keys() == other.keys()
        assert_close(one, other, atol=1e-5)

    if fsdp:
        kernel = state.params["conv"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        assert state.opt_state[2].trace["conv"]["kernel"].sharding == kernel.sharding

    # Placing and the global view are inverse, and cause no second compilation of the step.
    again = lifted.place_state(lifted.global_state(state))
    assert_close(after, arrays(lifted.global_state(again)), atol=0)
    again = lifted.with_best(again, *best_after(after.best, score=0.5, step=1))
    compiled.clear()
    again, _ = lifted.step(again, lifted.place_batch(make_batch(1)))
    assert compiled == []
    # The memory of a state is given away (save where NumPy looks at it, as at the one before).
    lifted.step(again, lifted.place_batch(make_batch(2)))
    assert again.params["conv"]["kernel"].is_deleted()


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_indivisible_batch_is_a_user_error(mode):
    lifted = lift(lambda s, b: (s, b), mode=mode, mesh=make_mesh())
    with pytest.raises(UserError, match="data.batch_size is 6, which 4 devices.*use 4 or 8"):
        lifted.place_batch(make_batch(0, size=6))
    with pytest.raises(UserError, match="use 4,"):
        check_batch_size(3, lifted.mesh)


def test_a_mistyped_mode_is_a_user_error():
    with pytest.raises(UserError, match="sharding.mode"):
        lift(lambda s, b: (s, b), mode="pjit", mesh=make_mesh())
    mesh = make_mesh()
    split = state_shardings(jnp.zeros((8, 8)), mesh, fsdp=True, min_size=1)
    with pytest.raises(UserError, match="sharding.fsdp"):
        lift(lambda s, b: (s, b), mode="pmap", mesh=mesh, state_shardings=split)


def test_place_batch_splits_by_example():
    mesh = make_mesh()
    batch = place_batch(make_batch(0), mesh)
    assert batch["image"].addressable_shards[1].data.shape == (2, 6, 6, 1)
    np.testing.assert_array_equal(batch["image"], make_batch(0)["image"])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_in_the_step_equals_optax(name):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    hyper = {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(0.2)}
    ours = make_optimizer(name)
    mask = {"w": True, "b": False}
    theirs = {
        "adamw": optax.adamw(0.1, weight_decay=0.2, mask=mask),
        "adam": optax.chain(optax.add_decayed_weights(0.2, mask), optax.adam(0.1)),
    }[name]
    state, other = ours(hyper).init(params), theirs.init(params)
    here = there = params
    for number in range(3):
        grads = jax.tree.map(lambda p, n=number: jnp.cos(p * (n + 1)), params)
        updates, state = ours(hyper).update(grads, state, here)
        here = optax.apply_updates(here, updates)
        updates, other = theirs.update(grads, other, there)
        there = optax.apply_updates(there, updates)
    assert_close(here, there)


def test_weight_decay_leaves_biases_and_scales_alone():
    hyper = {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(1.0)}
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "scale": jnp.ones(())}
    for name in ("sgd", "adam", "adamw"):
        optimizer = make_optimizer(name)(hyper)
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        assert float(jnp.abs(updates["w"]).min()) > 0
        assert float(jnp.abs(updates["b"]).max()) == float(updates["scale"]) == 0


def linear_state(optimizer):
    return init_state(
        lambda key: {
            "params": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)},
            "batch_stats": {"mean": jnp.zeros(3)},
        },
        optimizer,
        key=jax.random.key(0),
        hyper=HYPER,
        ema=True,
    )


def ones_like(state):
    return jax.tree.map(jnp.ones_like, state.params)


def test_changing_a_number_compiles_nothing(compiled):
    optimizer = make_optimizer("sgd")
    state = linear_state(optimizer)
    jitted = jax.jit(lambda s: update(s, ones_like(s), optimizer=optimizer, schedule=None))
    jitted(state)
    state = state.replace(hyper={k: v * 2 for k, v in state.hyper.items()})
    compiled.clear()
    assert jitted(state)[1]["learning_rate"] == pytest.approx(0.1)
    assert compiled == []


def test_accumulation_updates_once_with_the_mean_gradient():
    one, two = make_optimizer("sgd"), make_optimizer("sgd", accumulate=2)
    start = linear_state(two)
    grads = ones_like(start)
    first, _ = update(start, grads, optimizer=two, schedule=None)
    assert_close(start.params, first.params, atol=0)
    assert_close(start.ema, first.ema, atol=0)
    triple = jax.tree.map(lambda g: 3 * g, grads)
    second, _ = update(first, triple, optimizer=two, schedule=None)
    double = jax.tree.map(lambda g: 2 * g, grads)
    at_once, _ = update(linear_state(one), double, optimizer=one, schedule=None)
    assert_close(second.params, at_once.params)
    assert_close(second.ema, at_once.ema)


def test_moving_average_follows_the_variables():
    optimizer = make_optimizer("sgd")
    state = linear_state(optimizer).replace(model_state={"batch_stats": {"mean": jnp.ones(3)}})
    new, _ = update(state, ones_like(state), optimizer=optimizer, schedule=None)
    expected = 0.1 * state.params["w"] + 0.9 * new.params["w"]  # decay 1 / 10 at first
    np.testing.assert_allclose(new.ema["params"]["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(new.ema["batch_stats"]["mean"], 0.9, rtol=1e-6)
    late, _ = update(
        new.replace(step=jnp.asarray(1000)), ones_like(new), optimizer=optimizer, schedule=None
    )
    expected = 0.9 * new.ema["params"]["w"] + 0.1 * late.params["w"]  # hyper["ema_decay"]
    np.testing.assert_allclose(late.ema["params"]["w"], expected, rtol=1e-6)
    assert evaluation_variables(new) is new.ema
    plain = evaluation_variables(new.replace(ema={}))
    assert plain["params"] is new.params and plain["batch_stats"] is new.model_state["batch_stats"]


def test_schedules():
    steps = 100
    for name in ("constant", "cosine", "polynomial", "one_cycle"):
        factor = make_schedule(name, steps=steps, warmup_steps=10)
        values = np.asarray([factor(jnp.asarray(s)) for s in range(steps)])
        assert values.min() >= 0
        assert values.max() == pytest.approx(1)
        assert values.argmax() in (9, 10)
        assert np.allclose(np.diff(values[:10]), values[1] - values[0], atol=1e-6)  # linear
        assert (np.diff(values[10:]) <= 1e-7).all()
    assert make_schedule("constant", steps=steps)(99) == 1
    assert make_schedule("polynomial", steps=steps)(50) == pytest.approx(0.5**0.9)
    assert make_schedule("cosine", steps=steps, final=0.1)(100) == pytest.approx(0.1)
    with pytest.raises(UserError, match="optimizer.schedule is 'cosinus'"):
        make_schedule("cosinus", steps=steps)
    with pytest.raises(UserError, match="warmup_steps is 100"):
        make_schedule("cosine", steps=steps, warmup_steps=100)
    with pytest.raises(UserError, match="optimizer.name"):
        make_optimizer("sgdd")


def test_best_is_strictly_better_and_ignores_undefined_scores():
    best = {"score": np.float32(-np.inf), "step": 0, "bad_evaluations": 0, "evaluated": -1}
    best, improved = best_after(best, score=float("nan"), step=1)
    assert not improved and best["bad_evaluations"] == 1
    best, improved = best_after(best, score=0.1, step=2)
    assert improved and best["step"] == 2 and best["bad_evaluations"] == 0
    best, improved = best_after(best, score=0.1, step=3)
    assert not improved and best["step"] == 2 and best["evaluated"] == 3
