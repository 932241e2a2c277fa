"""oneDNN's convolution equals XLA's under every transformation, and steps aside where it should."""

import ctypes
import functools
import os
import subprocess
import sys
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmed.models import convolution_primitive, onednn, onednn_call, onednn_library
from jaxmed.models.convolution import convolution, use_onednn

TARGET = onednn_call.TARGET
pytestmark = pytest.mark.skipif(onednn_library.library() is None, reason="oneDNN is not installed")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def expected(x, kernel, **options):
    with use_onednn(False):
        return convolution(x, kernel, **options)


def both_gradients(function, **options):
    def loss(x, kernel):
        y = function(x, kernel, **options)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + (y**2).mean()

    return jax.value_and_grad(loss, (0, 1))


def assert_close(found, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1 + float(jnp.abs(b).max())))


def count(compiled):
    return compiled.as_text().count(f'custom_call_target="{TARGET}"')


def calls(function, *arguments):
    """How often the program that runs calls oneDNN."""
    return count(jax.jit(function).lower(*arguments).compile())


X, W = normal(0, 8, 9, 8, 8), normal(1, 3, 3, 8, 16)
step = both_gradients(convolution, strides=2)
wanted_step = jax.jit(both_gradients(expected, strides=2))


@pytest.mark.parametrize(("strides", "window"), [(1, 1), (1, 3), (2, 2), (2, 3)])
@pytest.mark.parametrize("spatial", [(9, 8), (7, 6, 5)])
def test_equals_xla_with_both_gradients(spatial, strides, window):
    x, kernel = normal(0, 2, *spatial, 3), normal(1, *(window,) * len(spatial), 3, 5)
    compiled = jax.jit(both_gradients(convolution, strides=strides)).lower(x, kernel).compile()
    assert count(compiled) == 3
    wanted = jax.jit(both_gradients(expected, strides=strides))(x, kernel)
    assert_close(compiled(x, kernel), wanted)


def test_one_axis():
    x, kernel = normal(0, 2, 9, 3), normal(1, 3, 3, 5)
    assert_close(convolution(x, kernel, strides=2), expected(x, kernel, strides=2))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "VALID"},
        {"padding": [(0, 2), (3, 1)], "strides": (1, 2)},
    ],
)
def test_padding_and_uneven_strides(options):
    x, kernel = normal(0, 2, 9, 8, 1), normal(1, 3, 2, 1, 4)
    found = jax.jit(both_gradients(convolution, **options))(x, kernel)
    assert_close(found, jax.jit(both_gradients(expected, **options))(x, kernel))
    wanted = lax.conv_general_dilated(
        x,
        kernel,
        np.broadcast_to(options.get("strides", 1), 2),
        options["padding"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert_close(convolution(x, kernel, **options), wanted)


def test_gradient_that_is_not_wanted_is_not_computed():
    assert calls(jax.grad(lambda k: (convolution(X, k) ** 2).sum()), W) == 2
    assert calls(lambda x, k: step(x, k)[1][1], X, W) == 2
    assert calls(convolution, X, W) == 1


def test_derivatives_of_higher_order_and_forward_mode():
    x, kernel = normal(0, 1, 3, 3, 1), normal(1, 2, 2, 1, 2)

    def bent(function):
        return lambda *arguments: jnp.tanh(function(*arguments) / 10).sum()

    ours, theirs = bent(convolution), bent(expected)
    assert_close(jax.jit(jax.hessian(ours, 1))(x, kernel), jax.hessian(theirs, 1)(x, kernel))
    twice = (jax.jit(jax.jacrev(jax.grad(f), 1)) for f in (ours, theirs))
    assert_close(*(f(x, kernel) for f in twice))
    tangents = (x + 1, kernel - 1)
    primals = (x, kernel)
    assert_close(jax.jvp(ours, primals, tangents), jax.jvp(theirs, primals, tangents))
    linear = jax.linearize(ours, *primals)[1]
    assert_close(linear(*tangents), jax.jvp(theirs, primals, tangents)[1])
    kept = jax.grad(jax.checkpoint(ours), 1)(*primals)
    assert_close(kept, jax.grad(theirs, 1)(*primals))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 3)])
def test_vmap(axes):
    x = X if axes[0] is None else jnp.stack([X, 2 * X], axes[0])
    kernel = W if axes[1] is None else jnp.stack([W, W + 1], axes[1])
    found = jax.jit(jax.vmap(step, axes))(x, kernel)
    assert_close(found, jax.jit(jax.vmap(wanted_step, axes))(x, kernel))


