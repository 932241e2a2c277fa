"""Networks: shapes in 2-D and 3-D, depth one, remat, and what they refuse."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.blocks import InstanceNorm, Upsample, depth_to_space, max_pool, per_axis
from jaxmed.models.detector import Detector, level_points
from jaxmed.models.resnet import ResNet, ResNetBackbone
from jaxmed.models.unet import UNet

# Compiles several times faster than the default generator.
KEY = jax.random.key(0, impl="rbg")


def init(model, images, **options):
    return jax.jit(lambda key: model.init(key, images, **options))(KEY)


def test_depth_to_space_puts_each_group_of_channels_at_its_position():
    # One coarse voxel a, whose 4 packed values become the 2 x 2 fine voxels in row order.
    x = jnp.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    fine = depth_to_space(x, (2, 2))
    assert fine.shape == (1, 4, 6, 1)
    np.testing.assert_array_equal(fine[0, 2:4, 4:6, 0].ravel(), x[0, 1, 2])


def test_upsample_equals_a_transposed_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    model = Upsample(6, 2)
    variables = init(model, x)
    kernel = variables["params"]["conv"]["kernel"].reshape(5, 2, 2, 6)
    expected = jnp.einsum("bhwi,ijkc->bhjwkc", x, kernel).reshape(2, 6, 8, 6)
    np.testing.assert_allclose(model.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (5, 6, 9)])
def test_max_pool_equals_that_of_flax(shape):
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    ndim = len(shape)
    expected = nn.max_pool(x, window_shape=(3,) * ndim, strides=(2,) * ndim, padding="SAME")
    np.testing.assert_array_equal(max_pool(x), expected)


def test_instance_norm_keeps_its_precision_far_from_zero():
    x = 1000 + 0.01 * jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    y = InstanceNorm().apply(init(InstanceNorm(), x), x)
    # Float32 itself resolves 1000 to 6e-5, so a spread of .01 is known to a percent.
    np.testing.assert_allclose(np.std(y, (1, 2)), np.sqrt(1e-4 / (1e-4 + 1e-5)), rtol=0.02)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("stem", "side"), [(1, 16), (2, 16), (4, 32)])
def test_resnet_stages_halve_the_image(ndim, stem, side):
    images = jnp.ones((2, *(side,) * ndim, 1))
    backbone = ResNetBackbone(width=4, stem_strides=stem)
    variables = jax.eval_shape(backbone.init, KEY, images)
    features = jax.eval_shape(backbone.apply, variables, images)
    assert [f.shape for f in features] == [
        (2, *(side // stem // 2**i,) * ndim, 4 * 2**i) for i in range(4)
    ]


@pytest.mark.parametrize("variant", ["resnet18", "resnet50"])
def test_resnet_18_and_50_have_the_published_number_of_parameters(variant):
    model = ResNet(1000, ResNetBackbone(variant, stem_strides=4))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    assert count == {"resnet18": 11_689_512, "resnet50": 25_557_032}[variant]


@pytest.mark.parametrize(
    "make",
    [
        lambda remat: ResNet(2, ResNetBackbone(width=4, remat=remat)),
        lambda remat: UNet(2, features=(4, 8), remat=remat),
    ],
)
def test_remat_changes_neither_names_nor_values(make):
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
    variables = init(make(False), images)

    def gradient(model):
        def loss(params):
            given = {**variables, "params": params}
            return (model.apply(given, images, train=True, mutable=["batch_stats"])[0] ** 2).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        gradient(make(False)),
        gradient(make(True)),
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_unet_keeps_the_grid(ndim):
    images = jnp.ones((1, *(16,) * ndim, 2))
    model = UNet(3, features=(4, 8, 8), deep_supervision=True)
    variables = init(model, images)
    assert model.apply(variables, images).shape == (1, *(16,) * ndim, 3)
    levels = model.apply(variables, images, train=True)
    assert [x.shape[1:-1] for x in levels] == [(16,) * ndim, (8,) * ndim]


def test_unet_with_anisotropic_steps():
    images = jnp.ones((1, 16, 16, 3, 1))
    model = UNet(2, features=(4, 8, 8), strides=((2, 2, 1), (2, 2, 1)))
    assert model.apply(init(model, images), images).shape == (1, 16, 16, 3, 2)


def test_unet_names_the_sides_it_needs():
    with pytest.raises(ValueError, match=r"divisible by \(8, 8\); got \(20, 16\)"):
        init(UNet(2), jnp.ones((1, 20, 16, 1)))


def test_bfloat16_keeps_parameters_and_logits_float32():
    images = jnp.ones((1, 16, 16, 1))
    model = UNet(2, features=(4, 8), dtype=jnp.bfloat16)
    variables = init(model, images)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert model.apply(variables, images).dtype == jnp.float32


def test_dropout_acts_in_training_only():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    model = ResNet(2, ResNetBackbone(width=4, norm="group"), dropout=0.5)
    variables = init(model, images)

    def draw(seed):
        return model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(seed)})

    assert not np.allclose(draw(0), draw(1))
    np.testing.assert_array_equal(model.apply(variables, images), model.apply(variables, images))


@pytest.mark.parametrize("ndim", [2, 3])
def test_detector_predicts_at_every_cell(ndim):
    images = jnp.ones((2, *(32,) * ndim, 1))
    model = Detector(3, ResNetBackbone(width=4, stem_strides=2), levels=(1, 2), features=8)
    out = jax.jit(model.apply)(init(model, images), images)
    cells = 8**ndim + 4**ndim
    assert out["logits"].shape == (2, cells, 3)
    assert out["boxes"].shape == (2, cells, 2 * ndim)
    assert out["points"].shape == out["sides"].shape == (cells, ndim)
    low, high = np.split(np.asarray(out["boxes"]), 2, -1)
    assert (low < np.asarray(out["points"])).all()
    assert (high > np.asarray(out["points"])).all()


def test_detector_copes_with_odd_sides():
    images = jnp.ones((1, 30, 41, 1))
    model = Detector(1, ResNetBackbone(width=4, stem_strides=2), levels=(0, 1, 2, 3), features=8)
    out = jax.jit(model.apply)(init(model, images), images)
    assert out["logits"].shape[1] == sum(-(-30 // s) * -(-41 // s) for s in (2, 4, 8, 16))
    assert (np.asarray(out["points"]) < [30, 41]).all()


def test_level_points_are_the_centres_of_cells():
    points, sides = level_points((8, 4), [(4, 2), (2, 1)])
    np.testing.assert_allclose(points[0], [1, 1])
    np.testing.assert_allclose(points[-1], [6, 2])
    np.testing.assert_allclose(np.asarray(sides)[[0, -1]], [[2, 2], [4, 4]])


def test_per_axis_checks_the_number_of_axes():
    assert per_axis(3, 2) == (3, 3)
    with pytest.raises(ValueError, match="2 entries"):
        per_axis((1, 2), 3)


def test_unknown_norm_lists_what_there_is():
    with pytest.raises(ValueError, match="batch, instance, group, none"):
        init(UNet(2, features=(4, 8), norm="layer"), jnp.ones((1, 8, 8, 1)))


NETWORKS = {
    "resnet": lambda ndim: ResNet(3, ResNetBackbone(width=4, stem_strides=4)),
    # A volume of depth one is not shrunk along it.
    "unet": lambda ndim: UNet(3, features=(4, 8, 8), strides=((2, 2, 1)[:ndim],) * 2),
}


def with_depth(flat, deep):
    """Parameters of a 2-D network put into those of its 3-D twin: kernels into the middle plane."""

    def put(own, like):
        if own.shape == like.shape:
            return own
        assert own.ndim == 4 and like.ndim == 5
        planes = [own if i == like.shape[2] // 2 else 0 * own for i in range(like.shape[2])]
        return jnp.stack(planes, 2)

    return jax.tree.map(put, flat, deep)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_volume_of_depth_one_equals_an_image(name):
    images = jax.random.normal(KEY, (2, 32, 32, 1))
    volumes = images[:, :, :, None]
    flat, deep = NETWORKS[name](2), NETWORKS[name](3)
    variables = init(flat, images)
    same = with_depth(variables, jax.eval_shape(deep.init, KEY, volumes))
    expected = jax.jit(flat.apply)(variables, images)
    found = jax.jit(deep.apply)(same, volumes)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "unet", "detector"])
def test_gradients_are_finite_and_reach_every_parameter(name):
    images = jax.random.normal(KEY, (4, 32, 32, 1))
    detector = Detector(3, ResNetBackbone(width=4, stem_strides=2), levels=(1, 2, 3), features=8)
    model = detector if name == "detector" else NETWORKS[name](2)
    variables = init(model, images)

    @jax.jit
    def gradient(params):
        def loss(params):
            given = {**variables, "params": params}
            out, _ = model.apply(given, images, train=True, mutable=["batch_stats"])
            # Weighted at random: what is normalised has a mean that nothing changes.
            leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((x * jax.random.normal(KEY, x.shape)).sum() for x in leaves)

        return jax.grad(loss)(params)

    for path, found in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(found).all() and np.any(found), jax.tree_util.keystr(path)
