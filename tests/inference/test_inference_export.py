"""What reads an export does the same as jaxmed, and files are what they say."""

import json
import threading
import zipfile

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import onnxruntime
import PIL.Image
import pytest
import safetensors.numpy
import skimage.segmentation
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmed.build.export_checks import compare_decided
from jaxmed.data.images import read_image, write_mask
from jaxmed.data.sources.base import make_example
from jaxmed.evaluation.decisions import ClassDecisions, LabelDecisions
from jaxmed.inference import sliding_window
from jaxmed.inference.export import (
    expand_arrays,
    export_program,
    name_arrays,
    reduce_arrays,
    zip_parts,
)
from jaxmed.inference.onnx_writing import write_onnx
from jaxmed.inference.standalone import __main__ as command
from jaxmed.inference.standalone import (
    boxes,
    contents,
    decisions,
    files,
    grids,
    instances,
    model,
    windows,
)
from jaxmed.inference.standalone.model import Model
from jaxmed.inference.standalone.programs import rebuild
from jaxmed.preprocessing import intensity, spatial
from jaxmed.tasks.detection import Detection
from jaxmed.tasks.separation import separate_instances
from jaxmed.types import UserError

RNG = np.random.default_rng(0)


def smooth(shape):
    """A random field with no two equal values."""
    import scipy.ndimage

    return scipy.ndimage.gaussian_filter(np.random.default_rng(3).normal(size=shape), 1.5)


RULES = {
    "channels": 1,
    "size": (),
    "fit": "stretch",
    "spacing": (),
    "normalization": "dataset",
    "options": (),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (9, 33)])
def test_sizes_equal_those_of_jaxmed(dtype, fit, size):
    image = (100 + 40 * RNG.normal(size=(30, 21, 3))).astype(dtype)
    found = grids.prepare(
        image, np.ones(2, np.float32), {**RULES, "channels": 3, "size": size, "fit": fit}
    )
    change = {"stretch": spatial.resize, "pad": spatial.fit}[fit]
    wanted = change(make_example(image, index=0), shape=size)
    np.testing.assert_array_equal(found.image, wanted["image"])
    for name in ("scale", "offset"):
        np.testing.assert_array_equal(getattr(found, name), wanted[name])
    corners = np.array([[1.0, 2, 7, 8], [0, 0, size[0], size[1]]], np.float32)
    where = {name: wanted[name] for name in ("scale", "offset")}
    np.testing.assert_array_equal(
        grids.restore_boxes(corners, found),
        spatial.restore_boxes(corners, **where, shape=image.shape[:-1]),
    )


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 3.0), (2.5, 1.0, 0.7)])
def test_spacings_and_masks_equal_those_of_jaxmed(spacing):
    image = (100 * RNG.normal(size=(12, 9, 14, 1))).astype(np.int16)
    found = grids.prepare(
        image, np.asarray(spacing, np.float32), {**RULES, "spacing": (1.5, 1.5, 1.5)}
    )
    example = make_example(image, index=0, spacing=np.asarray(spacing))
    wanted = spatial.resample(example, spacing=(1.5, 1.5, 1.5))
    np.testing.assert_array_equal(found.image, wanted["image"])
    said = RNG.dirichlet(np.ones(3), found.image.shape[:-1]).astype(np.float32)
    where = {name: wanted[name] for name in ("scale", "offset")}
    for predicted in (said, said.argmax(-1).astype(np.int32)):
        np.testing.assert_array_equal(
            grids.restore_mask(predicted, found),
            spatial.restore_mask(predicted, **where, shape=image.shape[:-1]),
        )


