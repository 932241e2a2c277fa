"""Images with masks: pairs of files, and the Medical Segmentation Decathlon."""

import json

import imageio.v3 as imageio
import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from jaxmed.data.sources.findings import DataError
from jaxmed.data.sources.msd import Decathlon
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.types import UserError

SHAPE = (6, 8)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii.gz", ".nii")):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    else:
        imageio.imwrite(path, array)
    return path


def stripes(*values, shape=SHAPE, dtype=np.uint8):
    """A mask that holds each value."""
    return np.resize(np.array(values, dtype), shape)


def save_pairs(root, masks, *, images="images", folder="masks", end=".png"):
    for name, mask in masks.items():
        save(root / images / f"{name}.png", np.zeros(mask.shape[:2], np.uint8))
        save(root / folder / f"{name}{end}", mask)


# ---- pairs


@pytest.mark.parametrize(
    ("values", "names", "note"),
    [
        ((0, 255), ("background", "object"), "255 is taken for class 1"),
        ((0, 1), ("background", "object"), "no file names the classes"),
        ((0, 1, 2), ("background", "class_1", "class_2"), "the values 0, 1, 2"),
    ],
)
def test_classes_are_found_in_the_masks_and_said(tmp_path, values, names, note):
    save_pairs(tmp_path, {"a": stripes(*values), "b": stripes(0)})
    source = ImageMaskPairs(tmp_path)
    assert source.info.class_names == names and not source.info.instances
    assert any(note in said for said in source.notes)
    mask = source[0]["mask"]
    assert mask.dtype == np.int32 and mask.shape == SHAPE
    assert np.unique(mask).tolist() == list(range(len(names)))
    crop = source.read(0, (slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(crop["mask"], mask[1:3, 2:5])


def test_masks_of_booleans(tmp_path):
    save_pairs(tmp_path, {"a": stripes(0)})
    Picture.fromarray(stripes(0, 1).astype(bool)).save(tmp_path / "masks" / "a.png")
    source = ImageMaskPairs(tmp_path)
    assert np.unique(source[0]["mask"]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 2, 3), r"values 0, 2, 3 \(2 in a.png, 3 in a.png\): number the classes 0, 1, 2"),
        ((0, 1, 255), "values 0, 1, 255"),
        ((0,), "all masks are empty"),
        (
            tuple(range(100)),
            "numbers up to 99, as of objects: say so with --config.data.masks=instance",
        ),
    ],
)
def test_values_that_are_no_classes_are_refused(tmp_path, values, message):
    save_pairs(tmp_path, {"a": stripes(*values, shape=(10, 12))})
    with pytest.raises(DataError, match=message):
        ImageMaskPairs(tmp_path)


