import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxmed.data.sources.class_folders import ClassFolders
from jaxmed.data.sources.coco import Coco
from jaxmed.data.sources.medmnist import MedMNIST
from jaxmed.data.sources.msd import Decathlon
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.data.sources.phantom_scene import hulls, smooth_field, visible_objects
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.data.sources.voc import PascalVOC
from jaxmed.types import TASKS, UserError, check_example

KINDS = ("cells", "body")
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def best_dice(images, truth, thresholds):
    """Dice of the best one threshold for a whole set, on either side of it, chosen with truth."""
    images, truth = np.stack(images), np.stack(truth)
    best = 0.0
    for threshold in thresholds:
        for guess in (images > threshold, images < threshold):
            best = max(best, 2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size, ndim", [(64, 2), ((48, 72), 2), (24, 3), ((40, 36, 16), 3)])
def test_examples_keep_the_contract(kind, task, size, ndim):
    source = Phantoms(kind, task=task, size=size, ndim=ndim, count=6)
    shape = (size,) * ndim if isinstance(size, int) else size
    assert len(source) == len(source.ids) == len(set(source.ids)) == 6
    for row in range(3):
        example = source[row]
        check_example(example, source.info, where="phantom")
        assert example["image"].shape == (*shape, 1)
        assert example["image"].dtype == (np.uint8 if kind == "cells" else np.int16)
        assert example["spacing"].shape == (ndim,) and example["spacing"].dtype == np.float32
        assert int(example["index"]) == row and float(example["valid"]) == 1
        if "boxes" in example:
            low, high = np.split(example["boxes"], 2, axis=-1)
            assert example["boxes"].dtype == np.float32
            assert (low >= 0).all() and (high <= shape).all() and (high > low).all()
            assert len(example["boxes"]) == len(example["box_label"])
            assert (example["box_label"] < len(source.info.class_names)).all()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.lists(st.integers(16, 40), min_size=2, max_size=3),
    seed=st.integers(0, 2**32),
    index=st.integers(0, 10**6),
)
def test_any_size_and_seed_gives_a_sound_scene(kind, size, seed, index):
    source = Phantoms(kind, ndim=len(size), size=size, seed=seed, count=1)
    scene = source.draw(index)
    assert scene.image.shape == scene.objects.shape == tuple(size)
    assert scene.objects.max() == len(scene.kinds)
    assert len(hulls(scene.objects)) == len(scene.kinds)
    assert np.ptp(scene.image) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_seed_and_index_alone(kind):
    one, other = Phantoms(kind, count=12, seed=3), Phantoms(kind, count=30, seed=3)
    forwards = [one[row] for row in range(12)]
    copy = pickle.loads(pickle.dumps(other))
    for row in reversed(range(12)):
        again = copy[row]
        for key, value in forwards[row].items():
            np.testing.assert_array_equal(value, again[key])
    pictures = {example["image"].tobytes() for example in forwards}
    pictures |= {Phantoms(kind, seed=4)[row]["image"].tobytes() for row in range(12)}
    assert len(pictures) == 24
    for task in TASKS:
        image = Phantoms(kind, task=task, seed=3)[5]["image"]
        np.testing.assert_array_equal(image, forwards[5]["image"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_truths_of_all_tasks_agree(kind):
    detection = Phantoms(kind, task="detection")
    semantic, label = Phantoms(kind), Phantoms(kind, task="classification")
    instance = Phantoms(kind, instances=True)
    for row in range(20):
        boxes, kinds = detection[row]["boxes"], detection[row]["box_label"]
        objects, classes = instance[row]["mask"], semantic[row]["mask"]
        for number, (box, box_kind) in enumerate(zip(boxes, kinds, strict=True), start=1):
            where = np.argwhere(objects == number)
            np.testing.assert_array_equal(box, [*where.min(0), *(where.max(0) + 1)])
            names = semantic.info.class_names
            expected = int(box_kind) + 1 if kind == "cells" else names.index("lesion")
            assert set(classes[objects == number]) == {expected}
        if kind == "cells":
            assert ((classes > 0) == (objects > 0)).all()
            assert np.bincount(kinds, minlength=3).argmax() == label[row]["label"]
        else:
            assert ((classes == 2) == (objects > 0)).all() and (classes == 1).any()
            assert int(label[row]["label"]) == int(len(boxes) > 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 101, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_cover_all_and_split_no_patient(kind, count):
    source = Phantoms(kind, count=count)
    rows = [row for part in source.parts.values() for row in part]
    assert sorted(rows) == list(range(count))
    if kind == "body":
        owners = [{source.patients[row] for row in part} for part in source.parts.values()]
        assert sum(map(len, owners)) == len(set().union(*owners))
    else:
        assert source.patients is None
    if count >= 100:
        shares = [len(source.parts[part]) / count for part in ("train", "val", "test")]
        np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.03)


def test_images_of_a_patient_look_alike():
    source = Phantoms("body")
    assert source.patients[3:7] == ["patient_00002"] * 3 + ["patient_00003"]
    air = [source.draw(row).image < -400 for row in range(3, 7)]
    assert (air[0] != air[1]).mean() < 0.5 * (air[0] != air[3]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_is_a_part_of_the_whole(kind):
    for task in ("detection", "segmentation"):
        source = Phantoms(kind, task=task)
        whole, part = source[8], source.read(8, (slice(8, 40), slice(10, 64)))
        np.testing.assert_array_equal(part["image"], whole["image"][8:40, 10:64])
        np.testing.assert_array_equal(part["offset"], [-8, -10])
        if task == "segmentation":
            np.testing.assert_array_equal(part["mask"], whole["mask"][8:40, 10:64])
        else:
            assert (part["boxes"] >= 0).all() and (part["boxes"] <= [32, 54, 32, 54]).all()


def test_body_has_hounsfield_units_and_its_own_spacing():
    source = Phantoms("body", ndim=3, size=(40, 40, 16), count=12)
    spacings = np.stack([source[row]["spacing"] for row in (0, 1, 2)])
    np.testing.assert_array_equal(spacings[1], spacings[2])  # one patient
    assert not np.allclose(spacings[0], spacings[1])
    assert (spacings[:, 2] > 1.2 * spacings[:, 0]).all()
    image, mask = source[0]["image"], source[0]["mask"]
    assert image.min() < -900 and 250 < image.max() < 1000
    assert 20 < np.median(image[mask == 1]) < 100
    # RAS: the liver lies to the right, the spine at the back.
    assert ndimage.center_of_mass(mask > 0)[0] > 20
    assert ndimage.center_of_mass(image > 250)[1] < 20


def test_section_shows_the_right_side_on_the_left():
    mask, image = (Phantoms("body")[0][key] for key in ("mask", "image"))
    assert ndimage.center_of_mass(mask > 0)[1] < 32
    assert ndimage.center_of_mass(image[..., 0] > 300)[0] > 28


def test_thresholds_fail():
    cells, body = Phantoms("cells"), Phantoms("body")
    examples = [cells[row] for row in range(60)]
    images = [example["image"][..., 0] for example in examples]
    dice = best_dice(images, [e["mask"] > 0 for e in examples], range(0, 256, 4))
    assert 0.4 < dice < 0.72, dice
    examples = [body[row] for row in range(60)]
    images = [example["image"][..., 0] for example in examples]
    dice = best_dice(images, [e["mask"] == 2 for e in examples], range(-150, 300, 10))
    assert dice < 0.2, dice
    dice = best_dice(images, [e["mask"] > 0 for e in examples], range(-150, 300, 10))
    assert dice < 0.6, dice


@pytest.mark.parametrize("kind", KINDS)
def test_brightness_does_not_give_the_class_away(kind):
    source = Phantoms(kind, task="classification", count=320)
    values, labels = [], []
    for row in range(len(source)):
        example = source[row]
        bounds = (0, 256) if kind == "cells" else (-150, 200)
        image = example["image"].astype(float)
        shares = np.histogram(image, bins=32, range=bounds)[0] / image.size
        values.append([*shares, image.mean(), image.std()])
        labels.append(int(example["label"]))
    values, labels = np.array(values), np.array(labels)
    assert np.bincount(labels).min() > 0.25 * len(labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=500))
    chances = model.fit(values[:200], labels[:200]).predict_proba(values[200:])
    chances = chances[:, 1] if kind == "body" else chances
    assert roc_auc_score(labels[200:], chances, multi_class="ovr") < 0.7


def test_kinds_of_cells_are_equally_bright():
    source = Phantoms("cells", task="detection", size=128)
    means = [[], [], []]
    for row in range(30):
        scene = source.draw(row)
        numbers = np.arange(1, len(scene.kinds) + 1)
        for kind, mean in zip(
            scene.kinds, ndimage.mean(scene.image, scene.objects, numbers), strict=True
        ):
            means[kind].append(mean)
    centres = [np.mean(mean) for mean in means]
    assert np.ptp(centres) < 0.5 * np.std(means[0])


def test_smooth_field_and_visible_objects():
    field = smooth_field(np.random.default_rng(0), (40, 20, 10), waves=3.0)
    assert field.shape == (40, 20, 10)
    assert abs(field.std() - 1) < 1e-9
    assert np.corrcoef(field[1:].ravel(), field[:-1].ravel())[0, 1] > 0.7
    objects, kinds = visible_objects(np.array([[0, 3], [1, 3]]), np.array([5, 6, 7]))
    np.testing.assert_array_equal(objects, [[0, 2], [1, 2]])
    np.testing.assert_array_equal(kinds, [5, 7])
    assert hulls(np.zeros((4, 4), int)).shape == (0, 4)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"kind": "cats"}, "kind"),
        ({"task": "regression"}, "task"),
        ({"ndim": 4}, "ndim"),
        ({"size": 8}, "size"),
        ({"size": (32, 32, 32)}, "size"),
        ({"count": 0}, "count"),
        ({"seed": -1}, "seed"),
        ({"task": "detection", "instances": True}, "instances"),
    ],
)
def test_mistakes_are_named(options, word):
    with pytest.raises(UserError, match=word):
        Phantoms(**options)
    with pytest.raises(IndexError):
        Phantoms(count=2)[2]