@pytest.mark.parametrize("name", [*intensity.NORMALIZATIONS, "dataset"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_intensities_equal_those_of_jaxmed(name, dtype):
    image = (100 + 40 * RNG.normal(size=(20, 21, 2))).astype(dtype)
    image[..., 1] = 7  # constant
    options = {"level": 90.0, "width": 30.0} if name == "window" else {}
    found = grids.normalize(image, name, options)
    if name == "dataset":
        np.testing.assert_array_equal(found, image)
        return
    wanted = intensity.NORMALIZATIONS[name](make_example(image, index=0), **options)["image"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


PICTURES = {
    "gray.png": ("L", np.uint8),
    "colour.png": ("RGB", np.uint8),
    "opacity.png": ("RGBA", np.uint8),
    "palette.png": ("P", np.uint8),
    "bits.png": ("1", bool),
    "bits.bmp": ("1", bool),
    "animated.png": ("L", np.uint8),
    "deep.png": ("I;16", np.uint16),
    "colour.jpg": ("RGB", np.uint8),
    "gray.bmp": ("L", np.uint8),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_equal_those_of_jaxmed(tmp_path, name):
    mode, dtype = PICTURES[name]
    many = {"RGB": (3,), "RGBA": (4,)}.get(mode, ())
    pixels = RNG.integers(0, 255, (7, 9, *many)).astype(dtype)
    picture = PIL.Image.fromarray(pixels)
    picture = picture.convert("P") if mode == "P" else picture
    animation = {"save_all": True, "append_images": [picture.rotate(180)]}
    picture.save(tmp_path / name, **animation if "animated" in name else {})
    wanted = read_image(tmp_path / name)
    found = files.read(tmp_path / name)
    np.testing.assert_array_equal(found.array, wanted.array)
    assert found.array.dtype == wanted.array.dtype
    assert found.note == "; ".join(wanted.notes)
    assert bool(found.note) == name.startswith(("bits", "animated", "opacity"))


def test_pictures_that_would_be_misread_are_refused(tmp_path):
    PIL.Image.fromarray(np.zeros((5, 5, 4), np.uint8), "CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(contents.ModelError, match="CMYK"):
        files.read(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(contents.ModelError, match=r"b\.png: cannot be read"):
        files.read(tmp_path / "b.png")
    (tmp_path / "c.tif").touch()
    with pytest.raises(contents.ModelError, match=r"c\.tif: format"):
        files.read(tmp_path / "c.tif")


AFFINES = {
    "plain": np.diag([2.0, 3.0, 4.0, 1.0]),
    "flipped": np.diag([-2.0, 3.0, -4.0, 1.0]),
    "turned": np.array([[0, 0, 2.0, 1], [-3, 0, 0, 2], [0, 4, 0, 3], [0, 0, 0, 1]]),
    "askew": np.array([[2, 0.3, 0, 1], [-0.3, 2, 0, 2], [0, 0, -5, 3], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 2)])
def test_volumes_equal_those_of_jaxmed(tmp_path, name, shape):
    volume = nibabel.Nifti1Image(RNG.integers(0, 999, shape).astype(np.int16), AFFINES[name])
    volume.header["descrip"] = b"a name"
    volume.to_filename(tmp_path / "a.nii.gz")
    wanted, found = read_image(tmp_path / "a.nii.gz"), files.read(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found.array, wanted.array)
    np.testing.assert_array_equal(found.spacing, wanted.spacing)
    mask = RNG.integers(0, 3, wanted.array.shape[:3]).astype(np.int32)
    ours = write_mask(tmp_path / "ours" / "a.nii.gz", mask, wanted)
    theirs = files.write_mask(tmp_path / "theirs" / "a.nii.gz", mask, found)
    assert ours.name == theirs.name
    ours, theirs = nibabel.load(ours), nibabel.load(theirs)
    assert ours.header == theirs.header
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    with pytest.raises(contents.ModelError, match="is the image itself"):
        files.write_mask(tmp_path / "a.nii.gz", mask, found)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("found", [1, 3, 4])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 4)], ids=["picture", "volume"])
def test_channels_equal_those_of_jaxmed(shape, found, channels):
    """Four are no colours, and three of a volume are kinds of scans: none is dropped or mixed."""
    image = RNG.integers(0, 255, (*shape, found)).astype(np.uint8)
    if found != channels and (found == 4 or len(shape) == 3):
        with pytest.raises(ValueError, match=f"{found} channels"):
            grids.convert_channels(image, channels)
        with pytest.raises(UserError, match=f"{found} channels"):
            spatial.convert_channels(make_example(image, index=0), channels=channels)
        return
    wanted = spatial.convert_channels(make_example(image, index=0), channels=channels)["image"]
    np.testing.assert_array_equal(grids.convert_channels(image, channels), wanted)


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    side=st.integers(2, 16),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
)
@settings(max_examples=30, deadline=None)
def test_windows_equal_those_of_jaxmed(shape, side, overlap):
    window = (side,) * len(shape)
    regions = sliding_window.window_regions(shape, window, overlap=overlap)
    assert windows.window_regions(shape, window, overlap=overlap) == regions
    image = np.random.default_rng(1).normal(size=(*shape, 1)).astype(np.float32)

    def run(images):
        return np.concatenate([images, images**2], -1)

    options = {"window": window, "overlap": overlap, "fill": 0.5, "batch_size": 3}
    blend = sliding_window.Blend(shape, 2)
    for region in regions:
        blend.add(region, run(sliding_window.extract(image, region, fill=0.5)))
    np.testing.assert_array_equal(windows.predict_windows(run, image, **options), blend.result())


@pytest.mark.parametrize("shape", [(40, 37), (14, 15, 16)])
def test_instances_equal_those_of_jaxmed(shape):
    heights = smooth(shape)
    seeds = np.where(heights < np.quantile(heights, 0.1), np.arange(heights.size).reshape(shape), 0)
    mask = heights < np.quantile(heights, 0.8)
    wanted = skimage.segmentation.watershed(heights, seeds, mask=mask)
    np.testing.assert_array_equal(instances.flood(heights, seeds, mask), wanted)
    logits = np.stack([smooth(shape) * 0, smooth(shape) * 4, smooth(shape[::-1]).T * 4], -1)
    said = np.asarray(jax.nn.softmax(logits * 3))
    wanted = separate_instances(said, smallest=5)
    assert wanted.max() > 1
    np.testing.assert_array_equal(instances.separate_instances(said, smallest=5), wanted)


def test_boxes_equal_those_of_the_task():
    task = Detection(("a", "b", "c"), max_detections=20)
    low = RNG.uniform(-5, 50, (1, 400, 2))
    outputs = {
        "boxes": jnp.asarray(np.concatenate([low, low + RNG.uniform(2, 20, (1, 400, 2))], -1)),
        "logits": jnp.asarray(RNG.normal(size=(1, 400, 3))),
    }
    batch = {"image": jnp.zeros((1, 48, 56, 1))}
    wanted = jax.device_get(task.predict(outputs, batch))
    dense = {name: x[0] for name, x in jax.device_get(task.decode(outputs, batch)).items()}
    found = boxes.select_boxes(
        dense["boxes"],
        dense["scores"],
        iou_threshold=task.iou_threshold,
        max_boxes=task.max_detections,
        candidates=task.candidates,
    )
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name][0])


