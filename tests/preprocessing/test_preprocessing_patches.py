import numpy as np
import pytest

from jaxmed.preprocessing.patches import find_foreground, pad_boxes, random_patch
from jaxmed.types import UserError


def make_example(*shape):
    """A mask with a large class 1 and a single voxel of class 2."""
    mask = np.zeros(shape, np.int32)
    mask[tuple(slice(0, side // 2) for side in shape)] = 1
    mask[tuple(side - 2 for side in shape)] = 2
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    image[..., 0] += 10 * mask
    ndim = len(shape)
    return {
        "image": image,
        "mask": mask,
        "scale": np.ones(ndim, np.float32),
        "offset": np.zeros(ndim, np.float32),
        "index": np.asarray(7, np.int32),
    }


@pytest.mark.parametrize("shape", [(40, 31), (20, 15, 18)])
def test_a_patch_is_a_part_of_its_image(shape):
    example = make_example(*shape)
    patch_shape = (8,) * len(shape)
    for seed in range(20):
        patch = random_patch(example, shape=patch_shape, rng=np.random.default_rng(seed))
        assert patch["mask"].shape == patch_shape
        start = np.rint(-patch["offset"]).astype(int)
        place = tuple(slice(s, s + 8) for s in start)
        np.testing.assert_array_equal(patch["image"], example["image"][place])
        np.testing.assert_array_equal(patch["mask"], example["mask"][place])
        again = random_patch(example, shape=patch_shape, rng=np.random.default_rng(seed))
        np.testing.assert_array_equal(patch["image"], again["image"])


@pytest.mark.parametrize("precomputed", [False, True])
def test_rare_classes_are_seen_as_often_as_common_ones(precomputed):
    example = make_example(60, 60)
    if precomputed:
        rng = np.random.default_rng(1)
        found = find_foreground(example["mask"], rng=rng, per_class=50)
        positions = found["foreground"]
        np.testing.assert_array_equal(
            found["foreground_number"], example["mask"][tuple(positions.T)]
        )
        assert positions.shape == (51, 2)
        example |= found
    rng = np.random.default_rng(0)
    patches = [random_patch(example, shape=(6, 6), rng=rng, foreground=1.0) for _ in range(200)]
    assert all((p["mask"] > 0).any() for p in patches)
    assert all("foreground" not in p for p in patches)
    assert 0.4 < np.mean([(p["mask"] == 2).any() for p in patches]) < 0.6
    background = [random_patch(example, shape=(6, 6), rng=rng, foreground=0.0) for _ in range(200)]
    assert np.mean([(p["mask"] == 2).any() for p in background]) < 0.1


def test_small_images_are_padded_without_loss():
    patch = random_patch(make_example(5, 30), shape=(9, 16), rng=np.random.default_rng(0))
    assert patch["image"].shape == (9, 16, 1)
    assert (patch["image"][:2] == 0).all()
    assert (patch["mask"][:2] == -1).all()
    assert (patch["mask"][7:] == -1).all()
    assert (patch["mask"][2:7] >= 0).all()


def test_nothing_labelled_is_no_mistake():
    example = {**make_example(20, 20), "mask": np.full((20, 20), -1, np.int32)}
    patch = random_patch(example, shape=(4, 4), rng=np.random.default_rng(0), foreground=1.0)
    assert patch["image"].shape == (4, 4, 1)


def test_patches_around_boxes():
    example = make_example(50, 50)
    del example["mask"]
    example["boxes"] = np.asarray([[40, 40, 44, 44]], np.float32)
    example["box_label"] = np.asarray([0], np.int32)
    rng = np.random.default_rng(0)
    for _ in range(10):
        patch = random_patch(example, shape=(10, 10), rng=rng, foreground=1.0)
        np.testing.assert_array_equal(patch["boxes"], [[3, 3, 7, 7]])
    example["boxes"], example["box_label"] = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    patch = random_patch(example, shape=(10, 10), rng=rng, foreground=1.0)
    assert patch["boxes"].shape == (0, 4)


def test_boxes_are_padded_and_never_dropped():
    example = {
        "boxes": np.ones((2, 4), np.float32),
        "box_label": np.asarray([3, 0], np.int32),
        "index": np.asarray(7, np.int32),
    }
    padded = pad_boxes(example, max_boxes=4)
    np.testing.assert_array_equal(padded["box_label"], [3, 0, -1, -1])
    np.testing.assert_array_equal(padded["boxes"].sum(1), [4, 4, 0, 0])
    with pytest.raises(UserError, match="case 7: 2 boxes, max_boxes is 1"):
        pad_boxes(example, max_boxes=1)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="2 positive sides"):
        random_patch(make_example(8, 8), shape=(4, 4, 4), rng=np.random.default_rng(0))