def test_class_names_may_be_given_or_lie_beside(tmp_path):
    save_pairs(tmp_path, {"a": stripes(0, 2, 3), "b": stripes(0, 3)})
    names = ["background", "x", "y", "z"]
    assert ImageMaskPairs(tmp_path, class_names=names).info.class_names == tuple(names)
    (tmp_path / "classes.txt").write_text("Background\nx\n\ny\nz\n")
    assert ImageMaskPairs(tmp_path).info.class_names == tuple(names)
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    with pytest.raises(UserError, match="expected background first"):
        ImageMaskPairs(tmp_path)
    (tmp_path / "classes.txt").unlink()
    labels = {"background": 0, "x": 1, "y": 2, "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    source = ImageMaskPairs(tmp_path)
    assert source.info.class_names == ("background", "x", "y")
    assert np.unique(source[0]["mask"]).tolist() == [-1, 0, 2]
    named = ImageMaskPairs(tmp_path, class_names=["background", "x", "y"])
    np.testing.assert_array_equal(named[0]["mask"], source[0]["mask"])  # 3 stays ignored
    short = ImageMaskPairs(tmp_path, class_names=["background", "x"])
    with pytest.raises(UserError, match="a.png: mask holds labels -1 to 2; expected 0 to 1"):
        short[0]


def test_given_names_and_masks_of_255(tmp_path):
    masks = {f"{i:02d}": stripes(0) for i in range(40)}
    save_pairs(tmp_path, {**masks, "39": stripes(0, 255)})
    source = ImageMaskPairs(tmp_path, class_names=["background", "cell"])
    assert source[39]["mask"].max() == 1 and "255" in source.notes[0]


def test_instance_masks_keep_their_numbers(tmp_path):
    numbers = stripes(0, 7, 40_000, 65_535, dtype=np.uint16)
    save_pairs(tmp_path, {"a": numbers}, end=".tif")
    source = ImageMaskPairs(tmp_path, masks="instance")
    assert source.info.instances and source.info.class_names == ("background", "object")
    assert source[0]["mask"].dtype == np.int32
    np.testing.assert_array_equal(source[0]["mask"], numbers)


def test_colour_masks_are_refused_gray_ones_and_palettes_are_not(tmp_path):
    gray = np.repeat(stripes(0, 1)[..., None], 3, axis=-1)
    save_pairs(tmp_path, {"a": gray, "b": gray})
    assert ImageMaskPairs(tmp_path)[0]["mask"].max() == 1
    picture = Picture.fromarray(stripes(0, 1, 2), mode=None).convert("P")
    picture.putdata(stripes(0, 1, 2).ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "masks" / "b.png")
    assert ImageMaskPairs(tmp_path)[1]["mask"].max() == 2
    colours = gray.copy()
    colours[..., 0] *= 200
    save(tmp_path / "masks" / "b.png", colours)
    with pytest.raises(UserError, match=r"b.png: mask has 3 channels \(colours\)"):
        ImageMaskPairs(tmp_path)[1]


def test_all_that_does_not_pair_is_listed_or_dropped(tmp_path):
    save_pairs(tmp_path, {"good": stripes(0, 1), "small": stripes(0, 1)})
    save(tmp_path / "masks" / "small.png", stripes(0, 1, shape=(5, 8)))
    save(tmp_path / "images" / "alone.png", stripes(0))
    save(tmp_path / "masks" / "lonely.png", stripes(0))
    with pytest.raises(DataError) as caught:
        ImageMaskPairs(tmp_path)
    problems = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "image images/alone.png has no mask" in problems
    assert "mask masks/lonely.png has no image" in problems
    assert "images/small.png has shape (6, 8), its mask masks/small.png (5, 8)" in problems
    source = ImageMaskPairs(tmp_path, invalid="drop")
    assert list(source.ids) == ["good"] and "3 problems" in source.notes[0]


@pytest.mark.parametrize("order", ["{part}/{what}", "{what}/{part}"])
def test_pairs_in_parts(tmp_path, order):
    for part in ("train", "val"):
        images, masks = (
            order.format(part=part, what="images"),
            order.format(part=part, what="masks"),
        )
        save_pairs(tmp_path, {f"{part}1": stripes(0, 1)}, images=images, folder=masks)
    assert ImageMaskPairs(tmp_path).parts == {"train": [0], "val": [1]}


def test_other_names_and_formats_of_pairs(tmp_path):
    volume, mask = np.zeros((4, 5, 6), np.int16), stripes(0, 1, shape=(4, 5, 6))
    save(tmp_path / "a" / "imagesTr" / "x.nii.gz", volume)
    save(tmp_path / "a" / "labelsTr" / "x.nii", mask)
    assert ImageMaskPairs(tmp_path / "a").info.ndim == 3
    save(tmp_path / "b" / "image" / "x.png", stripes(0))
    save(tmp_path / "b" / "label" / "x_mask.png", stripes(0, 1))
    assert list(ImageMaskPairs(tmp_path / "b").ids) == ["x"]
    save(tmp_path / "c" / "x_image.nii.gz", volume)
    save(tmp_path / "c" / "x_label.nii.gz", mask)
    assert list(ImageMaskPairs(tmp_path / "c").ids) == ["x"]
    (tmp_path / "b" / "masks").mkdir()
    with pytest.raises(UserError, match="label and masks; keep one"):
        ImageMaskPairs(tmp_path / "b")
    with pytest.raises(UserError, match="masks is 'both'"):
        ImageMaskPairs(tmp_path / "a", masks="both")


def test_mask_and_image_turn_to_ras_together(tmp_path):
    affine = np.diag([-2.0, -1.0, 3.0, 1.0])
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    save(tmp_path / "images" / "x.nii.gz", values, affine)
    save(tmp_path / "masks" / "x.nii.gz", (values > 50).astype(np.uint8), affine)
    example = ImageMaskPairs(tmp_path)[0]
    np.testing.assert_array_equal(example["image"][..., 0] > 50, example["mask"] == 1)
    np.testing.assert_array_equal(example["image"][..., 0], values[::-1, ::-1])
    assert example["spacing"].tolist() == [2, 1, 3]
    moved = affine.copy()
    moved[0, 3] = 5
    save(tmp_path / "masks" / "x.nii.gz", (values > 50).astype(np.uint8), moved)
    with pytest.raises(DataError, match=r"images/x.nii.gz .* masks/x.nii.gz lie up to 2.5 voxels"):
        ImageMaskPairs(tmp_path)


def test_real_pairs(real_data):
    source = ImageMaskPairs(real_data / "dsb2018_nuclei", masks="instance", kind="fluorescence")
    assert {part: len(rows) for part, rows in source.parts.items()} == {"train": 165, "val": 36}
    assert source.info.channels == 3  # RGBA, of which the constant alpha is no channel
    assert source[0]["mask"].max() == 22  # as its manifest says
    with pytest.raises(UserError, match="--config.data.masks=instance"):
        ImageMaskPairs(real_data / "dsb2018_nuclei")
    source = ImageMaskPairs(real_data / "nrrd")
    assert list(source.ids) == ["brain1", "breast1"]
    assert source[0]["image"].shape == (256, 256, 25, 1)
    np.testing.assert_allclose(source[0]["spacing"], [0.78125, 0.78125, 6.5], rtol=1e-3)


# ---- Decathlon


def save_task(root, *, cases=("a", "b"), channels=1, files=False, **changes):
    volume = np.zeros((4, 5, 6), np.int16)
    for name in cases:
        if files:
            for number in range(channels):
                save(root / "imagesTr" / f"{name}_{number:04d}.nii.gz", volume + number)
        else:
            stack = np.stack([volume + n for n in range(channels)], -1) if channels > 1 else volume
            save(root / "imagesTr" / f"{name}.nii.gz", stack)
        save(root / "labelsTr" / f"{name}.nii.gz", stripes(0, 1, 2, shape=(4, 5, 6)))
    dataset = {
        "name": "Task",
        "modality": {str(number): f"MR{number}" for number in range(channels)},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in cases
        ],
    }
    dataset = {key: value for key, value in {**dataset, **changes}.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(dataset))


