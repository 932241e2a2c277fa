import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.augmentation import affine, compose, flip, quarter_turns, random_apply
from jaxmed.types import UserError

KEYS = jax.random.split(jax.random.key(0), 8)


def make_example(*shape, seed=0):
    rng = np.random.default_rng(seed)
    low = [side * 0.3 for side in shape]
    high = [side * 0.6 for side in shape]
    return {
        "image": jnp.asarray(rng.normal(size=(*shape, 2)), jnp.float32),
        "mask": jnp.asarray(rng.integers(-1, 3, shape), jnp.int32),
        "boxes": jnp.asarray([[*low, *high], [0] * 2 * len(shape)], jnp.float32),
        "box_label": jnp.asarray([1, -1], jnp.int32),
        "label": jnp.asarray(3, jnp.int32),
    }


def make_ellipse(*shape, kind="ellipse"):
    """An image, a mask and a box of one object."""
    middle = np.asarray(shape) * [0.45, 0.55, 0.5][: len(shape)]
    half = np.asarray(shape) * [0.2, 0.12, 0.16][: len(shape)]
    if kind == "box":
        middle, half = np.rint(middle), np.rint(half)
    grid = np.moveaxis(np.indices(shape) + 0.5, 0, -1)
    distance = np.abs(grid - middle) / half
    mask = (distance < 1).all(-1) if kind == "box" else np.square(distance).sum(-1) < 1
    return {
        "image": jnp.asarray(mask[..., None], jnp.float32),
        "mask": jnp.asarray(mask, jnp.int32),
        "boxes": jnp.asarray([[*(middle - half), *(middle + half)]], jnp.float32),
        "box_label": jnp.asarray([0], jnp.int32),
    }


def bounding_box(mask):
    where = np.argwhere(np.asarray(mask) > 0)
    return np.concatenate([where.min(0), where.max(0) + 1])


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], err_msg=name, **tolerance)


