"""Class folders, MedMNIST files, the manifest, and what all sources share."""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as imageio
import nibabel
import numpy as np
import pytest

from jaxmed.data.manifest import safe_path
from jaxmed.data.sources import medmnist
from jaxmed.data.sources.base import crop_example, make_example, merged_patients
from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.download import fetch
from jaxmed.data.sources.findings import SHOWN_PROBLEMS, DataError, Findings
from jaxmed.data.sources.layouts import guess_layout
from jaxmed.data.sources.medmnist import MedMNIST
from jaxmed.data.sources.medmnist_sets import MEDMNIST_SETS
from jaxmed.types import UserError


def write_image(path, value=7, shape=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.int16), np.eye(4)), path)
    else:
        imageio.imwrite(path, np.full(shape, value, np.uint8))
    return path


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ---- what all sources share


def test_a_crop_moves_offset_mask_and_boxes():
    image = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8, 1)
    example = make_example(image, index=3)
    example["mask"] = image[..., 0].astype(np.int32)
    example["boxes"] = np.array([[0, 0, 3, 4], [4, 6, 6, 8]], np.float32)
    example["box_label"] = np.array([1, 0], np.int32)
    crop = crop_example(example, (slice(1, 4), slice(2, None)))
    np.testing.assert_array_equal(crop["image"], image[1:4, 2:])
    np.testing.assert_array_equal(crop["mask"], image[1:4, 2:, 0])
    np.testing.assert_array_equal(crop["boxes"], [[0, 0, 2, 2]])
    np.testing.assert_array_equal(crop["box_label"], [1])
    # A position in the file, times scale, plus offset, is the position in the crop.
    np.testing.assert_array_equal(np.array([1, 2]) * crop["scale"] + crop["offset"], [0, 0])
    np.testing.assert_array_equal(crop["shape"], [6, 8])


@pytest.mark.parametrize(
    "region", [(slice(2, 2), slice(0, 3)), (slice(0, 2),), (slice(0, 4, 2),) * 2]
)
def test_an_impossible_region_is_refused(region):
    with pytest.raises(ValueError, match="region"):
        crop_example(make_example(np.zeros((6, 8, 1), np.uint8), index=0), region)


def test_many_problems_are_told_a_line_each_and_all_are_kept():
    findings = Findings(Path("set"), invalid=[f"box {i}" for i in range(50)])
    with pytest.raises(DataError, match="50 problems\n(box .*\n){10}and 40 more\n") as caught:
        findings.finish()
    assert len(caught.value.problems) == 50 and SHOWN_PROBLEMS == 10
    copy = pickle.loads(pickle.dumps(caught.value))  # worker processes send it so
    assert copy.problems == caught.value.problems and str(copy) == str(caught.value)
    findings.finish(policy="drop")
    assert "Left out because of 50 problems" in findings.notes[0]
    with pytest.raises(UserError, match="'error' or 'drop'"):
        findings.finish(policy="ignore")


def test_read_in_threads_pickled_and_with_negative_rows(tmp_path):
    for row in range(12):
        write_image(tmp_path / "ab"[row % 2] / f"{row}.png", value=row)
    source = ClassFolders(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        values = [int(e["image"][0, 0, 0]) for e in pool.map(source.__getitem__, range(12))]
    assert [str(value) for value in values] == list(source.ids)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[-1]["image"], source[11]["image"])
    assert source[-1]["index"] == 11
    with pytest.raises(IndexError):
        source[12]


# ---- class folders


def test_class_folders_without_parts(tmp_path):
    write_image(tmp_path / "sick" / "deep" / "a.png")
    write_image(tmp_path / "sick" / "b.png")
    write_image(tmp_path / "healthy" / "c.png")
    source = ClassFolders(tmp_path, kind="X-ray")
    assert source.info.class_names == ("healthy", "sick")
    assert source.info.kind == "X-ray" and source.info.task == "classification"
    assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 1]
    assert source.parts == {} and source.patients is None
    assert source[0]["label"].dtype == np.int32 and source[0]["label"].shape == ()
    cut = source.read(0, (slice(0, 2), slice(3, 8)))
    assert cut["image"].shape == (2, 5, 1) and cut["shape"].tolist() == [6, 8]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "testing")])
def test_class_folders_with_parts(tmp_path, names):
    for part in names:
        for label in "ab":
            write_image(tmp_path / part / label / f"{label}.png")
    source = ClassFolders(tmp_path)
    assert {part: len(rows) for part, rows in source.parts.items()} == {
        "train": 2,
        "val": 2,
        "test": 2,
    }
    # Stems clash, so that the path is the name.
    assert f"{names[0]}/a/a.png" in source.ids and len(set(source.ids)) == 6


