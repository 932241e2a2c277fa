import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

try:
    import resource
except ImportError:  # not on Windows
    resource = None

from jaxmed.training.checkpoints import (
    Checkpoints,
    best_step,
    finished_steps,
    merge_params,
    restore_variables,
)
from jaxmed.training.optimizers import make_optimizer
from jaxmed.training.sharding import lift, make_mesh, state_shardings
from jaxmed.training.state import best_after, init_state
from jaxmed.types import UserError


def make_state(key, *, classes=4, optimizer="adamw", ema=True, width=8):
    def model_init(key):
        return {
            "params": {"w": jax.random.normal(key, (width, classes)), "b": jnp.zeros(classes)},
            "batch_stats": {"mean": jnp.ones(8)},
        }

    hyper = {"learning_rate": 0.1, "weight_decay": 0.1, "ema_decay": 0.9}
    return init_state(model_init, make_optimizer(optimizer), key=key, hyper=hyper, ema=ema)


def at(state, step, *, score=None):
    """The state as it would be at `step`, evaluated there if there is a score."""
    state = state.replace(
        step=jnp.asarray(step), params={k: v + step for k, v in state.params.items()}
    )
    if score is not None:
        best = best_after(jax.device_get(state.best), score=score, step=step)[0]
        state = state.replace(best=jax.tree.map(jnp.asarray, best))
    return state


def numbers(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, numbers(one), numbers(other))


@pytest.fixture
def state():
    return make_state(jax.random.key(1))


def test_round_trip_is_exact(tmp_path, state):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(at(state, 7), wait=True)
        again = checkpoints.restore(state)
    assert_same(again, at(state, 7))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["7"]


def test_latest_and_best_are_kept(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.6), (4, 0.9), (5, None), (6, None)):
            state = at(state, step, score=score)
            checkpoints.save(state)
        assert checkpoints.best_step() == 2
        assert checkpoints.steps() == [2, 5, 6]
        assert int(checkpoints.restore(state, step="best").step) == 2
        assert int(checkpoints.restore(state).step) == 6
    # A process started anew knows the same, and a save without evaluation displaces nothing.
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 7), wait=True)
        assert checkpoints.steps() == [2, 6, 7]
        assert checkpoints.best_step() == best_step(tmp_path) == 2
        checkpoints.save(at(state, 8, score=1.0), wait=True)
        assert checkpoints.steps() == [7, 8]


def test_saving_a_step_once_more_replaces_it(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 3, score=0.4))
        checkpoints.save(at(state, 5), wait=True)
        checkpoints.save(at(state, 5, score=0.8))
        assert checkpoints.best_step() == 5
    # Killed between the two halves of a replacement: nothing is lost.
    (tmp_path / "5").rename(tmp_path / "5.replaced")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "5"]


def test_going_on_from_an_older_step_keeps_the_newer_aside(tmp_path, state, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        state = at(state, 2, score=0.5)
        checkpoints.save(state)
        checkpoints.save(at(state, 9))
        older = checkpoints.restore(state, step=2)
        checkpoints.save(at(older, 4), wait=True)
        assert checkpoints.steps() == [2, 4]
    assert (tmp_path / "9.superseded").is_dir()
    assert "ahead of this run at step 4" in capsys.readouterr().out


def test_unfinished_checkpoints_are_no_checkpoints(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 2), wait=True)
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(at(state, 5), wait=True)
        assert checkpoints.latest_step() == 5


@pytest.mark.parametrize("mode", ["delete", "truncate", "flip", "lose"])
def test_a_broken_checkpoint_is_passed_over(tmp_path, state, capsys, mode):
    state = at(state, 2, score=0.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.save(at(state, 4), wait=True)
    broken = tmp_path / "4" / "state" / "_METADATA"
    if mode == "delete":
        broken.unlink()
    elif mode == "truncate":
        broken.write_bytes(broken.read_bytes()[:40])
    else:  # in the numbers themselves, which the format does not check
        files = [path for path in (tmp_path / "4").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content if mode == "flip" else b"")
    with Checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore(state)
        assert int(again.step) == 2
        assert "4: the checkpoint cannot be read" in capsys.readouterr().out
        with pytest.raises(UserError, match="4: the checkpoint cannot be read"):
            checkpoints.restore(state, step=4)
        assert checkpoints.best_step() == 2
        assert restore_variables(tmp_path, step=None)[1] == 2


@pytest.mark.parametrize("scores", [(0.1, 0.2, 0.3), (None, None, None)])
def test_the_one_before_is_there_whatever_the_scores(tmp_path, state, capsys, scores):
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in zip((2, 4, 6), scores, strict=True):
            checkpoints.save(at(state, step, score=score), wait=True)
    (tmp_path / "6/state/_METADATA").write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(state).step) == 4
    assert "6: the checkpoint cannot be read" in capsys.readouterr().out


