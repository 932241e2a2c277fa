"""Faults put into the files of a clean set are found, and clean sets raise no alarm."""

import json

import imageio.v3 as imageio
import nibabel
import numpy as np
import pydicom
import pytest
from image_files import RNG, oblique_affine, save_dicom, save_series

from jaxmed.data.examination import examine
from jaxmed.data.file_examination import examine_files
from jaxmed.data.looks import BROKEN
from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.findings import DataError
from jaxmed.data.sources.msd import Decathlon
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.data.sources.voc import PascalVOC

SHAPE = (9, 10, 11)


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def labels():
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:6, 3:7, 2:9], mask[6, 6, 6] = 1, 2
    return mask


def make_set(root, layout):
    """Four volumes with masks on one oblique grid, as pairs, Decathlon or nnU-Net; their reader."""
    images, masks = ("images", "masks") if layout == "pairs" else ("imagesTr", "labelsTr")
    end = "_0000" if layout == "nnunet" else ""
    for name in "abcd":
        image = RNG.normal(100, 20, SHAPE).astype(np.float32) + 50 * labels()
        save(root / images / f"{name}{end}.nii.gz", image, oblique_affine())
        save(root / masks / f"{name}.nii.gz", labels(), oblique_affine())
    content = {"labels": {"background": 0, "x": 1, "y": 2}, "channel_names": {"0": "MRI"}}
    (root / "dataset.json").write_text(json.dumps(content))
    return (lambda: ImageMaskPairs(root)) if layout == "pairs" else (lambda: Decathlon(root))


def kinds(source):
    rows = range(len(source))
    found = examine(source, {"train": list(rows)}) + examine_files(source, rows)
    return {f.kind: (f.severity, f.cases) for f in found if f.severity != "note"}


LAYOUTS = ["pairs", "decathlon", "nnunet"]
CHANGES = {
    "origin": lambda affine, voxels: affine + np.pad([[voxels * 0.7]], ((0, 3), (3, 0))),
    "spacing": lambda affine, voxels: affine @ np.diag([1, 1, 1 + voxels / 10, 1]),
    "direction": lambda affine, voxels: turned(affine, voxels * 0.7 / 25),
}