@pytest.mark.parametrize("outer", [((None, 0), (0, None)), ((0, None), (None, 0))])
def test_nested_vmap(outer):
    x, kernel = jnp.stack([X, 2 * X])[:, :2], jnp.stack([W, W + 1, -W])
    found, wanted = (
        jax.jit(jax.vmap(jax.vmap(f, outer[0]), outer[1]))(x, kernel) for f in (step, wanted_step)
    )
    assert_close(found, wanted)


def test_images_that_share_a_kernel_are_one_call():
    vmapped = jax.vmap(lambda x: convolution(x[None], W))
    text = jax.jit(vmapped).lower(X).as_text()
    assert "while" not in text
    assert_close(vmapped(X), jax.vmap(lambda x: expected(x[None], W))(X))


def test_pmap():
    def shares(x, kernel):
        value, (dx, dkernel) = jax.value_and_grad(
            lambda x, k: (convolution(x, k, strides=2) ** 2).sum(), (0, 1)
        )(x, kernel)
        return lax.psum(value, "data"), dx, lax.psum(dkernel, "data")

    run = jax.pmap(shares, axis_name="data", in_axes=(0, None))
    wanted = jax.grad(lambda x, k: (expected(x, k, strides=2) ** 2).sum(), (0, 1))(X, W)
    for _ in range(10):  # devices run at the same time; handles in common gave garbage
        _, dx, dkernel = run(X.reshape(4, 2, *X.shape[1:]), W)
        assert_close((dx.reshape(X.shape), dkernel[0]), wanted)


def mesh_of(*shape):
    names = ("data", "model")[: len(shape)]
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma):
    def shares(x, kernel):
        dx, dkernel = jax.grad(lambda x, k: (convolution(x, k) ** 2).sum(), (0, 1))(x, kernel)
        return dx, dkernel if check_vma else lax.psum(dkernel, "data")

    run = jax.shard_map(
        shares,
        mesh=mesh_of(4),
        in_specs=(P("data"), P()),
        out_specs=(P("data"), P()),
        check_vma=check_vma,
    )
    wanted = jax.grad(lambda x, k: (expected(x, k) ** 2).sum(), (0, 1))(X, W)
    assert_close(jax.jit(run)(X, W), wanted)


def test_jit_over_a_mesh_splits_the_batch():
    mesh = mesh_of(4)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    kernel = jax.device_put(W, NamedSharding(mesh, P()))
    compiled = jax.jit(step).lower(x, kernel).compile()
    value, (dx, dkernel) = compiled(x, kernel)
    assert_close((value, (dx, dkernel)), wanted_step(X, W))
    assert dx.sharding.spec[0] == "data"
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 3
    assert "all-gather" not in text
    assert "f32[2,9,8,8]" in text and "f32[8,9,8,8]" not in text


@pytest.mark.parametrize(
    ("of_x", "of_kernel"),
    [
        (P("data"), P(None, None, None, "model")),
        (P(("data", "model")), P()),
        (P("data", None, "model"), P(None, None, "data")),
        (P(None, None, None, "model"), P()),
    ],
)
def test_jit_over_a_mesh_with_any_sharding(of_x, of_kernel):
    mesh = mesh_of(2, 2)
    x, kernel = (
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in ((X, of_x), (W, of_kernel))
    )
    assert_close(jax.jit(step)(x, kernel), wanted_step(X, W))


def test_jit_under_set_mesh():
    with jax.set_mesh(mesh_of(2, 2)):
        x = jax.device_put(X, P("data"))
        assert_close(jax.jit(step)(x, W), wanted_step(X, W))


def test_explicit_shardings_are_left_to_xla():
    mesh = jax.make_mesh((4,), ("data",))
    x, kernel = (
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in ((X, P("data")), (W, P()))
    )
    assert_close(jax.jit(step)(x, kernel), wanted_step(X, W))


def test_members_over_a_mesh():
    mesh = mesh_of(4)
    x = jax.device_put(jnp.stack([X] * 4), NamedSharding(mesh, P("data")))
    kernel = jax.device_put(jnp.stack([W, W + 1, 2 * W, -W]), NamedSharding(mesh, P("data")))
    assert_close(jax.jit(jax.vmap(step))(x, kernel), jax.jit(jax.vmap(wanted_step))(x, kernel))


def test_threads():
    run = jax.jit(step)
    wanted = wanted_step(X, W)
    with futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: jax.block_until_ready(run(X, W)), range(64)):
            assert_close(found, wanted)


