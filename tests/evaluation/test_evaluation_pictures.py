import imageio.v3 as imageio
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.evaluation.pictures import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    clip,
    draw_batch,
    draw_case,
    draw_overlay,
    figure_to_png,
)
from jaxmed.evaluation.views import choose_view, window
from jaxmed.types import UserError


def new_axis():
    return Figure(figsize=(3, 3)).subplots()


def rectangles(axis):
    return [patch for patch in axis.patches if isinstance(patch, Rectangle)]


def test_boxes_are_drawn_where_they_are():
    axis = new_axis()
    boxes = np.array([[2, 3, 6, 10], [1, 1, 4, 4], [0, 0, 5, 5]], np.float32)
    draw_case(
        axis,
        np.zeros((20, 30, 1), np.float32),
        boxes=boxes,
        labels=np.array([1, -1, 0]),
        scores=np.array([0.25, 0.9, 0.75]),
        class_names=("$a_1", "b"),
    )
    best, other = rectangles(axis)  # without the padding, the surest first
    assert (other.get_x(), other.get_y()) == (2.5, 1.5)
    assert (other.get_width(), other.get_height()) == (7, 4)
    assert best.get_width() == 5
    assert [text.get_text() for text in axis.texts] == ["$a_1 0.75", "b 0.25"]


def test_truth_and_prediction_differ_in_colour_and_line():
    axis, mask = new_axis(), np.zeros((16, 16), np.int32)
    mask[4:9, 4:9] = 1
    box = np.array([[1, 1, 5, 5]], np.float32)
    image = np.random.default_rng(0).uniform(size=(16, 16, 1))
    draw_case(axis, image, mask=mask, true_mask=mask, boxes=box, true_boxes=box)
    colours = [to_hex(patch.get_edgecolor()).upper() for patch in rectangles(axis)]
    assert colours == [TRUTH_COLOUR, PREDICTION_COLOUR]
    assert len({patch.get_linestyle() for patch in rectangles(axis)}) == 2
    lines = [to_hex(c.get_edgecolor()[0]).upper() for c in axis.collections]
    assert lines == colours


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_ignored_voxels_are_hatched_so_that_it_shows(shade):
    mask = np.zeros((16, 16), np.int32)
    mask[:8] = -1
    image = np.full((16, 16, 1), shade, np.uint8)
    image[0, 0], image[0, 1] = 0, 255  # else of one value, and drawn black
    pictures = []
    for shown in (None, mask):
        figure = Figure(figsize=(2, 2))
        axis = figure.add_axes((0, 0, 1, 1))
        draw_case(axis, image, mask=shown, title="-")
        axis.images[0].set_clim(0, 1)
        axis.images[0].set_data(image[..., 0] / 255)
        pictures.append(imageio.imread(figure_to_png(figure))[..., :3].astype(int))
    changed = np.abs(pictures[1] - pictures[0]).max(-1) > 60
    assert changed[20:75].mean() > 0.05 and not changed[100:150].any()


def test_outline_runs_along_the_border_of_the_mask():
    axis, mask = new_axis(), np.zeros((12, 14), np.int32)
    mask[3:7, 5:9] = 2
    draw_case(axis, np.zeros((12, 14, 1), np.uint8), mask=mask)
    points = np.concatenate([p.vertices for c in axis.collections for p in c.get_paths()])
    np.testing.assert_allclose(points.min(0), [4.5, 2.5])
    np.testing.assert_allclose(points.max(0), [8.5, 6.5])


@pytest.mark.parametrize("value", [0, 1, -1, 7])
def test_masks_of_one_value_are_no_trouble(value):
    draw_case(new_axis(), np.zeros((9, 9, 3), np.uint8), mask=np.full((9, 9), value, np.int32))


def test_slice_with_the_largest_truth_is_shown():
    mask, other = np.zeros((6, 7, 9), np.int32), np.zeros((6, 7, 9), np.int32)
    mask[:2, :2, 3], mask[:4, :4, 5] = 1, 2
    other[:, :, 8] = 1
    assert choose_view((6, 7, 9), (mask, other), ()).slice == 5
    assert choose_view((6, 7, 9), (np.zeros_like(mask), other), ()).slice == 8
    boxes = np.array([[0, 0, 6, 2, 2, 8], [0, 0, 1, 5, 5, 2]], np.float32)
    assert choose_view((6, 7, 9), (None,), (boxes,)).slice == 1
    assert choose_view((6, 7, 9), (), ()).slice == 4
    assert choose_view((6, 7), (), ()).slice is None


def test_volume_is_seen_front_up_and_right_side_left():
    volume = np.zeros((6, 7, 9), np.int32)
    volume[5, 6, 4] = 1  # most right, most to the front
    view = choose_view(volume.shape, (volume,), ())
    assert view.cut(volume).shape == (7, 6)
    assert view.cut(volume)[0, 0] == 1
    box = np.array([5, 6, 4, 6, 7, 5], np.float32)
    assert view.rectangle(box) == (0, 0, 1, 1)
    assert view.rectangle(box + [0, 0, 1, 0, 0, 1]) is None
    # A pixel is as wide as x and as high as y.
    assert view.aspect(np.array([0.5, 2.0, 3.0])) == 4.0


