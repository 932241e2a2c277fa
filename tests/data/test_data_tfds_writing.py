"""Sets written for TensorFlow Datasets come back as they were, in TFDS and in our own source."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets

from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.data.sources.tfds import TFDS
from jaxmed.data.tfds_writing import write_tfds
from jaxmed.types import UserError

SPLIT = {"train": [0, 2, 4], "val": [1, 3], "test": [6, 5]}


@pytest.mark.parametrize(
    ("task", "ndim", "instances"),
    [
        ("classification", 2, False),
        ("classification", 3, False),
        ("detection", 2, False),
        ("segmentation", 2, True),
        ("segmentation", 3, False),
    ],
)
def test_a_set_comes_back_as_it_was(tmp_path, task, ndim, instances):
    source = Phantoms("cells", task=task, ndim=ndim, size=16, count=7, instances=instances)
    done = []

    def read(row):
        spacing = np.arange(1, ndim + 1, dtype=np.float32)
        return {**source[row], "spacing": spacing}

    home = write_tfds(
        read, SPLIT, source.ids, source.info, tmp_path, progress=lambda n: done.append(n)
    )
    assert done == [1, 2, 3, 4, 5, 6, 7]
    found = TFDS(home)
    assert found.parts == {"train": [0, 1, 2], "val": [3, 4], "test": [5, 6]}
    for name in ("task", "ndim", "channels", "class_names", "multilabel", "instances"):
        assert getattr(found.info, name) == getattr(source.info, name)
    for row, original in enumerate([0, 2, 4, 1, 3, 6, 5]):
        example, expected = found[row], read(original)
        assert example.keys() == expected.keys()
        for key in expected.keys() - {"index"}:
            assert example[key].dtype == expected[key].dtype
            atol = 1e-4 if key == "boxes" else 0  # which are kept as fractions
            np.testing.assert_allclose(example[key], expected[key], rtol=0, atol=atol)
    theirs = tensorflow_datasets.builder_from_directory(home).as_data_source("test")
    assert [str(np.asarray(e["id"]).item().decode()) for e in theirs] == [
        source.ids[6],
        source.ids[5],
    ]


def test_pictures_of_many_channels_stay_pictures(tmp_path):
    source = Phantoms("cells", task="segmentation", size=16, count=2)
    info = dataclasses.replace(source.info, channels=6, licence="CC BY 4.0", citation="Doe 2026")

    def read(row):
        return {**source[row], "image": np.repeat(source[row]["image"], 6, -1)}

    home = write_tfds(read, {"train": [0, 1]}, source.ids, info, tmp_path)
    found = TFDS(home)
    assert (found.info.ndim, found.info.channels) == (2, 6)
    assert (found.info.licence, found.info.citation) == ("CC BY 4.0", "Doe 2026")
    assert [path.name for path in tmp_path.iterdir()] == [home.parent.name]
    np.testing.assert_array_equal(found[1]["image"], read(1)["image"])


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    boxes = Phantoms("cells", task="detection", ndim=3, size=16, count=1)
    with pytest.raises(UserError, match="no boxes in 3-D"):
        write_tfds(boxes.__getitem__, {"train": [0]}, boxes.ids, boxes.info, tmp_path)
    source = Phantoms("cells", task="classification", size=16, count=2)

    def broken(row):
        if row == 1:
            raise UserError("b.png: cannot be read")
        return source[row]

    with pytest.raises(UserError, match="b.png: cannot be read"):
        write_tfds(broken, {"train": [0, 1]}, source.ids, source.info, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write_tfds(source.__getitem__, {"train": [0, 1]}, source.ids, source.info, tmp_path)
    with pytest.raises(UserError, match="is there already"):
        write_tfds(source.__getitem__, {"train": [0, 1]}, source.ids, source.info, tmp_path)