def test_without_jit_and_under_debugging_switches():
    wanted = wanted_step(X, W)
    assert_close(step(X, W), wanted)
    with jax.disable_jit():
        assert_close(step(X, W), wanted)
    with jax.debug_nans(True):
        assert_close(step(X, W), wanted)


def test_switch():
    assert calls(convolution, X, W) == 1
    with use_onednn(False):
        assert calls(lambda x, k: convolution(x, k), X, W) == 0
        with use_onednn(True):
            assert calls(lambda x, k: convolution(x, k), X, W) == 1
        assert "jaxmed" not in str(jax.make_jaxpr(lambda x, k: convolution(x, k))(X, W))


def test_environment_switches_it_off():
    code = (
        "import jax, jax.numpy as jnp; from jaxmed.models.convolution import convolution as c;"
        "print(jax.make_jaxpr(c)(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))))"
    )
    environment = {**os.environ, "JAXMED_ONEDNN": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "conv_general_dilated" in run.stdout and "jaxmed" not in run.stdout


def test_bfloat16_products_are_close():
    full = convolution(X, W)
    with use_onednn(bfloat16=True):
        half = jax.jit(lambda x, k: convolution(x, k))(X, W)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.05 * float(jnp.abs(full).max()))


def test_a_block_leaves_bfloat16_as_it_is_unless_told():
    # Traced only: the geometry says what the product is to be, whatever the CPU can do.
    with use_onednn(bfloat16=True):
        told = str(jax.make_jaxpr(lambda x, k: convolution(x, k))(X, W))
        with use_onednn():
            assert str(jax.make_jaxpr(lambda x, k: convolution(x, k))(X, W)) == told
        with use_onednn(bfloat16=False):
            assert str(jax.make_jaxpr(lambda x, k: convolution(x, k))(X, W)) != told


@pytest.mark.parametrize("strides", [1, 2])
def test_bfloat16_rounds_operands_and_nothing_else(strides):
    x, kernel = normal(0, 2, 16, 16, 16), normal(1, 3, 3, 16, 32)
    cotangent = normal(2, 2, 16 // strides, 16 // strides, 32)

    def products(x, kernel, cotangent):
        y, pullback = jax.vjp(lambda x, k: convolution(x, k, strides=strides), x, kernel)
        return y, *pullback(cotangent)

    def compiled():  # a function of its own, since jit keeps what it traced before
        return jax.jit(lambda *arrays: products(*arrays))

    with use_onednn(bfloat16=True):
        half = compiled()
        is_rounded = "bf16" in half.lower(x, kernel, cotangent).as_text()
        found = half(x, kernel, cotangent)
    if is_rounded:  # nothing is where the CPU has no instructions for it
        x, kernel, cotangent = (
            v.astype(jnp.bfloat16).astype(jnp.float32) for v in (x, kernel, cotangent)
        )
    with use_onednn(False):
        expected = compiled()(x, kernel, cotangent)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


def test_bfloat16_without_instructions_for_it_is_float32(monkeypatch):
    monkeypatch.setattr(onednn.Operation, "implementation", "brgconv:avx512_core")
    x = normal(0, 3, 5, 7, 8)  # of a shape that no other test has asked oneDNN for
    with use_onednn(bfloat16=True):
        lowered = jax.jit(lambda x, k: convolution(x, k)).lower(x, W).as_text()
    assert "bf16" not in lowered and "jaxmed_onednn" in lowered


@pytest.mark.parametrize(
    ("x", "kernel", "options"),
    [
        (X.astype(jnp.bfloat16), W.astype(jnp.bfloat16), {}),
        (X, W, {"dilation": 2}),
        (X, W[:, :, :2], {"groups": 4}),
        (X, normal(0, 3, 3, 1, 8), {"groups": 8}),
        (X, W, {"padding": [(-1, 0), (0, 0)]}),
        (X[:0], W, {}),
    ],
)
def test_what_onednn_does_not_do_is_left_to_xla(x, kernel, options):
    function = functools.partial(convolution, **options)
    assert calls(function, x, kernel) == 0
    found, wanted = function(x, kernel), expected(x, kernel, **options)
    assert found.dtype == x.dtype and found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


def test_exported_programs_and_other_platforms_hold_plain_xla():
    for platforms in (("cpu",), ("cpu", "cuda", "tpu")):
        exported = export.export(jax.jit(step), platforms=platforms)(X, W)
        assert TARGET not in exported.mlir_module()
        assert "stablehlo.convolution" in exported.mlir_module()
        assert_close(exported.call(X, W), wanted_step(X, W))
    lowered = jax.jit(step).trace(X, W).lower(lowering_platforms=("cuda",)).as_text()
    assert TARGET not in lowered and "stablehlo.convolution" in lowered


def test_export_with_a_symbolic_batch():
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype)
    exported = export.export(jax.jit(lambda x: convolution(x, W)))(images)
    assert_close(exported.call(X[:3]), expected(X[:3], W))


