"""Images with boxes: Pascal VOC, COCO and TensorFlow Datasets."""

import io
import json
import pickle

import imageio.v3 as imageio
import numpy as np
import pytest

from jaxmed.data.sources.coco import Coco
from jaxmed.data.sources.findings import DataError
from jaxmed.data.sources.tfds import TFDS
from jaxmed.data.sources.voc import PascalVOC
from jaxmed.types import UserError

HEIGHT, WIDTH = 30, 40


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.zeros((HEIGHT, WIDTH, 3), np.uint8))


# ---- Pascal VOC


def save_voc(root, stem, *boxes, size=(WIDTH, HEIGHT), extra=""):
    save(root / "JPEGImages" / f"{stem}.png")
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1, difficult in boxes
    )
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{stem}.xml").write_text(
        f"{extra}<annotation><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"<depth>3</depth></size>{objects}</annotation>"
    )


def save_list(root, part, *stems):
    path = root / "ImageSets" / "Main" / f"{part}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(stems) + "\n")


def test_voc_minima_lose_one(tmp_path):
    save_voc(tmp_path, "a", ("cell", 3, 5, 10, 20, 0), ("blob", 1, 1, WIDTH, HEIGHT, 1))
    save_voc(tmp_path, "b")
    source = PascalVOC(tmp_path)
    assert source.info.class_names == ("blob", "cell") and source.info.task == "detection"
    example = source[0]
    np.testing.assert_array_equal(example["boxes"], [[4, 2, 20, 10], [0, 0, HEIGHT, WIDTH]])
    np.testing.assert_array_equal(example["box_label"], [1, 0])
    assert example["boxes"].dtype == np.float32 and example["box_label"].dtype == np.int32
    assert source[1]["boxes"].shape == (0, 4) and source[1]["box_label"].shape == (0,)
    assert "1 objects are marked as difficult" in source.notes[0]
    crop = source.read(0, (slice(10, 30), slice(0, 40)))
    np.testing.assert_array_equal(crop["boxes"], [[0, 2, 10, 10], [0, 0, 20, WIDTH]])
    given = PascalVOC(tmp_path, class_names=["cell", "blob"])
    np.testing.assert_array_equal(given[0]["box_label"], [0, 1])


def test_voc_invalid_annotations_are_all_listed_or_dropped(tmp_path):
    good = ("cell", 3, 5, 10, 20, 0)
    save_voc(tmp_path, "a", good, ("cell", 7, 7, 7, 7, 0), ("cell", 9, 5, 3, 8, 0))
    save_voc(tmp_path, "b", good, ("cell", 30, 5, 50, 8, 0), ("cell", "x", 1, 4, 4, 0))
    save_voc(tmp_path, "c", good, size=(20, 20))
    save(tmp_path / "JPEGImages" / "d.png")
    save_voc(tmp_path, "e", good)
    (tmp_path / "JPEGImages" / "e.png").unlink()
    with pytest.raises(DataError) as caught:
        PascalVOC(tmp_path)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    assert "a.xml object 2 (cell): box 7,7,7,7 has no area" in problems
    assert "outside its image of 30x40" in problems and "no box of four numbers" in problems
    assert "size is 20x20, that of c.png is 40x30" in problems
    assert "d has no annotation" in problems and "e has no image" in problems
    assert "data.invalid=drop" in str(caught.value)
    source = PascalVOC(tmp_path, invalid="drop")
    assert list(source.ids) == ["a", "b"] and "7 problems" in source.notes[-1]
    assert [len(source[row]["boxes"]) for row in range(2)] == [1, 1]
    with pytest.raises(DataError, match="unknown class 'cell'"):
        PascalVOC(tmp_path, class_names=["blob"])


def test_voc_smallest_box_and_the_border(tmp_path):
    save_voc(tmp_path, "a", ("cell", 0, 0, 10, HEIGHT + 1, 0), ("cell", 5, 5, 7, 9, 0))
    source = PascalVOC(tmp_path)
    np.testing.assert_array_equal(source[0]["boxes"], [[0, 0, HEIGHT, 10], [4, 4, 9, 7]])
    assert "1 boxes leave their image by up to one pixel" in source.notes[0]
    with pytest.raises(DataError, match="5,5,7,9 is too small"):
        PascalVOC(tmp_path, box_minimum=3)
    save_voc(tmp_path, "a", ("cell", 5, 5, 5, 9, 0))
    assert len(PascalVOC(tmp_path, box_minimum=0)[0]["boxes"]) == 1