def test_class_folders_of_volumes(tmp_path):
    for label in "ab":
        write_image(tmp_path / label / f"{label}1.nii.gz", shape=(4, 5, 6))
    source = ClassFolders(tmp_path)
    assert source.info.ndim == 3 and source[0]["image"].shape == (4, 5, 6, 1)
    assert list(source.ids) == ["a1", "b1"]


def test_the_manifest_has_the_last_word(tmp_path):
    for name in ("train/a/1", "train/a/2", "val/b/3", "train/b/4"):
        write_image(tmp_path / f"{name}.png")
    write_text(
        tmp_path / "manifest.csv",
        "file;split;label;subtype;patient;age\n"
        "train/a/1.png;train;a;x;p1;3\ntrain\\a\\2.png;val;b;y;p1;3\n"
        "./val/b/3.png;;;x;;\ntrain/b/4.png;;b;y;p2;\n",
    )
    source = ClassFolders(tmp_path)
    by_id = {name: row for row, name in enumerate(source.ids)}
    assert [int(source[by_id[name]]["label"]) for name in "1234"] == [0, 1, 1, 1]
    assert sorted(source.parts["val"]) == sorted([by_id["2"], by_id["3"]])
    assert [source.patients[by_id[name]] for name in "1234"] == ["p1", "p1", "3", "p2"]
    notes = " ".join(source.notes)
    assert "1 images in another part" in notes
    assert "p1" not in notes  # which people share
    assert "1 cases have no patient" in notes
    assert ClassFolders(tmp_path, label_column="subtype").info.class_names == ("x", "y")
    with pytest.raises(UserError, match="'grade'"):
        ClassFolders(tmp_path, label_column="grade")


def test_labels_from_the_manifest_alone(tmp_path):
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.png")
    write_text(tmp_path / "manifest.csv", "id,label\na,x\nb,y\nc,x\n")
    write_text(tmp_path / "split.csv", "id,split\na,train\nb,train\nc,test\n")
    source = ClassFolders(tmp_path)
    assert source.info.class_names == ("x", "y")
    assert source.parts == {"train": [0, 1], "test": [2]}
    write_text(tmp_path / "manifest.csv", "id,label\na,x\nb,y\n")
    with pytest.raises(DataError, match="images/c.png has no label"):
        ClassFolders(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,split\na/1.png,train\na/9.png,val\n", "row 3: no image is called 'a/9.png'"),
        ("id,split\n1,train\n1,val\n", "row 3: '1' is already in row 2"),
        ("id,split\n1,fold3\n", "split is 'fold3', expected train, val, test"),
        ("id,split\nsame,train\n", "2 images are called 'same'"),
        ("file,split\n../secret.png,train\n", "leads out of the folder"),
        ("file,split\n/etc/passwd,train\n", "leads out of the folder"),
        ("name,split\n1,train\n", "columns name, split; expected one called file"),
        ("id,split,split\n1,train,val\n", "names split more than once"),
        ("id,split\n1,train,x\n", "row 2 has 3 cells, the header 2"),
        ("", "empty file"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, table, message):
    for name in ("a/1", "a/same", "b/same"):
        write_image(tmp_path / f"{name}.png")
    write_text(tmp_path / "manifest.csv", table)
    with pytest.raises(UserError, match=message) as caught:
        ClassFolders(tmp_path)
    assert "\n" not in str(caught.value)


def test_all_rows_that_match_nothing_are_listed(tmp_path):
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "2.png")
    write_text(tmp_path / "split.csv", "id,split\n" + "".join(f"x{i},train\n" for i in range(30)))
    with pytest.raises(DataError) as caught:
        ClassFolders(tmp_path)
    assert len(caught.value.problems) == 30


def test_a_manifest_of_other_columns_is_ignored_and_said(tmp_path):
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "2.png")
    write_text(tmp_path / "manifest.csv", "file,age\nelsewhere.png,3\n")
    assert "tells none of these" in ClassFolders(tmp_path).notes[0]


@pytest.mark.parametrize("path", ["../a", "/a", "C:\\a", "a/../../b", "\\\\host\\a"])
def test_paths_out_of_the_folder_are_refused(path):
    with pytest.raises(UserError, match="leads out"):
        safe_path(path, where="table")