def test_decisions_equal_those_of_jaxmed():
    names = ["a", "b"]
    said = RNG.dirichlet(np.ones(2), 20)
    for fixed in (
        ClassDecisions(1.7, 0.3, 0.2, 0.9, (0.5, -0.5)),
        ClassDecisions(0.4, None, 0.2, 0.9),
    ):
        wanted = fixed.decide(said)
        for i, own in enumerate(said):
            found = decisions.decide(own, vars(fixed), names)
            np.testing.assert_allclose(found["calibrated"], wanted.probabilities[i], rtol=1e-9)
            assert found["decision"] == [names[wanted.predicted[i]]]
            assert found["set"] == [n for n, on in zip(names, wanted.sets[i], strict=True) if on]
    several = LabelDecisions((1.2, 0.8), (0.1, -0.2), (0.5, 0.3))
    wanted = several.decide(said)
    for i, own in enumerate(said):
        found = decisions.decide(own, vars(several), names)
        np.testing.assert_allclose(found["calibrated"], wanted.probabilities[i], rtol=1e-9)
        assert found["decision"] == [
            n for n, on in zip(names, wanted.predicted[i], strict=True) if on
        ]
    assert decisions.decide(said[0], None, names) == {}


def test_rounding_does_not_decide_on_the_case_that_set_a_threshold():
    said, names = np.array([[0.7, 0.3], [0.6, 0.4]]), ["a", "b"]
    classes = ClassDecisions(1.0, 0.4, 0.3, 0.9)
    labels = LabelDecisions((1.0, 1.0), (0.0, 0.0), (0.6, 0.4))
    for own in (said, said * (1 - 3e-7), said * (1 + 3e-7)):
        for fixed, predicted in ((classes, [0, 1]), (labels, [[1, 0], [1, 1]])):
            decided = fixed.decide(own)
            np.testing.assert_array_equal(decided.predicted, predicted)
            model = Model({"class_names": names, "decisions": vars(fixed)}, lambda _: {})
            assert compare_decided(fixed, model, [*said], [*own]) == {"decisions": 0}
            assert compare_decided(fixed, model, [*said], [*own[::-1]]) == {"decisions": 1}
        np.testing.assert_array_equal(classes.decide(own).sets, [[1, 1], [1, 1]])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.int32])