def test_decathlon(tmp_path):
    save_task(tmp_path, channels=2, licence="CC BY", numTraining=3)
    (tmp_path / "split.csv").write_text("id,split\na,train\nb,val\n")
    save(tmp_path / "imagesTs" / "c.nii.gz", np.zeros((4, 5, 6), np.int16))
    source = Decathlon(tmp_path)
    assert source.info.class_names == ("background", "front", "back")
    assert source.info.kind == "MR0, MR1" and source.info.licence == "CC BY"
    assert source.parts == {"train": [0], "val": [1]} and list(source.ids) == ["a", "b"]
    assert source[1]["image"].shape == (4, 5, 6, 2) and source[1]["image"][..., 1].min() == 1
    assert any("imagesTs" in note for note in source.notes)
    assert any("states 3" in note for note in source.notes)


def test_nnunet_raw(tmp_path):
    save_task(
        tmp_path,
        channels=2,
        files=True,
        modality=None,
        training=None,
        channel_names={"0": "CT", "1": "PET"},
        labels={"background": 0, "organ": 1, "ignore": 2},
        file_ending=".nii.gz",
    )
    source = Decathlon(tmp_path)
    assert source.info.channels == 2 and source.info.kind == "CT, PET"
    assert source.info.class_names == ("background", "organ")
    example = source[0]
    assert [int(example["image"][..., n].max()) for n in range(2)] == [0, 1]
    assert np.unique(example["mask"]).tolist() == [-1, 0, 1]
    (tmp_path / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="b: has 1 channels, dataset.json names 2"):
        Decathlon(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"0": "background", "2": "x"}}, r"numbers \[0, 2\]; expected 0, 1, 2"),
        ({"labels": {"0": "organ", "1": "x"}}, "expected background first"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions of several"),
        ({"labels": {"background": 0, "x": 1, "y": 1}}, r"numbers \[0, 1, 1\]"),
        ({"labels": None}, "has no labels"),
        ({"modality": None}, "has no modality"),
        ({"modality": {"1": "MR"}}, "channels are numbered 1"),
        ({"modality": {"0": "MR", "1": "CT"}}, "a: has 1 channels.*names 2"),
        ({"training": [{"image": "../a.nii.gz", "label": "b"}]}, "leads out of the folder"),
        ({"training": [{"image": "imagesTr/z.nii.gz", "label": "labelsTr/a.nii.gz"}]}, "no file"),
        ({"training": ["imagesTr/a.nii.gz"]}, "expected image and label"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path, changes, message):
    save_task(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        Decathlon(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_files_of_a_task_that_do_not_fit(tmp_path):
    save_task(tmp_path, training=None)
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    save(tmp_path / "labelsTr" / "c.nii.gz", stripes(0, 1, shape=(4, 5, 6)))
    save(tmp_path / "labelsTr" / "a.nii.gz", stripes(0, 1, shape=(4, 5, 7)))
    with pytest.raises(DataError) as caught:
        Decathlon(tmp_path)
    problems = " ".join(caught.value.problems)
    assert "b.nii.gz has no mask" in problems and "c.nii.gz has no image" in problems
    assert "imagesTr/a.nii.gz and labelsTr/a.nii.gz have the shapes (4, 5, 6) and (4, 5, 7)" in (
        problems
    )
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Decathlon(tmp_path)


def test_a_mask_elsewhere_in_space_is_refused_with_both_names(tmp_path):
    save_task(tmp_path)
    mask = stripes(0, 1, shape=(4, 5, 6))
    save(tmp_path / "labelsTr" / "b.nii.gz", mask, np.diag([1.0, 1.0, 1.1, 1.0]))
    with pytest.raises(DataError, match=r"imagesTr/b.nii.gz and labelsTr/b.nii.gz lie up to 0.5 "):
        Decathlon(tmp_path)
    assert list(Decathlon(tmp_path, invalid="drop").ids) == ["a"]


def test_real_decathlon(real_data):
    source = Decathlon(real_data / "msd_hippocampus")
    assert {part: len(rows) for part, rows in source.parts.items()} == {"train": 200, "val": 30}
    assert source.info.class_names == ("background", "Anterior", "Posterior")
    assert source.info.kind == "MRI" and source.info.channels == 1
    for row in (0, 100, 229):
        example = source[row]
        assert example["mask"].shape == example["image"].shape[:-1]
        assert np.unique(example["mask"]).tolist() == [0, 1, 2]
        assert example["spacing"].tolist() == [1, 1, 1]