READERS = {
    "class_folders": (ClassFolders, {}),
    "pairs": (ImageMaskPairs, {}),
    "voc": (PascalVOC, {}),
    "coco": (Coco, {}),
    "msd": (Decathlon, {}),
    "medmnist": (MedMNIST, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", READERS)
@pytest.mark.parametrize("parts", [True, False])
def test_written_phantoms_are_read_back(tmp_path, layout, kind, parts):
    size = (24, 20, 16) if layout == "msd" else (40, 48)
    truth = write_phantoms(tmp_path, layout=layout, kind=kind, size=size, count=16, parts=parts)
    reader, options = READERS[layout]
    source = reader(tmp_path, **options)
    assert len(source) == 16 and source.info.ndim == truth.info.ndim
    if layout == "medmnist":
        rows = {f"{p}_{i:05d}": r for p, rs in truth.parts.items() for i, r in enumerate(rs)}
        rows = rows if parts else {f"train_{row:05d}": row for row in range(16)}
    else:
        rows = {name: row for row, name in enumerate(truth.ids)}
        if truth.patients is not None:
            assert source.patients == [truth.patients[rows[name]] for name in source.ids]
    if parts:
        for part, members in truth.parts.items():
            assert {rows[source.ids[row]] for row in source.parts[part]} == set(members)
    for index, name in enumerate(source.ids):
        found, expected = source[index], truth[rows[name]]
        if kind == "cells" or layout == "msd":
            np.testing.assert_array_equal(found["image"], expected["image"])
        same_labels(found, expected, source.info.class_names, truth.info.class_names)


def same_labels(found, expected, found_names, names):
    if "label" in expected:
        name = found_names[int(found["label"])].replace("_", " ")
        # An npz file knows numbers only.
        assert name in (names[int(expected["label"])], str(expected["label"]))
    if "mask" in expected:
        np.testing.assert_array_equal(found["mask"], expected["mask"])
        assert found_names == names
        if found["mask"].ndim == 3:  # a PNG has no spacing
            np.testing.assert_allclose(found["spacing"], expected["spacing"], rtol=1e-5)
    if "boxes" in expected:
        np.testing.assert_array_equal(found["boxes"], expected["boxes"])
        assert [found_names[i] for i in found["box_label"]] == [
            names[i] for i in expected["box_label"]
        ]


def test_instances_and_volumes_are_written(tmp_path):
    flat = write_phantoms(tmp_path / "a", layout="pairs", instances=True, count=4, size=48)
    source = ImageMaskPairs(tmp_path / "a", masks="instance")
    np.testing.assert_array_equal(source[2]["mask"], flat[2]["mask"])
    solid = write_phantoms(tmp_path / "b", layout="class_folders", ndim=3, count=9, size=20)
    source = ClassFolders(tmp_path / "b")
    row = source.ids.index(solid.ids[1])
    np.testing.assert_array_equal(source[row]["image"], solid[1]["image"])


def test_layouts_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="layout is 'zip'"):
        write_phantoms(tmp_path, layout="zip")
    with pytest.raises(UserError, match="2-D"):
        write_phantoms(tmp_path, layout="voc", ndim=3)
    with pytest.raises(UserError, match="instances"):
        write_phantoms(tmp_path, layout="msd", instances=True)