def test_any_slice_of_a_volume_can_be_drawn():
    volume = np.zeros((6, 7, 9, 1), np.float32)
    volume[5, 6, 4] = 1
    mask = (volume[..., 0] > 0).astype(np.int32)
    axes = [new_axis() for _ in range(2)]
    for axis, at in zip(axes, (4, 0), strict=True):
        draw_case(axis, volume, mask=mask, at=at)
        assert f"slice {at + 1} of 9" in axis.get_title()
    bright, dark = (axis.images[0].get_array() for axis in axes)
    assert bright[0, 0] == 1 and not dark.any()
    assert len(axes[0].collections) == 1 and not axes[1].collections


@pytest.mark.parametrize("shape, at", [((6, 7, 9), 9), ((6, 7, 9), -1), ((6, 7), 0)])
def test_slices_that_there_are_not_are_refused(shape, at):
    with pytest.raises(UserError, match=f"at is {at}"):
        draw_case(new_axis(), np.zeros((*shape, 1), np.float32), at=at)


@pytest.mark.parametrize("channels, shape", [(1, (8, 8)), (3, (8, 8, 3)), (4, (8, 8)), (2, (8, 8))])
def test_window_takes_any_numbers(channels, shape):
    image = np.random.default_rng(0).normal(0, 300, (8, 8, channels)).astype(np.float32)
    image[0, 0] = np.nan
    seen = window(image)
    assert seen.shape == shape and seen.min() == 0 and seen.max() == 1
    assert window(np.full((4, 4, 1), np.inf)).max() == 0
    assert not window(np.full((4, 4, 1), 5, np.int16)).any()


def test_titles_are_clipped_and_not_read_as_formulas():
    assert clip("a\nb  c") == "a b c"
    assert clip("x" * 100, 11) == "xxxxx…xxxxx"
    axis = new_axis()
    draw_case(axis, np.zeros((8, 8, 1), np.uint8), title="$\\frac{" + "x" * 90)
    assert len(axis.get_title()) == 40
    assert figure_to_png(axis.figure)


def batch_of(task, **options):
    source = Phantoms("body" if options.get("ndim") == 3 else "cells", task=task, **options)
    examples = [source[row] for row in range(3)]
    for example in examples:
        example["image"] = (example["image"].astype(np.float32) - 60) / 40
        if "boxes" in example:
            free = 30 - len(example["boxes"])
            example["boxes"] = np.pad(example["boxes"], ((0, free), (0, 0)))
            example["box_label"] = np.pad(example["box_label"], (0, free), constant_values=-1)
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    return batch, source.info.class_names


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
@pytest.mark.parametrize("options", [{}, {"ndim": 3, "size": 20}])
def test_batches_are_drawn(tmp_path, task, options):
    batch, names = batch_of(task, **options)
    if "mask" in batch:
        batch["mask"][:, :4] = -1
    path = draw_batch(batch, names, tmp_path / "new" / "batch.png", max_examples=2)
    picture = imageio.imread(path)
    assert picture.ndim == 3 and picture.std() > 10


def test_batch_leaves_out_padding_and_knows_all_labels(tmp_path):
    batch, names = batch_of("classification")
    all_of_them = imageio.imread(draw_batch(batch, names, tmp_path / "a.png"))
    batch["valid"][1:] = 0
    one = imageio.imread(draw_batch(batch, names, tmp_path / "b.png"))
    assert one.shape[1] < all_of_them.shape[1]
    batch["valid"][:] = 0
    draw_batch(batch, names, tmp_path / "c.png")
    batch["valid"][:] = 1
    for label in (np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1]]), np.full((3, 3), 1 / 3, np.float32)):
        draw_batch({**batch, "label": label}, names, tmp_path / "d.png")


def test_overlays_are_drawn(tmp_path):
    example = Phantoms("body", instances=True)[0]
    path = tmp_path / "a.png"
    draw_overlay(path, example["image"], mask=example["mask"], class_names=("background", "lesion"))
    alone = imageio.imread(path)
    draw_overlay(path, example["image"], mask=example["mask"], true_mask=example["mask"])
    assert (imageio.imread(path) != alone).any()


def test_predictions_are_tinted_where_their_mask_lies_and_truth_is_not():
    mask = np.zeros((12, 14), np.int32)
    mask[3:7, 5:9] = 1
    for given, tinted in (({"mask": mask}, True), ({"true_mask": mask}, False)):
        axis = new_axis()
        draw_case(axis, np.zeros((12, 14, 1), np.uint8), **given)
        tints = axis.images[1:]
        assert len(tints) == tinted
        for tint in tints:
            alpha = np.asarray(tint.get_array())[1:-1, 1:-1, 3]  # without its frame
            np.testing.assert_array_equal(alpha > 0, mask > 0)
            assert tint.get_extent() == [-1.5, 14.5, 12.5, -1.5]
        assert axis.get_xlim() == (-0.5, 13.5)