STRONG = {"rotation": 40.0, "scale": (0.7, 1.4), "shear": 0.2, "translation": 0.1}
SHAPES = [(16, 20), (10, 12, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_twice_is_the_identity(shape):
    example = make_example(*shape)
    flipped = flip(probability=1.0)(KEYS[0], example)
    np.testing.assert_array_equal(flipped["image"], jnp.flip(example["image"], range(len(shape))))
    assert_same(flip(probability=1.0)(KEYS[1], flipped), example, atol=1e-5)


def test_flip_leaves_other_axes_alone():
    example = make_example(10, 12, 8)
    flipped = flip(axes=(1,), probability=1.0)(KEYS[0], example)
    np.testing.assert_array_equal(flipped["mask"], example["mask"][:, ::-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_ranges_and_zero_probability_are_the_identity(shape):
    example = make_example(*shape)
    still = compose(affine(), affine(**STRONG, probability=0.0), flip(probability=0.0))
    moved = jax.jit(still)(KEYS[0], example)
    assert_same(moved, example, atol=1e-5)
    np.testing.assert_array_equal(moved["image"], example["image"])


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 6)])
def test_vmap_is_a_loop(shape):
    augment = compose(flip(), affine(**STRONG), quarter_turns())
    example = make_example(*shape)
    batch = jax.tree.map(lambda x: jnp.stack([x] * 4), example)
    together = jax.jit(jax.vmap(augment))(KEYS[:4], batch)
    alone = jax.jit(augment)
    for row in range(4):
        one = jax.tree.map(lambda x, r=row: x[r], together)
        assert_same(one, alone(KEYS[row], example), atol=1e-4)
        assert all(np.isfinite(value).all() for value in one.values())
        np.testing.assert_array_equal(one["boxes"][1], 0)  # padding
        assert one["box_label"][1] == -1
        assert set(np.unique(one["mask"])) <= {-1, 0, 1, 2}
        assert one["label"] == 3


def test_jit_is_eager():
    example = make_example(12, 10)
    for augment in (flip(), affine(**STRONG)):
        assert_same(jax.jit(augment)(KEYS[0], example), augment(KEYS[0], example), atol=1e-4)


@pytest.mark.parametrize("shape", [(48, 40), (28, 24, 26)])
@pytest.mark.parametrize("kind", ["box", "ellipse"])
def test_image_mask_and_boxes_share_one_draw(shape, kind):
    example = make_ellipse(*shape, kind=kind)
    # Turned boxes are no boxes any more: of those, only what keeps the axes is compared.
    options = dict(STRONG, rotation=0.0, shear=0.0) if kind == "box" else STRONG
    augment = jax.jit(compose(flip(), affine(**options)))
    compared = 0
    for key in KEYS:
        moved = augment(key, example)
        image, mask = np.asarray(moved["image"][..., 0]) > 0.5, np.asarray(moved["mask"]) > 0
        assert 2 * (image & mask).sum() > 0.85 * (image.sum() + mask.sum())
        box = np.asarray(moved["boxes"][0])
        if (box[: len(shape)] > 0).all() and (box[len(shape) :] < shape).all():
            # The voxels of an ellipse fall short of its tips.
            tolerance = 1.0 if kind == "box" else 1.5
            np.testing.assert_allclose(box, bounding_box(mask), atol=tolerance)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("shape", [(16, 16), (12, 12, 8)])
def test_quarter_turns(shape):
    example = make_ellipse(*shape, kind="box")
    seen = set()
    turn = jax.jit(quarter_turns())
    for key in jax.random.split(jax.random.key(1), 12):
        moved = turn(key, example)
        turns = [k for k in range(4) if (jnp.rot90(example["mask"], k) == moved["mask"]).all()]
        assert turns
        seen.add(turns[0])
        np.testing.assert_allclose(moved["boxes"][0], bounding_box(moved["mask"]), atol=1e-4)
    assert seen == {0, 1, 2, 3}
    with pytest.raises(UserError, match="square"):
        quarter_turns()(KEYS[0], make_example(8, 10))


@pytest.mark.parametrize("shape", SHAPES)
def test_affine_agrees_with_scipy(shape):
    """The matrix is recovered by moving coordinate images, whose linear sampling is exact."""
    grid = np.moveaxis(np.indices(shape), 0, -1).astype(np.float32)
    image = make_example(*shape)["image"]
    both = jnp.concatenate([grid, image], -1)
    augment = affine(rotation=20.0, scale=(1.3, 1.5), shear=0.1, translation=0.02, fill="edge")
    moved = np.asarray(jax.jit(augment)(KEYS[3], {"image": both})["image"])
    ndim = len(shape)
    core = tuple(slice(side // 3, 2 * side // 3) for side in shape)
    found = moved[core][..., :ndim].reshape(-1, ndim)
    asked = np.concatenate([grid[core].reshape(-1, ndim), np.ones((len(found), 1))], -1)
    fitted = np.linalg.lstsq(asked, found, rcond=None)[0]
    assert np.abs(fitted[:ndim] - np.eye(ndim)).max() > 0.05
    for channel in range(2):
        expected = scipy.ndimage.affine_transform(
            np.asarray(image[..., channel]), fitted[:ndim].T, fitted[ndim], order=1, mode="nearest"
        )
        np.testing.assert_allclose(moved[..., ndim + channel], expected, atol=1e-3)


def test_a_volume_of_depth_one_is_an_image():
    flat = make_example(16, 20)
    del flat["boxes"], flat["box_label"]
    deep = {**flat, "image": flat["image"][:, :, None], "mask": flat["mask"][:, :, None]}
    augment = jax.jit(affine(**STRONG, axes=(0, 1)))
    two, three = augment(KEYS[0], flat), augment(KEYS[0], deep)
    np.testing.assert_allclose(three["image"][:, :, 0], two["image"], atol=1e-4)
    np.testing.assert_array_equal(three["mask"][:, :, 0], two["mask"])


def test_rotation_happens_in_millimetres():
    """A ball in mm stays one: its box keeps its size, though it is an ellipsoid in voxels."""
    sides = jnp.asarray([8.0, 8.0, 2.0])
    box = jnp.concatenate([16 - sides / 2, 16 + sides / 2])[None]
    example = {
        "image": jnp.zeros((32, 32, 32, 1)),
        "boxes": box,
        "box_label": jnp.asarray([0]),
        "spacing": jnp.asarray([1.0, 1.0, 4.0]),
    }
    moved = jax.jit(affine(rotation=90.0))(KEYS[0], example)
    np.testing.assert_allclose(moved["boxes"], box, atol=1e-3)


def test_what_comes_in_from_outside():
    example = {"image": jnp.arange(1.0, 65.0).reshape(8, 8, 1), "mask": jnp.ones((8, 8), "int32")}
    options = {"scale": (0.5, 0.5)}
    least = jax.jit(affine(**options))(KEYS[0], example)
    assert least["image"][0, 0, 0] == 1
    assert least["mask"][0, 0] == 0
    number = jax.jit(affine(**options, fill=-5.0))(KEYS[0], example)
    assert number["image"][0, 0, 0] == -5
    edge = jax.jit(affine(**options, fill="edge"))(KEYS[0], example)
    assert (edge["mask"] == 1).all()
    assert edge["image"][7, 7, 0] == 64


def test_ignored_voxels_are_never_blended():
    mask = jnp.where(jnp.arange(24)[:, None] < 12, -1, 2) * jnp.ones((24, 24), jnp.int32)
    example = {"image": jnp.zeros((24, 24, 1)), "mask": mask}
    augment = jax.jit(affine(**STRONG, fill="edge"))
    for key in KEYS[:4]:
        moved = augment(key, example)
        assert set(np.unique(moved["mask"])) == {-1, 2}


def test_boxes_leave_the_image():
    """A box of the middle and one at the border, enlarged three times."""
    example = {
        "image": jnp.zeros((30, 30, 1)),
        "boxes": jnp.asarray([[13, 13, 17, 17], [0, 0, 4, 4], [0, 0, 12, 12.0]]),
        "box_label": jnp.asarray([0, 1, 2]),
    }
    moved = jax.jit(affine(scale=(3.0, 3.0)))(KEYS[0], example)
    np.testing.assert_array_equal(moved["box_label"], [0, -1, -1])
    np.testing.assert_allclose(moved["boxes"], [[9, 9, 21, 21], [0] * 4, [0] * 4], atol=1e-4)
    kept = jax.jit(affine(scale=(3.0, 3.0), min_visible=0.01))(KEYS[0], example)
    np.testing.assert_allclose(kept["boxes"][2], [0, 0, 6, 6], atol=1e-4)


def test_probability_is_respected_and_draws_are_repeatable():
    def add_one(key, example):
        return {**example, "image": example["image"] + 1}

    keys = jax.random.split(jax.random.key(5), 2000)
    batch = {"image": jnp.zeros((2000, 2, 2, 1)), "label": jnp.arange(2000)}
    changed = jax.vmap(random_apply(add_one, probability=0.3))(keys, batch)
    assert abs(float(changed["image"].mean()) - 0.3) < 0.04
    again = jax.vmap(random_apply(add_one, probability=0.3))(keys, batch)
    assert_same(changed, again)
    with pytest.raises(UserError, match="probability is 2"):
        random_apply(add_one, probability=2.0)


def test_one_more_at_the_end_changes_no_draw():
    seen = []

    def record(key, example):
        seen.append(np.asarray(jax.random.key_data(key)))
        return example

    compose(record, record)(KEYS[0], {})
    compose(record, record, record)(KEYS[0], {})
    np.testing.assert_array_equal(seen[:2], seen[2:4])
    assert len({tuple(key) for key in seen}) == 3


def test_mistakes_are_named():
    with pytest.raises(UserError, match="scale"):
        affine(scale=(1.2, 0.8))
    with pytest.raises(UserError, match="fill is 'mirror'"):
        affine(fill="mirror")
