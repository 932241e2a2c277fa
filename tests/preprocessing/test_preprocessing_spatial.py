import numpy as np
import pytest
import skimage.transform

from jaxmed.data.images import read_image
from jaxmed.preprocessing.spatial import (
    convert_channels,
    crop_or_pad,
    fit,
    resample,
    resize,
    restore_boxes,
    restore_mask,
    restore_probabilities,
    window,
)
from jaxmed.types import UserError

SHAPES = [(30, 41), (12, 17, 9)]


def make_example(*shape, channels=2, dtype=np.uint8):
    ndim = len(shape)
    rng = np.random.default_rng(0)
    grid = np.moveaxis(np.indices(shape) + 0.5, 0, -1) / shape
    mask = (np.square(grid - 0.45).sum(-1) < 0.09).astype(np.int32)
    mask[tuple(slice(0, max(1, side // 6)) for side in shape)] = 3
    side = np.asarray(shape, np.float32)
    return {
        "image": rng.integers(0, 256, (*shape, channels)).astype(dtype),
        "mask": mask,
        "boxes": np.stack([np.concatenate([side * 0.25, side * 0.75])]).astype(np.float32),
        "box_label": np.asarray([1], np.int32),
        "spacing": np.asarray([0.5, 1.0, 3.0][:ndim], np.float32),
        "shape": np.asarray(shape, np.int32),
        "scale": np.ones(ndim, np.float32),
        "offset": np.zeros(ndim, np.float32),
        "label": np.asarray(2, np.int32),
    }


STEPS = {
    "enlarge": lambda e: resize(e, shape=[2 * n for n in e["image"].shape[:-1]]),
    "reduce": lambda e: resize(e, shape=[round(n / 1.7) for n in e["image"].shape[:-1]]),
    "cubic": lambda e: resize(e, shape=[n + 5 for n in e["image"].shape[:-1]], method="cubic"),
    "resample": lambda e: resample(e, spacing=[0.8] * len(e["spacing"])),
    "fit": lambda e: fit(e, shape=[24] * len(e["spacing"])),
    "pad": lambda e: crop_or_pad(e, shape=[n + 7 for n in e["image"].shape[:-1]]),
    "pad and reduce": lambda e: fit(
        crop_or_pad(e, shape=[n + 3 for n in e["image"].shape[:-1]]),
        shape=[20] * len(e["spacing"]),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_steps_keep_the_example_true(name, shape):
    """Boxes go with the image, scale and offset lead back, spacing keeps the extent in mm."""
    example = make_example(*shape)
    changed = STEPS[name](example)
    assert changed["image"].dtype == np.uint8
    assert changed["mask"].dtype == np.int32
    assert changed["mask"].shape == changed["image"].shape[:-1]
    ndim = len(shape)
    scale, offset = changed["scale"], changed["offset"]
    here = example["boxes"].reshape(-1, 2, ndim) * scale + offset
    np.testing.assert_allclose(changed["boxes"].reshape(-1, 2, ndim), here, atol=1e-4)
    np.testing.assert_allclose(changed["spacing"] * scale, example["spacing"], rtol=1e-5)
    back = restore_boxes(changed["boxes"], scale=scale, offset=offset, shape=shape)
    np.testing.assert_allclose(back, example["boxes"], atol=1e-3)
    assert changed["label"] == 2
    np.testing.assert_array_equal(changed["shape"], shape)


@pytest.mark.parametrize("shape", [(30, 41), (16, 20, 15)])
@pytest.mark.parametrize("name", STEPS)
def test_masks_come_back(name, shape):
    """As a mask and as probabilities, up to what the coarser of the two grids can hold."""
    example = make_example(*shape)
    changed = STEPS[name](example)
    assert set(np.unique(changed["mask"])) <= {-1, 0, 1, 3}
    place = {"scale": changed["scale"], "offset": changed["offset"], "shape": shape}
    mask = np.maximum(changed["mask"], 0)
    probabilities = np.eye(4, dtype=np.float32)[mask]
    for predicted in (mask, probabilities):
        back = restore_mask(predicted, **place)
        assert back.shape == shape
        assert back.dtype == np.int32
        for label in (1, 3):
            one, other = back == label, example["mask"] == label
            overlap = 2 * (one & other).sum() / (one.sum() + other.sum())
            least = {"enlarge": 0.95, "pad": 1.0}.get(name, 0.84 if label == 1 else 0.6)
            assert overlap >= least, (label, overlap)


def test_resize_agrees_with_skimage():
    example = make_example(24, 30, dtype=np.float32)
    image = example["image"]
    enlarged = resize(example, shape=(37, 61))["image"]
    expected = skimage.transform.resize(image, (37, 61), order=1, mode="edge")
    np.testing.assert_allclose(enlarged, expected, atol=1e-2)


def test_reduction_averages_and_keeps_grey_levels():
    step = np.zeros((64, 64, 1), np.uint8)
    step[::2] = 255
    reduced = resize({"image": step}, shape=(16, 16))["image"]
    assert np.abs(reduced[2:-2].astype(int) - 128).max() <= 1
    for value in (0, 77, 255):
        flat = np.full((13, 7, 3, 1), value, np.uint8)
        for shape in ((5, 9, 3), (26, 3, 8)):
            assert (resize({"image": flat}, shape=shape)["image"] == value).all()


def test_a_volume_of_depth_one_is_an_image():
    flat = make_example(20, 30)
    del flat["boxes"], flat["box_label"], flat["spacing"], flat["scale"], flat["offset"]
    deep = {**flat, "image": flat["image"][:, :, None], "mask": flat["mask"][:, :, None]}
    two, three = resize(flat, shape=(13, 40)), resize(deep, shape=(13, 40, 1))
    np.testing.assert_array_equal(three["image"][:, :, 0], two["image"])
    np.testing.assert_array_equal(three["mask"][:, :, 0], two["mask"])


def test_ignored_voxels_stay_ignored():
    mask = np.zeros((20, 20), np.int32)
    mask[:10], mask[:, 15:] = -1, 5
    image = np.zeros((20, 20, 1), np.float32)
    enlarged = resize({"image": image, "mask": mask}, shape=(40, 40))["mask"]
    np.testing.assert_array_equal(enlarged[1:19, :29], -1)
    assert set(np.unique(enlarged)) == {-1, 0, 5}
    reduced = resize({"image": image, "mask": mask}, shape=(10, 20))["mask"]
    np.testing.assert_array_equal(reduced, mask[::2])


def test_padding_is_ignored_and_dark():
    example = {**make_example(6, 8), "image": np.full((6, 8, 1), 9, np.uint8)}
    padded = crop_or_pad(example, shape=(10, 8))
    assert (padded["image"] == 9).all()
    assert (padded["mask"][:2] == -1).all()
    assert (padded["mask"][8:] == -1).all()
    np.testing.assert_array_equal(padded["mask"][2:8], example["mask"])
    assert (crop_or_pad(example, shape=(10, 8), value=3.0)["image"][0] == 3).all()


def test_window_drops_boxes_that_are_cut_away():
    example = make_example(20, 20)
    example["boxes"] = np.asarray([[0, 0, 10, 10], [8, 8, 18, 18]], np.float32)
    example["box_label"] = np.asarray([0, 1], np.int32)
    cut = window(example, start=(9, 9), shape=(11, 11))
    np.testing.assert_array_equal(cut["boxes"], [[0, 0, 9, 9]])
    np.testing.assert_array_equal(cut["box_label"], [1])


def test_window_far_outside_is_all_padding():
    cut = window(make_example(8, 8), start=(20, -9), shape=(5, 6), value=1.0)
    assert cut["image"].shape == (5, 6, 2)
    assert (cut["image"] == 1).all()
    assert (cut["mask"] == -1).all()


def test_what_was_cropped_away_is_background():
    example = make_example(20, 20)
    cropped = crop_or_pad(example, shape=(10, 10))
    ones = np.ones((10, 10), np.int32)
    for predicted in (ones, np.eye(2, dtype=np.float32)[ones]):
        back = restore_mask(
            predicted, scale=cropped["scale"], offset=cropped["offset"], shape=(20, 20)
        )
        assert back.sum() == 100
        assert back[5:15, 5:15].all()


def test_channels():
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb[0, 0], rgb[0, 1] = (255, 255, 255), (0, 255, 0)
    grey = convert_channels({"image": rgb}, channels=1)["image"]
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey[0, :, 0], [255, 150])
    again = convert_channels({"image": grey}, channels=3)["image"]
    assert (again == grey).all()
    assert again.shape == (2, 2, 3)
    with pytest.raises(UserError, match="2 channels"):
        convert_channels({"image": np.zeros((4, 4, 2))}, channels=3)


def test_mistakes_are_named():
    example = make_example(8, 9)
    with pytest.raises(UserError, match="2-D"):
        resize(example, shape=(3, 4, 5))
    with pytest.raises(UserError, match="spacing"):
        resample(example, spacing=(1.0, 0.0))
    with pytest.raises(UserError, match="method is 'nearest'"):
        resize(example, shape=(3, 4), method="nearest")


def test_real_volume_there_and_back(real_data):
    path = sorted((real_data / "msd_hippocampus" / "labelsTr").glob("*.nii*"))[0]
    truth = read_image(path)
    mask = truth.array[..., 0].astype(np.int32)
    example = {
        "image": truth.array.astype(np.float32),
        "mask": mask,
        "spacing": np.ones(3, np.float32),
        "scale": np.ones(3, np.float32),
        "offset": np.zeros(3, np.float32),
    }
    finer = resample(example, spacing=(0.7, 0.8, 0.6))
    back = restore_mask(
        np.eye(3, dtype=np.float32)[finer["mask"]],
        scale=finer["scale"],
        offset=finer["offset"],
        shape=mask.shape,
    )
    assert (back == mask).mean() > 0.999


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.5, 3.0), (1.7, -4.0)])
def test_restored_probabilities_are_those_whose_largest_is_the_restored_mask(scale, offset):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), (24, 20)).astype(np.float32)
    grid = {"scale": np.full(2, scale), "offset": np.full(2, offset), "shape": (21, 30)}
    restored = restore_probabilities(probabilities, **grid)
    assert restored.shape == (21, 30, 3) and restored.dtype == np.float32
    np.testing.assert_array_equal(restored.argmax(-1), restore_mask(probabilities, **grid))
    np.testing.assert_allclose(restored.sum(-1), 1, atol=1e-5)


def test_a_spacing_that_would_take_too_much_memory_is_refused():
    example = make_example(12, 17, 9)
    example["spacing"] = np.full(3, 1000, np.float32)  # metres taken for millimetres
    with pytest.raises(UserError, match=r"would have shape \(12000, 17000, 9000\)"):
        resample(example, spacing=(1, 1, 1))