def turned(affine, radians):
    """Turned about the z axis by so little that the far corner moves by as many voxels."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]]
    moved = affine.copy()
    moved[:3, :3] = (turn @ affine)[:3, :3]
    return moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", CHANGES)
def test_masks_apart_in_space_are_found_by_how_far_they_are(tmp_path, layout, what):
    read = make_set(tmp_path, layout)
    mask = next(tmp_path.glob("[lm]a[bs]*/b.nii.gz"))
    assert kinds(read()) == {}
    for voxels in (1e-8, 1e-6, 1e-4):
        save(mask, labels(), CHANGES[what](oblique_affine(), voxels))
        assert kinds(read()) == {}
    save(mask, labels(), CHANGES[what](oblique_affine(), 0.03))
    severity, (told,) = kinds(read())["files slightly apart in space"]
    assert severity == "warning" and told.startswith("b: b.nii.gz by 0.0") and what in told
    save(mask, labels(), CHANGES[what](oblique_affine(), 0.7))
    with pytest.raises(DataError, match="b.nii.gz lie up to") as caught:
        read()
    assert what in str(caught.value) and len(caught.value.problems) == 1


def test_a_shape_that_differs_is_told_with_both_files(tmp_path):
    for layout, message in (
        ("pairs", "images/b.nii.gz has shape"),
        ("nnunet", "imagesTr/b_0000.nii.gz"),
    ):
        read = make_set(tmp_path / layout, layout)
        mask = next((tmp_path / layout).glob("[lm]a[bs]*/b.nii.gz"))
        save(mask, labels()[1:], oblique_affine())
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mask: mask + (mask == 2), "labels 0 to 3; expected 0 to 2"),
        (lambda mask: (mask > 0).astype(np.uint8) * 255, "labels 0 to 255; expected 0 to 2"),
        (lambda mask: mask * 0.5, "numbers that are not whole"),
        (lambda mask: np.where(mask == 1, np.nan, mask), "numbers that are not whole"),
    ],
)
def test_labels_that_are_no_classes_name_their_file(tmp_path, layout, change, words):
    read = make_set(tmp_path, layout)
    mask = next(tmp_path.glob("[lm]a[bs]*/c.nii.gz"))
    save(mask, change(labels()), oblique_affine())
    severity, (told,) = kinds(read())[BROKEN]
    assert severity == "error" and words in told and "c" in told.split("/")[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_labels_of_real_numbers_empty_masks_and_gaps(tmp_path, layout):
    read = make_set(tmp_path, layout)
    for name, mask in (("a", labels().astype(np.float64)), ("b", labels() * 0)):
        save(next(tmp_path.glob(f"[lm]a[bs]*/{name}.nii.gz")), mask, oblique_affine())
    assert kinds(read()) == {}  # the first is as good as whole numbers
    found = examine(read(), {"train": [0, 1, 2, 3]})
    assert [f.cases for f in found if f.kind == "mask without foreground"] == [("b",)]
    for name in "abcd":
        only = (labels() > 1).astype(np.uint8) * 2
        save(next(tmp_path.glob(f"[lm]a[bs]*/{name}.nii.gz")), only, oblique_affine())
    assert kinds(read())["class without a case"] == ("warning", ("x in train",))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_saturated_images_are_found(tmp_path, dtype):
    read = make_set(tmp_path, "pairs")
    image = RNG.normal(100, 20, SHAPE)
    save(tmp_path / "images/c.nii.gz", np.minimum(image, 120).astype(dtype), oblique_affine())
    severity, (told,) = kinds(read())["saturated image"]
    assert severity == "warning" and told.startswith("c: 1")


def write_classes(root, **fields):
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            pixels = RNG.integers(0, 4000, (20, 30)).astype(np.int16)
            save_dicom(root / name / f"{name}{i}.dcm", pixels, **fields)
    return root


def test_tags_with_names_are_counted_and_their_values_never_told(tmp_path):
    source = ClassFolders(write_classes(tmp_path, PatientAddress="Secret Street 1"))
    (found,) = examine_files(source, range(6))
    assert found.kind == "identifying DICOM tags" and found.severity == "note"
    expected = {f"{tag} in 6 files" for tag in ("PatientName", "PatientID", "PatientAddress")}
    assert set(found.cases) == expected
    assert "ecret" not in repr(found).replace("SECRET", "secret")
    for path in tmp_path.rglob("*.dcm"):
        data = pydicom.dcmread(path)
        data.PatientIdentityRemoved = "YES"
        data.save_as(path)
    (found,) = examine_files(source, range(6))
    assert found.cases == ("PatientAddress in 6 files",)


def test_text_burnt_into_the_pixels_is_found(tmp_path):
    source = ClassFolders(write_classes(tmp_path, PatientIdentityRemoved="YES"))
    assert examine_files(source, range(6)) == []
    data = pydicom.dcmread(tmp_path / "b/b1.dcm")
    data.BurnedInAnnotation = "YES"
    data.save_as(tmp_path / "b/b1.dcm")
    (found,) = examine_files(source, range(6))
    assert (found.severity, found.cases) == ("warning", ("b1.dcm",))


def test_tags_of_a_series_are_counted_by_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_series(tmp_path / name / "scan", [0, 1, 2])
    source = ClassFolders(tmp_path)
    (found,) = examine_files(source, range(2))
    assert "PatientName in 6 files" in found.cases


def test_sets_without_headers_tell_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        imageio.imwrite(tmp_path / name / "1.png", RNG.integers(0, 256, (9, 9), np.uint8))
    assert examine_files(ClassFolders(tmp_path), range(2)) == []
    assert examine_files(object(), range(2)) == []


def test_clean_real_sets_raise_no_alarm(real_data):
    sources = {
        "msd_hippocampus": Decathlon,
        "nrrd": ImageMaskPairs,
        "dsb2018_nuclei": lambda path: ImageMaskPairs(path, masks="instance"),
        "bccd": lambda path: PascalVOC(path, invalid="drop"),
        "cxr_pneumonia_224": ClassFolders,
    }
    for name, read in sources.items():
        source = read(real_data / name)
        assert examine_files(source, range(len(source))) == [], name


def test_saturation_raises_no_alarm_on_real_sets(real_data):
    for source in (
        Decathlon(real_data / "msd_hippocampus"),
        ImageMaskPairs(real_data / "nrrd"),
        ImageMaskPairs(real_data / "dsb2018_nuclei", masks="instance"),
    ):
        found = examine(source, {"train": list(range(len(source)))})
        assert "saturated image" not in {f.kind for f in found}