def test_class_folders_that_cannot_be_right(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ClassFolders(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty folder"):
        ClassFolders(tmp_path / "empty")
    file = write_image(tmp_path / "one" / "a" / "1.png")
    with pytest.raises(UserError, match="is a file"):
        ClassFolders(file)
    with pytest.raises(DataError, match="only one class"):
        ClassFolders(tmp_path / "one")
    write_image(tmp_path / "loose" / "1.png")
    with pytest.raises(UserError, match="needs CLASS/.*found 1.png"):
        ClassFolders(tmp_path / "loose")
    for name in ("train/a/1", "train/b/2", "val/A/3"):
        write_image(tmp_path / "case" / f"{name}.png")
    with pytest.raises(DataError, match="classes A have no training images"):
        ClassFolders(tmp_path / "case")
    for name in ("train/a/1", "train/b/2", "a/3"):
        write_image(tmp_path / "mixed" / f"{name}.png")
    with pytest.raises(DataError, match="folders a lie beside"):
        ClassFolders(tmp_path / "mixed")
    with pytest.raises(DataError, match="unknown classes b"):
        ClassFolders(tmp_path / "case" / "train", class_names=["a", "c"])
    assert ClassFolders(tmp_path / "case" / "train", class_names="bac").info.class_names == tuple(
        "bac"
    )


def test_patients_of_the_files_fill_what_the_manifest_leaves_open():
    given = ["X", "", "", "", "", ""]
    stated = ["p1", "p1", "p2", "p2", "", ""]
    assert merged_patients(given, stated) == ["X", "X", "p2", "p2", "", ""]


def test_an_image_of_other_channels_is_named_when_read(tmp_path):
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "2.png", shape=(6, 8, 3))
    source = ClassFolders(tmp_path)
    with pytest.raises(UserError, match="2.png: image has 3 channels"):
        source[1]
    assert ClassFolders(tmp_path, channels=3)[0]["image"].shape == (6, 8, 3)
    write_image(tmp_path / "b" / "3.png", shape=(6, 8, 3))
    assert ClassFolders(tmp_path).info.channels == 3  # as most are, not as the first is


def test_a_rare_class_of_nearly_another_name_is_asked_about(tmp_path):
    for number in range(30):
        write_image(tmp_path / "PNEUMONIA" / f"{number}.png")
        write_image(tmp_path / "NORMAL" / f"n{number}.png")
    write_image(tmp_path / "PNEUMONA" / "x.png")
    [note] = [note for note in ClassFolders(tmp_path).notes if "meant" in note]
    assert note == "Only 1 image of the class 'PNEUMONA': is 'PNEUMONIA' meant?"


def test_real_class_folders(real_data):
    source = ClassFolders(real_data / "cxr_pneumonia_224")
    assert {part: len(rows) for part, rows in source.parts.items()} == {"train": 1001, "val": 200}
    assert source.info.class_names == ("NORMAL", "PNEUMONIA")
    assert len(set(source.patients)) < len(source) == 1201
    of_part = {part: {source.patients[row] for row in rows} for part, rows in source.parts.items()}
    assert not of_part["train"] & of_part["val"]
    assert source[5]["image"].shape == (224, 224, 3)
    subtypes = ClassFolders(real_data / "cxr_pneumonia_224", label_column="subtype")
    assert len(subtypes.info.class_names) == 3


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bccd", "Pascal VOC"),
        ("dsb2018_nuclei", "images and masks"),
        ("msd_hippocampus", "Medical Segmentation Decathlon"),
        ("pneumoniamnist", "MedMNIST"),
    ],
)
def test_another_layout_is_recognised(real_data, name, layout):
    assert guess_layout(real_data / name) == layout
    with pytest.raises(UserError, match=f"looks like {layout}: use"):
        ClassFolders(real_data / name)
    with pytest.raises(UserError, match="it holds data sets|did you mean"):
        ClassFolders(real_data)


# ---- MedMNIST


def write_npz(path, *, shape=(5, 28, 28), labels=None, dtype=np.uint8, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 255, shape).astype(dtype)
        default = np.arange(shape[0])[:, None] % 2
        arrays[f"{part}_labels"] = default if labels is None else labels
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    np.savez_compressed(path, **arrays)
    return arrays


def test_all_sets_of_medmnist_are_known():
    assert len(MEDMNIST_SETS) == 18
    assert sum(known.ndim == 3 for known in MEDMNIST_SETS.values()) == 6
    assert [name for name, known in MEDMNIST_SETS.items() if known.multilabel] == ["chestmnist"]
    assert all(len(known.md5) == 32 for known in MEDMNIST_SETS.values())
    assert all(len(known.class_names) >= 2 for known in MEDMNIST_SETS.values())


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 1, 0]), np.array([[0], [1], [2], [1], [0]])])
def test_labels_with_or_without_a_second_axis(tmp_path, labels):
    arrays = write_npz(tmp_path / "own.npz", labels=labels, dtype=np.uint16)
    source = MedMNIST(tmp_path)
    assert source.info.class_names == ("0", "1", "2") and not source.info.multilabel
    assert source.parts == {"train": [*range(5)], "val": [*range(5, 10)], "test": [*range(10, 15)]}
    assert source[7]["label"] == 2 and source[7]["label"].shape == ()
    assert source[7]["image"].dtype == np.float32  # uint16 does not fit int16
    np.testing.assert_array_equal(source[7]["image"][..., 0], arrays["val_images"][2])
    assert source.ids[5] == "val_00000"