def test_weights_are_safetensors(dtype):
    arrays = {"a/b": RNG.normal(size=(3, 5)).astype(dtype), "c": np.zeros((), dtype)}
    packed = contents.pack_arrays(arrays, metadata={"format": "test"})
    read = contents.unpack_arrays(packed, where="here")
    # Their reader for NumPy has no bfloat16.
    theirs = {name: entry["data"] for name, entry in safetensors.deserialize(packed)}
    assert read.keys() == theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
        assert bytes(theirs[name]) == array.tobytes()
    if dtype != jnp.bfloat16:
        again = contents.unpack_arrays(safetensors.numpy.save(arrays), where="here")
        np.testing.assert_array_equal(again["a/b"], arrays["a/b"])


@given(place=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 220))
@settings(max_examples=60, deadline=None)
def test_damaged_weights_are_told_or_harmless(place, value, cut):
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)}
    packed = bytearray(contents.pack_arrays(arrays, metadata={}))
    packed[place % len(packed)] = value
    for content in (bytes(packed), bytes(packed[:cut])):
        try:
            found = contents.unpack_arrays(content, where="here")
        except contents.ModelError as error:
            assert "here is damaged" in str(error)
        else:
            assert sum(x.nbytes for x in found.values()) <= 2 * len(content)


def test_members_of_artefacts_are_checked_before_they_are_read(tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("description.json", b" " * (contents.MOST_WORDS + 1))
    with pytest.raises(contents.ModelError, match="bytes long"):
        contents.Contents(path).description()
    path.write_bytes(zip_parts({"description.json": b'{"version": 99}'}))
    with pytest.raises(contents.ModelError, match="layout 99"):
        contents.Contents(path).description()


def test_an_archive_that_lies_of_what_is_packed_is_refused(tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(contents.WEIGHTS, bytes(2**26))
        packed = archive.getinfo(contents.WEIGHTS).compress_size
    content = path.read_bytes()
    place = content.rindex(packed.to_bytes(4, "little"))  # in the directory at the end
    path.write_bytes(content[:place] + (2**25).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(contents.ModelError, match="beyond reason"):
        contents.Contents(path).read(contents.WEIGHTS)


@pytest.mark.parametrize(
    "places", [[(0, 8), (0, 8)], [(0, 8), (4, 12)], [(0, 4), (8, 12)], [(0, 4)]]
)
def test_arrays_lie_one_after_another(places):
    """Else a small file could ask for any amount of memory."""
    entries = {
        str(number): {"dtype": "I8", "shape": [end - begin], "data_offsets": [begin, end]}
        for number, (begin, end) in enumerate(places)
    }
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(12)
    with pytest.raises(contents.ModelError, match="overlap, or leave gaps"):
        contents.unpack_arrays(content, where="here")


def test_damaged_files_are_refused_as_by_jaxmed(tmp_path):
    nibabel.Nifti1Image(RNG.normal(size=(9, 8, 7)), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    np.save(tmp_path / "b.npy", np.zeros((9, 8), np.uint8))
    packed = bytearray((tmp_path / "a.nii.gz").read_bytes())
    packed[-6] ^= 1  # of the checksum
    (tmp_path / "a.nii.gz").write_bytes(packed)
    with (tmp_path / "b.npy").open("ab") as stream:
        stream.write(b"more")
    for name in ("a.nii.gz", "b.npy"):
        with pytest.raises(contents.ModelError, match=name):
            files.read(tmp_path / name)
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


def test_what_is_assumed_of_a_file_is_told_as_by_jaxmed(tmp_path):
    def save(name, values, *, sform, qform):
        image = nibabel.Nifti1Image(values, np.eye(4))
        image.set_sform(2 * np.eye(4), sform)
        image.set_qform(np.eye(4), qform)
        image.to_filename(tmp_path / name)

    flat = np.zeros((4, 4, 4), np.int16)
    save("assumed.nii", flat, sform=0, qform=0)
    save("differ.nii", flat, sform=1, qform=1)
    save("rounded.nii", np.full((4, 4, 4), 2**24 + 1, np.int32), sform=1, qform=0)
    np.save(tmp_path / "array.npy", flat[..., None])
    notes = set()
    for path in sorted(tmp_path.iterdir()):
        notes.add(files.read(path).note)
        assert (files.read(path).note,) == read_image(path).notes
    assert len(notes) == 4 and "" not in notes


def test_a_picture_of_another_format_is_refused_as_by_jaxmed(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(path, format="TIFF")
    with pytest.raises(contents.ModelError, match=r"a\.png: is no .* whatever its name"):
        files.read(path)
    with pytest.raises(UserError, match=r"a\.png"):
        read_image(path)


def test_of_two_that_claim_a_folder_at_once_one_gets_it(tmp_path, monkeypatch):
    both, looked, got = threading.Barrier(2), set(), []
    look = files.check_output

    def look_together(output, origin):
        look(output, origin)
        if origin["step"] not in looked:
            looked.add(origin["step"])
            both.wait(30)

    def claim(step):
        try:
            files.claim(tmp_path / "out", {"step": step})
            got.append(step)
        except contents.ModelError as error:
            assert "by other weights" in str(error)

    monkeypatch.setattr(files, "check_output", look_together)
    threads = [threading.Thread(target=claim, args=(step,)) for step in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 1
    assert json.loads((tmp_path / "out" / files.ORIGIN_FILE).read_text()) == {"step": got[0]}


def described(task):
    return {
        "task": task,
        "ndim": 2,
        "class_names": ["background", "lesion"],
        "multilabel": False,
        "instances": False,
        "prepare": RULES
        | {"size": () if task == "segmentation" else (8, 8), "normalization": "zscore"},
        "windows": {"size": [8, 8], "overlap": 0.5, "fill": 0.0, "batch": 1},
        "trained_on": {"channels": 1, "gray_only": True, "dtypes": ["float32"]},
        "columns": ["file", "prediction"],
        "decisions": None,
        "score_threshold": 0.3,
        "suppression": {"iou_threshold": 0.6, "max_boxes": 5, "candidates": 9},
    }


def test_pictures_that_jaxmed_would_search_in_parts_are_refused(monkeypatch):
    said = {"boxes": np.zeros((1, 9, 4)), "scores": np.zeros((1, 9, 2))}
    exported = Model(described("detection"), lambda _: said)
    monkeypatch.setattr(model, "LARGE", 16 * 16)
    assert not exported.predict(np.zeros((16, 16), np.float32))["scores"].size
    with pytest.raises(contents.ModelError, match="searched part by part"):
        exported.predict(np.zeros((16, 17), np.float32))


NOT_NUMBERS = {
    "classification": {"probabilities": np.full((1, 2), np.nan)},
    "detection": {"boxes": np.zeros((1, 9, 4)), "scores": np.full((1, 9, 2), np.nan)},
    "segmentation": {"probabilities": np.full((1, 8, 8, 2), np.nan)},
}


@pytest.mark.parametrize("task", NOT_NUMBERS)
def test_what_is_no_number_is_no_prediction(task):
    exported = Model(described(task), lambda _: NOT_NUMBERS[task])
    with pytest.raises(contents.ModelError, match="no number"):
        exported.predict(np.zeros((12, 12), np.float32))


def images_in(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        np.save(folder / f"{name}.npy", np.zeros((12, 12), np.float32))
    return folder


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_what_was_predicted_before_the_end_is_kept(tmp_path, end):
    calls = []

    def run(_):
        calls.append(1)
        if len(calls) == 3:
            raise end
        return {"probabilities": np.array([[0.3, 0.7]])}

    output = tmp_path / "out"
    output.mkdir()
    named = command.find([str(images_in(tmp_path / "in", *"abc"))], output=output)
    with pytest.raises(end):
        command.predict_files(Model(described("classification"), run), named, output)
    lines = (output / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["a.npy", "lesion"], ["b.npy", "lesion"]]


def test_a_mask_that_cannot_be_written_keeps_no_other_from_it(tmp_path, capsys):
    images_in(tmp_path / "in" / "x", "a")
    np.save(tmp_path / "in" / "y.npy", np.zeros((12, 12), np.float32))
    output = tmp_path / "out"
    output.mkdir()
    (output / "x").write_text("no folder")
    half = {"probabilities": np.full((1, 8, 8, 2), 0.5)}
    exported = Model(described("segmentation"), lambda _: half)
    named = command.find([str(tmp_path / "in")], output=output)
    assert command.predict_files(exported, named, output) == 1
    assert (output / "y.npy").is_file()
    assert "a.npy: cannot be written" in capsys.readouterr().err


def test_an_earlier_table_is_replaced_in_words(tmp_path, capsys):
    said = {"probabilities": np.array([[0.3, 0.7]])}
    exported = Model(described("classification"), lambda _: said)
    output = tmp_path / "out"
    output.mkdir()
    named = command.find([str(images_in(tmp_path / "in", "a"))], output=output)
    for replaced in (False, True):
        command.predict_files(exported, named, output)
        assert ("is replaced" in capsys.readouterr().out) == replaced


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_reduced_weights_are_near(dtype, ensemble):
    kernel = RNG.normal(size=(2, 3, 3, 4)).astype(np.float32) * np.array([1, 10, 0, 0.1], "f")
    variables = {"params": {"conv": {"kernel": kernel, "bias": kernel[..., 0, 0, :]}}}
    reduced = reduce_arrays(name_arrays(variables), dtype, ensemble=ensemble)
    expanded = expand_arrays(reduced)["params"]["conv"]
    error = np.abs(expanded["kernel"] - kernel)
    if dtype == "int8":
        axes = (1, 2) if ensemble else (0, 1, 2)
        # Half a step of a channel's own scale.
        assert (error <= np.abs(kernel).max(axes, keepdims=True) / 254 * 1.001).all()
        np.testing.assert_array_equal(expanded["bias"], variables["params"]["conv"]["bias"])
        assert reduced["params/conv/kernel"].dtype == np.int8
    else:
        assert (error <= {"float32": 0, "bfloat16": 2**-8}[dtype] * np.abs(kernel)).all()


def test_programs_come_back_without_their_own_file_format():
    weights = [np.arange(3, dtype=np.float32)]

    def function(weights, images):
        return {"sum": (images * weights[0]).sum((1, 2)), "twice": 2 * images}

    module, rules = export_program(function, weights, ("batch", "4*rows", "3"))
    call = jax.jit(rebuild(module, rules, weights).call)
    for shape in ((2, 4, 3), (5, 8, 3)):
        images = RNG.normal(size=shape).astype(np.float32)
        found = call(weights, images)
        np.testing.assert_allclose(found["sum"], (images * weights[0]).sum((1, 2)), rtol=1e-5)
        np.testing.assert_array_equal(found["twice"], 2 * images)
    with pytest.raises(ValueError, match="rows"):
        call(weights, np.zeros((1, 6, 3), np.float32))


OPERATIONS = {
    "mean": lambda x: x.mean((1, 2)),
    "largest": lambda x: x.max(-1),
    "flip": lambda x: jnp.flip(x, (1, 2)),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0)), constant_values=-jnp.inf).max(1),
    "slice": lambda x: jax.lax.slice_in_dim(x, 1, 5, 2, axis=1),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], -1),
    "power": lambda x: x**3 / jnp.sqrt(1 + x**2),
    "choose": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "turn": lambda x: x.transpose(0, 2, 3, 1).reshape(x.shape[0], -1),
    "constant": lambda x: x + jnp.arange(4.0),
    "convolution": lambda x: jax.lax.conv_general_dilated(
        x,
        jnp.ones((3, 3, 4, 2)),
        (2, 1),
        ((0, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_the_same_in_onnx(name):
    operation = OPERATIONS[name]
    content = write_onnx(
        lambda weights, images: {"out": operation(images * weights["w"])},
        {"w": np.float32([1, -2, 3, 0.5])},
        (6, 5, 4),
    )
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = RNG.normal(size=(batch, 6, 5, 4)).astype(np.float32)
        wanted = operation(images * np.float32([1, -2, 3, 0.5]))
        [found] = session.run(["out"], {"images": images})
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_unknown_operations_are_refused_by_name():
    with pytest.raises(UserError, match="'sort'"):
        write_onnx(lambda weights, images: {"out": jnp.sort(images)}, {}, (4, 1))