def test_where_the_best_is_gone_the_latest_predicts(tmp_path, state, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        best = at(state, 2, score=0.5)
        checkpoints.save(best)
        checkpoints.save(at(state, 4).replace(best=best.best), wait=True)
    shutil.rmtree(tmp_path / "2")
    assert restore_variables(tmp_path)[1] == 4
    assert "of step 2, is gone; the latest is used" in capsys.readouterr().out


# What orbax leaves half done where its writing thread fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(resource is None, reason="this system has no limits for files")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit for the size of files fails as a full disk does, in the writing thread."""
    large = make_state(jax.random.key(1), width=20_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(large, 2), wait=True)
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, allowed[1]))
        try:
            with pytest.raises(UserError, match=r"larger than is allowed.*make room.*from step 2"):
                checkpoints.save(at(large, 4), wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(large).step) == 2
        checkpoints.save(at(large, 4), wait=True)  # there is room again
        assert checkpoints.latest_step() == 4


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    large = make_state(jax.random.key(1), width=200_000)
    free = types.SimpleNamespace(free=1000)
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(UserError, match=r"has \d+ MiB, 0 MiB .*make room.*begins anew"):
            checkpoints.save(at(large, 2))
        assert not any(tmp_path.iterdir())
        free.free = 2**30
        checkpoints.save(at(large, 2), wait=True)
        free.free = 1000
        with pytest.raises(UserError, match="goes on from step 2"):
            checkpoints.save(at(large, 2))
    assert finished_steps(tmp_path) == [2]


def test_what_systems_leave_in_folders_is_no_damage(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(at(state, step), wait=True)
    (tmp_path / "4/.DS_Store").write_bytes(b"looked at")
    (tmp_path / "04").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert int(checkpoints.restore(state).step) == 4


def test_another_model_is_refused_by_name(tmp_path, state):
    key = jax.random.key(0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoints.restore(state)
        checkpoints.save(state, wait=True)
        with pytest.raises(UserError, match=r"has shape \(4,\), expected \(5,\)"):
            checkpoints.restore(make_state(key, classes=5))
        with pytest.raises(UserError, match="opt_state"):
            checkpoints.restore(make_state(key, optimizer="sgd"))
        with pytest.raises(UserError, match="ema/batch_stats/mean is in the checkpoint, but not"):
            checkpoints.restore(make_state(key, ema=False))
        half = state.replace(params={k: v.astype(jnp.bfloat16) for k, v in state.params.items()})
        with pytest.raises(UserError, match="params/b has type float32, expected bfloat16"):
            checkpoints.restore(half)
        with pytest.raises(UserError, match=r"no checkpoint of step 3; there are \[0\]"):
            checkpoints.restore(state, step=3)


def test_restores_on_other_devices(tmp_path):
    key = jax.random.key(1)
    abstract = jax.eval_shape(make_state, key)

    def lifted(count, mode="jit", fsdp=False):
        mesh = make_mesh(jax.devices()[:count])
        shardings = state_shardings(abstract, mesh, fsdp=fsdp, min_size=1)
        return lift(lambda s, b: (s, b), mesh=mesh, mode=mode, state_shardings=shardings)

    saver = lifted(4, fsdp=True)
    with Checkpoints(tmp_path) as checkpoints:
        state = saver.init(make_state, key)
        state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
        checkpoints.save(state, wait=True)
        for reader in (lifted(1), lifted(2), lifted(4, "pmap"), lifted(4, fsdp=True)):
            again = checkpoints.restore(reader.template(abstract))
            assert_same(again, state)
            assert again.params["w"].sharding.device_set == set(reader.mesh.devices.flat)
            assert_same(reader.global_state(reader.place_state(again)), state)
    found, _ = restore_variables(tmp_path)  # knows nothing of devices
    # The moving average, with the statistics that belong to it.
    np.testing.assert_array_equal(found["params"]["w"], state.ema["params"]["w"])
    assert isinstance(found["params"]["w"], np.ndarray)
    assert found["batch_stats"]["mean"].shape == (8,)


def test_the_step_may_go_on_while_a_state_is_written(tmp_path):
    def init(key):
        return make_state(key, ema=False).replace(
            params={"w": jax.random.normal(key, (1000, 1000))}
        )

    shift = jax.jit(
        lambda s: s.replace(step=s.step + 1, params={"w": s.params["w"] + 1}), donate_argnums=0
    )
    state = jax.jit(init)(jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(3):
            state = shift(state)
            step, expected = int(state.step), np.array(state.params["w"])
            checkpoints.save(state)
            for _ in range(10):
                state = shift(state)
            checkpoints.wait()
            np.testing.assert_array_equal(
                restore_variables(tmp_path, step=step)[0]["params"]["w"], expected
            )


def test_merge_copies_what_fits_and_reports_the_rest():
    old = {"body": {"w": np.ones((2, 2))}, "head": {"w": np.ones((2, 3))}, "gone": np.ones(1)}
    new = {
        "body": {"w": jnp.zeros((2, 2))},
        "head": {"w": jnp.zeros((2, 5))},
        "more": jnp.zeros(3),
    }
    merged, report = merge_params(new, old)
    assert merged["body"]["w"].tolist() == [[1, 1], [1, 1]]
    assert merged["body"]["w"].dtype == np.float32
    assert not np.any(merged["head"]["w"]) and not np.any(merged["more"])
    assert report == {
        "loaded": ["body/w"],
        "reshaped": ["head/w"],
        "missing": ["more"],
        "unused": ["gone"],
    }