def test_multilabel_and_one_hot(tmp_path):
    several = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]])
    write_npz(tmp_path / "a.npz", labels=several)
    source = MedMNIST(tmp_path / "a.npz", class_names=["x", "y", "z"])
    assert source.info.multilabel and source.info.class_names == ("x", "y", "z")
    np.testing.assert_array_equal(source[0]["label"], [0, 1, 1])
    write_npz(tmp_path / "b.npz", labels=np.eye(3, dtype=int)[[0, 1, 2, 0, 1]])
    source = MedMNIST(tmp_path / "b.npz")
    assert not source.info.multilabel and source[2]["label"] == 2 and "one 1" in source.notes[0]


def test_volumes_keep_their_axes(tmp_path):
    arrays = write_npz(tmp_path / "organmnist3d.npz", shape=(5, 7, 8, 9))
    source = MedMNIST(tmp_path, name="organmnist3d")
    assert source.info.ndim == 3 and source.info.kind == "CT" and len(source.info.class_names) == 11
    np.testing.assert_array_equal(source[0]["image"][..., 0], arrays["train_images"][0])
    assert "kept as stored" in source.notes[0]
    assert source[0]["spacing"].tolist() == [1, 1, 1]


def test_a_worker_reads_the_file_itself(tmp_path):
    write_npz(tmp_path / "own.npz", shape=(50, 28, 28, 3))
    source = MedMNIST(tmp_path)
    data = pickle.dumps(source)
    assert len(data) < 50 * 28 * 28 * 3
    np.testing.assert_array_equal(pickle.loads(data)[60]["image"], source[60]["image"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "holds the keys"),
        ({"val_labels": None}, "val_labels is missing"),
        ({"val_labels": np.zeros((3, 1), int)}, r"val_labels has shape \(3, 1\) for 5 images"),
        ({"test_labels": np.full((5, 1), -1)}, "test_labels holds -1"),
        ({"test_labels": np.full((5, 1), 0.5)}, "no whole numbers"),
        ({"val_images": np.zeros((5, 30, 28), np.uint8)}, "val_images has shape"),
        ({"val_labels": np.full((5, 2), 1)}, "different numbers of columns"),
        ({"train_images": np.zeros((5, 28), np.uint8)}, "train_images has shape"),
    ],
)
def test_a_wrong_npz_is_refused(tmp_path, changes, message):
    write_npz(tmp_path / "own.npz", **changes)
    with pytest.raises(UserError, match=message):
        MedMNIST(tmp_path)


def test_labels_beyond_the_set_pickles_and_damage_are_refused(tmp_path):
    write_npz(tmp_path / "pneumoniamnist.npz", labels=np.arange(5))
    with pytest.raises(UserError, match="labels are of 5 classes, class names of 2"):
        MedMNIST(tmp_path)
    objects = np.array([{}] * 5, dtype=object)
    np.savez(tmp_path / "evil.npz", train_images=np.zeros((5, 28, 28)), train_labels=objects)
    with pytest.raises(UserError, match="cannot be read as npz"):
        MedMNIST(tmp_path / "evil.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "evil.npz").read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read as npz"):
        MedMNIST(tmp_path / "cut.npz")
    with pytest.raises(UserError, match="say which one"):
        MedMNIST(tmp_path)


def test_download_is_asked_for_checked_and_kept(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="set --config.data.download=true.*zenodo.org/records/10519652"
    ):
        MedMNIST(tmp_path, name="breastmnist")
    with pytest.raises(UserError, match="expected one of pathmnist"):
        MedMNIST(tmp_path, name="brestmnist", download=True)
    write_npz(tmp_path / "remote.npz")
    remote = (tmp_path / "remote.npz").as_uri()
    monkeypatch.setattr(medmnist, "URL", remote)
    with pytest.raises(UserError, match="has the checksum"):
        MedMNIST(tmp_path / "to", name="breastmnist", download=True)
    assert list((tmp_path / "to").iterdir()) == []
    digest = hashlib.md5((tmp_path / "remote.npz").read_bytes()).hexdigest()
    assert fetch(remote, tmp_path / "to" / "x.npz", md5=digest).is_file()
    monkeypatch.setattr(medmnist, "URL", (tmp_path / "gone.npz").as_uri())
    with pytest.raises(UserError, match="cannot be downloaded.*fetch file:.*save it as"):
        MedMNIST(tmp_path / "to", name="breastmnist", download=True)


def test_real_medmnist(real_data):
    source = MedMNIST(real_data / "pneumoniamnist")
    assert {part: len(rows) for part, rows in source.parts.items()} == {
        "train": 4708,
        "val": 524,
        "test": 624,
    }
    assert source.info.class_names == ("normal", "pneumonia") and source.info.kind == "X-ray"
    assert source[4708]["image"].shape == (28, 28, 1)