def test_voc_parts(tmp_path):
    for stem in "abcd":
        save_voc(tmp_path, stem, ("cell", 3, 5, 10, 20, 0))
    save_list(tmp_path, "train", "b", "a")
    save_list(tmp_path, "val", "c")
    save_list(tmp_path, "trainval", "a", "b", "c")
    source = PascalVOC(tmp_path)
    assert {part: [source.ids[row] for row in rows] for part, rows in source.parts.items()} == {
        "train": ["b", "a"],
        "val": ["c"],
    }
    assert "1 images are in no list" in source.notes[0]
    (tmp_path / "manifest.csv").write_text("id,patient\na,p\nb,p\nc,q\n")
    assert PascalVOC(tmp_path).patients == ["p", "p", "q"]
    save_list(tmp_path, "val", "a")
    with pytest.raises(DataError, match="a is already in part train"):
        PascalVOC(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_voc_refuses_document_types(tmp_path, encoding):
    save_voc(tmp_path, "a", ("cell", 3, 5, 10, 20, 0))
    path = tmp_path / "Annotations" / "a.xml"
    attack = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY b "c">]>'
    path.write_bytes((attack + path.read_text()).encode(encoding))
    with pytest.raises(UserError, match="a.xml: has a DOCTYPE"):
        PascalVOC(tmp_path)
    path.write_text("<annotation><object>")
    with pytest.raises(UserError, match="a.xml: cannot be read as XML"):
        PascalVOC(tmp_path)


def test_real_voc(real_data):
    with pytest.raises(DataError) as caught:
        PascalVOC(real_data / "bccd")
    assert len(caught.value.problems) == 2
    assert "BloodImage_00338.xml" in str(caught.value) and "504,337,504,337" in str(caught.value)
    assert "BloodImage_00343.xml" in str(caught.value) and "181,329,181,329" in str(caught.value)
    source = PascalVOC(real_data / "bccd", invalid="drop", kind="microscopy")
    assert {part: len(rows) for part, rows in source.parts.items()} == {"train": 205, "val": 87}
    assert source.info.class_names == ("Platelets", "RBC", "WBC")
    boxes = source[0]["boxes"]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes[:, 2:] <= [480, 640]).all()


# ---- COCO


