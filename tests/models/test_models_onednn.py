"""oneDNN's calls, away from XLA: they keep to their buffers."""

import itertools

import jax
import numpy as np
import pytest

from jaxmed.models import onednn, onednn_library
from jaxmed.models.convolution import convolution, use_onednn
from jaxmed.models.onednn import KINDS, Problem, operation, result_shape

pytestmark = pytest.mark.skipif(
    onednn_library.library() is None, reason="oneDNN's library is not installed here"
)

MARGIN, FILL = 4096, 0xA5


class Guarded:
    """Some bytes in the middle of others that nobody is to touch."""

    def __init__(self, size):
        self.whole = np.full(size + 2 * MARGIN + 64, FILL, np.uint8)
        self.first = MARGIN - (self.whole.ctypes.data + MARGIN) % -64
        self.inner = self.whole[self.first : self.first + size]

    @property
    def address(self):
        return self.inner.ctypes.data

    def is_kept(self):
        end = self.first + self.inner.size
        return bool((self.whole[: self.first] == FILL).all() and (self.whole[end:] == FILL).all())


def problem_of(kind, batch, spatial, window, stride, cin, cout):
    out = [-(-side // stride) for side in spatial]
    total = [
        max((o - 1) * stride + k - side, 0) for o, k, side in zip(out, window, spatial, strict=True)
    ]
    return Problem(
        kind,
        (batch, *spatial, cin),
        (*window, cin, cout),
        (batch, *out, cout),
        (stride,) * len(spatial),
        tuple((t // 2, t - t // 2) for t in total),
        False,
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_calls_write_nowhere_but_into_their_buffers(ndim):
    rng, tried = np.random.default_rng(0), 0
    sides, channels = (8, 17) if ndim == 2 else (7,), (1, 3, 4, 12, 16)
    for side, k, stride, cin, cout in itertools.product(
        sides, (1, 2, 3), (1, 2), channels, channels
    ):
        for kind in KINDS:
            problem = problem_of(kind, 3, (side,) * ndim, (k,) * ndim, stride, cin, cout)
            if not onednn.supports(problem):
                continue
            of_kind = {
                "forward": (problem.x, problem.w),
                "input": (problem.y, problem.w),
                "kernel": (problem.x, problem.y),
            }
            shapes = (*of_kind[kind], result_shape(problem))
            buffers = [Guarded(4 * int(np.prod(shape))) for shape in shapes]
            buffers.append(Guarded(operation(problem).scratch_bytes))
            for buffer in buffers[:2]:
                values = rng.normal(size=buffer.inner.size // 4).astype(np.float32)
                buffer.inner[:] = values.view(np.uint8)
            before = [buffer.inner.copy() for buffer in buffers[:2]]
            operation(problem)(*(buffer.address for buffer in buffers))
            assert all(buffer.is_kept() for buffer in buffers), problem
            for buffer, old in zip(buffers, before, strict=False):
                np.testing.assert_array_equal(buffer.inner, old)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("spatial", [(9, 8), (5, 6, 7)])
def test_strides_of_a_window_of_one_are_taken_before_the_call(spatial):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, *spatial, 3)).astype(np.float32)
    w = rng.normal(size=(*(1,) * len(spatial), 3, 4)).astype(np.float32)
    strides = (2, 3, 1)[: len(spatial)]

    def loss(x, w):
        return (convolution(x, w, strides=strides) ** 2).sum()

    with use_onednn(False):
        plain = jax.value_and_grad(loss, (0, 1))(x, w)
    fast = jax.value_and_grad(loss, (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, fast)
    assert "jaxmed_convolution" in str(jax.make_jaxpr(loss)(x, w))
    asked = problem_of("kernel", 2, spatial, (1,) * len(spatial), 2, 3, 4)
    assert not onednn.supports(asked)