def test_errors_inside_a_call_come_out(monkeypatch):
    compiled = jax.jit(convolution).lower(X, W).compile()

    def fail(problem):
        raise onednn.OneDNNError("made to fail")

    monkeypatch.setattr(onednn, "operation", fail)
    with pytest.raises(Exception, match="oneDNN convolution: made to fail"):
        jax.block_until_ready(compiled(X, W))
    monkeypatch.undo()
    assert_close(compiled(X, W), expected(X, W))


def test_a_changed_interface_is_refused(monkeypatch):
    compiled = jax.jit(convolution).lower(X, W).compile()
    size = ctypes.sizeof(onednn_call._Buffer)
    monkeypatch.setattr(onednn_call.ctypes, "sizeof", lambda structure: size + 8)
    with pytest.raises(Exception, match="interface has changed"):
        jax.block_until_ready(compiled(X, W))


def test_a_failed_trial_warns_once_and_falls_back(monkeypatch):
    monkeypatch.setattr(onednn_call, "_ready", None)
    monkeypatch.setattr(onednn_call, "_try_out", lambda reasons: reasons.append("made to fail"))
    with pytest.warns(RuntimeWarning, match="made to fail"):
        found = jax.jit(lambda x, k: convolution(x, k))(X, W)
    assert_close(found, expected(X, W))
    assert calls(lambda x, k: convolution(x, k), X, W) == 0  # no second warning


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(onednn_library, "library", lambda: None)
    assert calls(lambda x, k: convolution(x, k), X, W) == 0


def test_devices_unknown_to_the_primitive_leave_meshes_to_xla(monkeypatch):
    from jax._src import dispatch

    listed = dispatch.prim_requires_devices_during_lowering
    monkeypatch.setattr(
        dispatch,
        "prim_requires_devices_during_lowering",
        listed - {convolution_primitive._product},
    )
    mesh = mesh_of(4)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    function = both_gradients(lambda x, k: convolution(x, k))
    kernel = jax.device_put(W, NamedSharding(mesh, P()))
    assert calls(function, x, kernel) == 0
    assert_close(jax.jit(function)(x, kernel), both_gradients(expected)(X, W))


def test_programs_from_a_cache_run_in_another_process(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp\n"
        "from jaxmed.models.convolution import convolution as c\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))\n"
        "if sys.argv[1] == 'second': c(jnp.ones((1, 5, 5, 1)), jnp.ones((1, 1, 1, 1)))\n"
        "x, k = jax.random.normal(jax.random.key(0), (2, 9, 8, 4)), jnp.ones((3, 3, 4, 8))\n"
        "hits.clear()\n"
        "print(float(jnp.abs(jax.jit(jax.grad(lambda k: (c(x, k) ** 2).sum()))(k)).sum()))\n"
        "print(any('cache_hit' in name for name in hits))\n"
    )
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    outputs = []
    for name, threads in (("first", "1"), ("second", "3")):
        run = subprocess.run(
            [sys.executable, "-c", code, name],
            env={**environment, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(run.stdout.split())
    assert outputs[1][1] == "True", "the program was not found in the cache"
    assert float(outputs[0][0]) == pytest.approx(float(outputs[1][0]), rel=1e-4)


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        (X, W[0], {}, "as many spatial axes"),
        (X, W, {"strides": (1, 2, 3)}, "strides is"),
        (X, W, {"padding": [(0, 0)]}, "padding is"),
    ],
)
def test_mistakes(x, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        convolution(x, kernel, **options)


def test_channels_that_do_not_fit():
    with pytest.raises((TypeError, ValueError)):
        convolution(X, W[:, :, :5])


def test_library_is_found_through_the_distribution(monkeypatch, tmp_path):
    found = onednn_library._find_library()
    monkeypatch.setattr(onednn_library.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(onednn_library.sys, "base_prefix", str(tmp_path))
    assert onednn_library._find_library().samefile(found)
    monkeypatch.setattr(onednn_library, "DISTRIBUTION", "no-such-distribution")
    assert onednn_library._find_library() is None


def test_a_library_that_does_not_load_is_named_in_a_warning(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / onednn_library.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(onednn_library.sys, "prefix", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert onednn_library.library.__wrapped__() is None
    assert "OMP_WAIT_POLICY" not in os.environ