def coco(*annotations, names=("a.png", "b.png"), categories=((3, "cell"), (17, "blob")), **changes):
    return {
        "images": [
            {"id": 10 + row, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for row, name in enumerate(names)
        ],
        "annotations": [
            {"id": row, "image_id": image, "category_id": category, "bbox": box, **more}
            for row, (image, category, box, more) in enumerate(annotations)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories],
        **changes,
    }


def save_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_coco(tmp_path):
    for name in "ab":
        save(tmp_path / "images" / f"{name}.png")
    table = coco(
        (10, 17, [2, 4, 8, 16], {}),
        (10, 3, [0, 0, WIDTH, HEIGHT], {"iscrowd": 0}),
        (11, 3, [0, 0, 5, 5], {"iscrowd": 1}),
    )
    save_json(tmp_path / "annotations" / "instances.json", table)
    source = Coco(tmp_path)
    assert source.info.class_names == ("cell", "blob") and list(source.ids) == ["a", "b"]
    np.testing.assert_array_equal(source[0]["boxes"], [[4, 2, 20, 10], [0, 0, HEIGHT, WIDTH]])
    np.testing.assert_array_equal(source[0]["box_label"], [1, 0])
    assert len(source[1]["boxes"]) == 0 and "1 annotations of crowds" in source.notes[0]
    assert source.parts == {}
    file = Coco(tmp_path / "annotations" / "instances.json", class_names=["blob", "cell"])
    np.testing.assert_array_equal(file[0]["box_label"], [0, 1])


@pytest.mark.parametrize("place", ["images", "train2017", "images/train", "annotations"])
def test_coco_parts_and_places(tmp_path, place):
    save(tmp_path / place / "a.png")
    save(tmp_path / place.replace("train", "val") / "b.png")
    box = [2, 4, 8, 16]
    for part, name in (("train2017", "a.png"), ("val2017", "b.png")):
        table = coco((10, 3, box, {}), names=[name])
        save_json(tmp_path / "annotations" / f"instances_{part}.json", table)
    save_json(tmp_path / "annotations" / "captions_train2017.json", {})
    assert Coco(tmp_path).parts == {"train": [0], "val": [1]}


@pytest.mark.parametrize("names", [["b.png", "a.png"], ["a.png", "b.png"]])
def test_coco_of_two_pictures_of_one_name_it_is_always_the_same(tmp_path, names):
    for name in ("images/b.png", "images/train/b.png", "images/a.png"):
        save(tmp_path / name)
    table = coco((10, 3, [2, 4, 8, 16], {}), names=names)
    save_json(tmp_path / "annotations" / "instances_train.json", table)
    source = Coco(tmp_path)
    found = {case.images[0].relative_to(tmp_path).as_posix() for case in source.cases}
    assert found == {"images/a.png", "images/train/b.png"}  # the folder of its part first


def test_coco_invalid_annotations_are_all_listed_or_dropped(tmp_path):
    save(tmp_path / "a.png")
    wrong = [
        (10, 3, [2, 4, 0, 16], {}),
        (10, 3, [2, 4, 100, 16], {}),
        (10, 3, [2, 4, 8], {}),
        (10, 3, [2, 4, 8, None], {}),
        (99, 3, [2, 4, 8, 16], {}),
        ([1], 3, [2, 4, 8, 16], {}),
        (10, 99, [2, 4, 8, 16], {}),
    ]
    table = coco((10, 3, [2, 4, 8, 16], {}), *wrong, names=["a.png", "gone.png"])
    save_json(tmp_path / "x.json", table)
    with pytest.raises(DataError) as caught:
        Coco(tmp_path)
    assert len(caught.value.problems) == len(wrong) + 1
    assert "no file 'gone.png'" in str(caught.value)
    source = Coco(tmp_path, invalid="drop")
    assert list(source.ids) == ["a"] and len(source[0]["boxes"]) == 1


def test_coco_that_cannot_be_right(tmp_path):
    save(tmp_path / "a.png")
    table = coco((10, 3, [2, 4, 8, 16], {}), names=["../a.png"])
    save_json(tmp_path / "x.json", table)
    with pytest.raises(UserError, match="leads out of the folder"):
        Coco(tmp_path)
    save_json(tmp_path / "x.json", coco(names=["a.png", "a.png"]))
    with pytest.raises(DataError, match="a.png is listed twice"):
        Coco(tmp_path)
    save_json(tmp_path / "x.json", {"images": []})
    with pytest.raises(UserError, match="has no list of annotations"):
        Coco(tmp_path)
    save_json(tmp_path / "x.json", coco(names=["a.png"], categories=((1, "a"), (2, "a"))))
    with pytest.raises(DataError, match="two categories"):
        Coco(tmp_path)
    save_json(tmp_path / "y.json", coco(names=["a.png"]))
    with pytest.raises(UserError, match="x.json, y.json; of several files each needs a part"):
        Coco(tmp_path)


# ---- TensorFlow Datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of three tiny prepared data sets."""
    import tensorflow_datasets as tfds  # takes seconds

    features = tfds.features

    def png(value, channels=(3,)):
        stream = io.BytesIO()
        imageio.imwrite(stream, np.full((8, 10, *channels), value, np.uint8), extension=".png")
        stream.seek(0)
        return stream

    class Made(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=features.FeaturesDict(self.make_features())
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            for row in range(count):
                yield row, {"image": png(row), **self.make_labels(row)}

    class Classes(Made):
        """Classes."""

        def make_features(self):
            return {"image": features.Image(), "label": features.ClassLabel(names=["x", "y"])}

        def make_labels(self, row):
            return {"label": row % 2}

    class Boxes(Made):
        """Boxes."""

        def make_features(self):
            thing = {"bbox": features.BBoxFeature(), "label": features.ClassLabel(names=["x", "y"])}
            return {"image": features.Image(), "objects": features.Sequence(thing)}

        def make_labels(self, row):
            return {"objects": [{"bbox": features.BBox(0.25, 0.1, 0.5, 0.9), "label": 1}] * row}

    class Masks(Made):
        """Masks."""

        def make_features(self):
            shape = (None, None, 1)
            return {"image": features.Image(), "segmentation_mask": features.Image(shape=shape)}

        def make_labels(self, row):
            return {"segmentation_mask": png(row % 2, channels=())}

    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Classes, Boxes, Masks):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_classification(prepared):
    source = TFDS(prepared / "classes")
    assert source.info.task == "classification" and source.info.class_names == ("x", "y")
    assert source.parts == {"train": [0, 1, 2], "val": [3, 4]} and len(set(source.ids)) == 5
    assert source[4]["image"].shape == (8, 10, 3) and source[4]["label"].shape == ()
    assert source[4]["label"] == source[4]["image"][0, 0, 0] % 2
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2]["image"], source[2]["image"])


def test_tfds_detection_and_segmentation(prepared):
    source = TFDS(prepared / "boxes" / "1.0.0")
    rows = {int(source[row]["image"].max()): source[row] for row in source.parts["train"]}
    np.testing.assert_allclose(rows[2]["boxes"], [[2, 1, 4, 9]] * 2, rtol=1e-6)
    assert rows[2]["box_label"].tolist() == [1, 1] and rows[0]["boxes"].shape == (0, 4)
    with pytest.raises(UserError, match="name the classes of segmentation_mask"):
        TFDS(prepared / "masks")
    source = TFDS(prepared / "masks", class_names=["background", "cell"])
    assert source.info.task == "segmentation" and source[0]["mask"].shape == (8, 10)


def test_tfds_that_is_not_there(prepared):
    with pytest.raises(UserError, match="no data set of TensorFlow Datasets can be opened"):
        TFDS(prepared)
    with pytest.raises(UserError, match="is not prepared in .*set --config.data.download=true"):
        TFDS("bccd", data_dir=prepared)
