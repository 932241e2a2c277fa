"""Exported runs predict what the run does, without jaxmed."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio.v3 as iio
import jax
import nibabel
import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file
from small_runs import untrained_run

from jaxmed.build import export_checks
from jaxmed.build.config import flatten, write_json
from jaxmed.build.decisions import read_decisions
from jaxmed.build.explained import RunToExplain
from jaxmed.build.exporting import export_run
from jaxmed.build.familiarity import read_familiarity
from jaxmed.build.features import FeatureReader
from jaxmed.build.predictions import predict_run
from jaxmed.build.trained import load_run
from jaxmed.evaluation.box_decisions import BoxDecisions
from jaxmed.evaluation.decisions import ClassDecisions
from jaxmed.inference.export import zip_parts
from jaxmed.inference.standalone import ModelError, load, model
from jaxmed.inference.standalone.description import mistake_in
from jaxmed.inference.standalone.programs import check_calls
from jaxmed.types import UserError

RUNS = {
    "classification": ("classification", {}),
    "detection": ("detection", {"data.fit": "pad"}),
    "segmentation": ("segmentation", {"evaluation.flips": True}),
    "instances": ("segmentation", {"data.masks": "instance"}),
    "volumes": (
        "segmentation",
        {"data.kind": "body", "data.ndim": 3, "data.extent": (16,), "model.features": (4, 8)},
    ),
    "classified volumes": ("classification", {"data.ndim": 3, "data.extent": (16,)}),
    "detection in volumes": ("detection", {"data.ndim": 3, "data.extent": (16,)}),
    "several": ("segmentation", {"training.seeds": 2}),
}
FAST = ("classification", "segmentation")
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in RUNS]
KEYS = {"classification": "probabilities", "detection": "boxes", "segmentation": "voxels"}


DECIDED = {
    "classification": ClassDecisions(1.5, None, 0.3, 0.9),
    "detection": BoxDecisions(0.35, 1.2, 0.1),
}


def write_decisions(workdir, fixed):
    known = {"parameters_sha256": load_run(workdir).sha256, "cases": 8, "settings": []}
    write_json(workdir / "decisions.json", known | dataclasses.asdict(fixed))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs and data of the runs, each made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in made:
            task, settings = RUNS[name]
            workdir = folder / name.replace(" ", "_")
            made[name] = (workdir, *untrained_run(workdir, task, **settings)[1:])
            if name in DECIDED:
                write_decisions(workdir, DECIDED[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def artefact(runs, tmp_path_factory):
    """The artefact of a run and what it says of itself."""
    made = {}

    def get(name):
        if name not in made:
            output = tmp_path_factory.mktemp("artefact")
            made[name] = export_run(runs(name)[0], output=output)
        with zipfile.ZipFile(made[name]) as archive:
            return made[name], json.loads(archive.read("description.json"))

    return get


def write_files(source, folder, count=2):
    """Images of other sizes than those of training; volumes lie askew, one packed."""
    folder.mkdir()
    for row in range(count):
        image = source[row]["image"]
        image = np.concatenate([image, image[: 5 + 3 * row]])[..., 0]
        if image.ndim == 2:
            iio.imwrite(folder / f"{row}.png", image)
            continue
        affine = np.array([[0, -9.0, 0, 3], [0, 0, 12.0, 2], [9, 0, 0, -1], [0, 0, 0, 1]])
        volume = nibabel.Nifti1Image(image, affine)
        volume.to_filename(folder / f"{row}.nii{'.gz' if row else ''}")
    return folder


def contents(folder):
    """What predictions wrote, by name: tables, boxes, masks with their affine."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".csv":
            found[path.name] = list(csv.DictReader(path.read_text().splitlines()))
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        elif path.suffix == ".png":
            found[path.name] = iio.imread(path), None
        else:
            image = nibabel.load(path)
            found[path.name] = np.asarray(image.dataobj), image.affine
    return found


def assert_same(found, wanted):
    """Tables, boxes and masks agree to 1e-4 and in 99.99 % of the voxels."""
    assert found.keys() == wanted.keys()
    for name, was in wanted.items():
        got = found[name]
        if name.endswith(".csv"):
            assert [row.keys() for row in got] == [row.keys() for row in was]
            for mine, theirs in zip(got, was, strict=True):
                words = [k for k in was[0] if k in ("file", "prediction", "decision", "set")]
                assert [mine[k] for k in words] == [theirs[k] for k in words]
                numbers = [k for k in was[0] if k not in words]
                np.testing.assert_allclose(
                    [float(mine[k]) for k in numbers],
                    [float(theirs[k]) for k in numbers],
                    atol=1e-4,
                )
        elif name == "predicted_by.json":
            assert got == was
        elif name.endswith(".json"):
            assert len(got) == len(was) > 0 and got[0].keys() == was[0].keys()
            for key in [k for k in ("bbox", "score", "probability") if k in was[0]]:
                np.testing.assert_allclose(
                    [box[key] for box in got], [box[key] for box in was], atol=2e-3
                )
        else:
            assert got[0].dtype == was[0].dtype
            assert (got[0] == was[0]).mean() >= 0.9999
            assert len(np.unique(was[0])) > 1
            np.testing.assert_array_equal(got[1], was[1])


@pytest.mark.parametrize("name", CASES)
def test_artefact_equals_the_predictor(artefact, name):
    path, description = artefact(name)
    checked = description["checked"]
    assert checked["cases"] > 0
    assert not checked["made_up"]
    assert KEYS[RUNS[name][0]] in checked["differences"]
    assert max(checked["differences"].values()) <= 1e-4
    assert description["program"]["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["program"]["input"][0][0] == "batch"
    assert path.name == "model.zip"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_artefact_predicts_files_without_jaxmed(runs, artefact, tmp_path, name):
    workdir, source, _ = runs(name)
    files = write_files(source, tmp_path / "files")
    predict_run(workdir, [str(files)], output=tmp_path / "wanted")
    # Imports of what a clean environment lacks fail, and the working folder holds no jaxmed.
    code = (
        "import runpy, sys\n"
        "for name in ('jaxmed', 'flax', 'flatbuffers', 'skimage', 'jaxtyping', 'orbax'):\n"
        "    sys.modules[name] = None\n"
        "path = sys.argv.pop(1)\n"
        "runpy.run_path(path, run_name='__main__')\n"
    )
    command = [sys.executable, "-I", "-c", code, str(artefact(name)[0])]
    command += [f"--output={tmp_path / 'found'}", str(files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(contents(tmp_path / "found"), contents(tmp_path / "wanted"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "instances"])
def test_onnx_predicts_the_same(runs, tmp_path, name):
    workdir, source, _ = runs(name)
    image, spacing = source[0]["image"], source[0]["spacing"]
    export_run(workdir, output=tmp_path, format="onnx")
    wanted = load_run(workdir).predict_image(image, spacing=spacing)
    found = load(tmp_path).predict(image, spacing=spacing.tolist())
    difference = export_checks.compare([wanted], [found])
    export_checks.check_equal(difference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detection", "several"])
def test_weights_predict_as_a_run_does(runs, tmp_path, name):
    workdir, source, _ = runs(name)
    export_run(workdir, output=tmp_path / "weights", format="safetensors")
    assert load_run(tmp_path / "weights").sha256 == load_run(workdir).sha256
    files = write_files(source, tmp_path / "files", count=1)
    for folder, output in ((workdir, "wanted"), (tmp_path / "weights", "found")):
        predict_run(folder, [str(files)], output=tmp_path / output)
    assert_same(contents(tmp_path / "found"), contents(tmp_path / "wanted"))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_rounded_weights_keep_what_the_validation_part_fixed(runs, tmp_path, dtype):
    workdir = tmp_path / "run"
    original, source, _ = runs("classification")
    shutil.copytree(original, workdir)
    known = json.loads((workdir / "config.json").read_text())
    known["config"]["evaluation"]["familiarity"] = 10
    (workdir / "config.json").write_text(json.dumps(known))
    run = load_run(workdir)
    read = FeatureReader(RunToExplain(run))
    [(_, windows)] = read.windows([run.experiment.prepare(source[0])])
    np.savez(
        workdir / "familiarity.npz",
        mean=windows[0],
        precision=np.eye(len(windows[0]), dtype=np.float32),
        threshold=0.5,
        layer=read.layer.name,
        cases=1,
        windows=1,
        parameters_sha256=run.sha256,
    )
    export_run(workdir, output=tmp_path / "weights", format="safetensors", dtype=dtype)
    rounded = load_run(tmp_path / "weights")
    assert rounded.sha256 != run.sha256
    fixed, cases = read_decisions(tmp_path / "weights", rounded)
    assert (fixed.temperature, fixed.set_threshold, cases) == (1.5, 0.3, 8)
    judge = read_familiarity(tmp_path / "weights", rounded)
    assert (judge.fixed.threshold, judge.cases) == (0.5, 1)
    np.testing.assert_array_equal(judge.fixed.mean, windows[0])


def test_weights_are_named_by_their_path_and_read_by_anybody(runs, tmp_path):
    workdir, _, _ = runs("segmentation")
    export_run(workdir, output=tmp_path, format="safetensors")
    arrays = load_file(tmp_path / "weights.safetensors")
    told = json.loads((tmp_path / "description.json").read_text())["arrays"]
    assert {name: list(x.shape) for name, x in arrays.items()} == {
        name: entry["shape"] for name, entry in told.items()
    }
    params = load_run(workdir).variables["params"]
    kernel = params["encoder0"]["conv0"]["conv"]["kernel"]
    np.testing.assert_array_equal(arrays["params/encoder0/conv0/conv/kernel"], kernel)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["data"]["path"] == ""


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_fewer_bits_are_smaller_and_say_what_they_cost(runs, artefact, tmp_path, dtype, capsys):
    workdir, _, split = runs("segmentation")
    path = export_run(workdir, output=tmp_path, dtype=dtype)
    with zipfile.ZipFile(path) as archive:
        small = archive.getinfo("weights.safetensors").file_size
        description = json.loads(archive.read("description.json"))
    checked = description["checked"]
    whole, known = artefact("segmentation")
    assert known["parameters_sha256"] == load_run(workdir).sha256
    # Of the weights that predict, as those exported by themselves have.
    folder = export_run(workdir, output=tmp_path / "a", dtype=dtype, format="safetensors")
    assert description["parameters_sha256"] == load_run(folder).sha256 != load_run(workdir).sha256
    with zipfile.ZipFile(whole) as archive:
        assert small < archive.getinfo("weights.safetensors").file_size
    assert {"before", "after"} == checked["cost"]["dice"].keys()
    assert f"by {dtype}" in capsys.readouterr().out


def test_run_and_export_take_the_same_arrays(runs, artefact):
    workdir, source, _ = runs("segmentation")
    image = source[0]["image"]
    predictors = (
        (load_run(workdir).predict_image, np.array, UserError),
        (load(artefact("segmentation")[0]).predict, list, ModelError),
    )
    for predict, listed, error in predictors:
        for spacing in ([-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [1.0, 1.0, 1.0]):
            with pytest.raises(error, match="expected 2 positive numbers of mm"):
                predict(image, spacing=listed(spacing))
        np.testing.assert_array_equal(predict(np.float64(image)), predict(np.float32(image)))
        with pytest.raises(error, match="complex"):
            predict(image.astype(complex))


def test_what_fewer_bits_cost_is_measured_without_the_test_part(tmp_path):
    workdir = tmp_path / "run"
    _, source, _ = untrained_run(workdir, "classification", **{"training.folds": 2})
    ids = json.loads((workdir / "split.json").read_text())
    ids["test"] = [ids["fold0"].pop(0)]
    write_json(workdir / "split.json", ids)
    cases = export_checks.find_cases(workdir, load_run(workdir), most=None)
    wanted = {*ids["fold0"], *ids["fold1"]}
    assert {source.ids[row] for row in cases.rows} == wanted and not wanted & {*ids["test"]}


def test_a_network_sees_images_of_other_sizes(runs, artefact):
    """Of a fully convolutional network batch and sizes are free, in whole steps."""
    path, description = artefact("segmentation")
    assert description["program"]["input"][0] == ["batch", "4*side0", "4*side1", "1"]
    run = load(path).run
    for shape in ((1, 8, 12, 1), (3, 20, 4, 1)):
        found = run(np.zeros(shape, np.float32))["probabilities"]
        assert found.shape[:-1] == shape[:-1]
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    with pytest.raises(ModelError, match="does not run here"):
        run(np.zeros((1, 9, 12, 1), np.float32))


@pytest.mark.parametrize(
    "options", [{}, {"format": "safetensors", "dtype": "bfloat16"}], ids=["all bits", "fewer"]
)
def test_an_export_that_differs_is_not_written(runs, tmp_path, monkeypatch, options):
    monkeypatch.setattr(export_checks, "MOST", -1.0)
    with pytest.raises(UserError, match="probabilities differ .* nothing was written"):
        export_run(runs("classification")[0], output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_that_decides_otherwise_is_not_written(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "decide", lambda *_: {"decision": [], "set": []})
    with pytest.raises(UserError, match="decisions differ"):
        export_run(runs("classification")[0], output=tmp_path / "out")


def test_without_data_made_up_images_are_compared(runs, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(runs("classification")[0], workdir)
    run = json.loads((workdir / "config.json").read_text())
    run["config"]["data"] |= {"layout": "class_folders", "path": str(tmp_path / "gone")}
    (workdir / "config.json").write_text(json.dumps(run))
    path = export_run(workdir, output=tmp_path / "out")
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("description.json"))["checked"]["made_up"]
    assert "data cannot be read" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.path"):
        export_run(workdir, output=tmp_path / "other", dtype="int8")


@pytest.mark.slow
def test_boxes_of_several_models_are_refused_as_onnx(tmp_path):
    untrained_run(tmp_path / "run", "detection", **{"training.seeds": 2})
    with pytest.raises(UserError, match="several models"):
        export_run(tmp_path / "run", output=tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
    export_run(tmp_path / "run", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((8, 8, 8, 1), np.uint8), "2 spatial axes"),
        (np.zeros((8, 8, 5), np.uint8), "5 channels"),
        (np.zeros((8, 8), np.complex128), "complex128"),
        (np.full((8, 8), np.nan, np.float32), "NaN"),
        (np.zeros((0, 8), np.uint8), "shape"),
    ],
)
def test_other_images_are_refused(artefact, image, told):
    with pytest.raises(ModelError, match=told):
        load(artefact("classification")[0]).predict(image)


@pytest.mark.parametrize("part", ["description.json", "weights.safetensors", "program.stablehlo"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damaged_artefacts_say_so(artefact, tmp_path, part, damage):
    path, _ = artefact("classification")
    broken = tmp_path / "model.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(broken, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == part and damage == "missing":
                continue
            if entry.filename == part and damage == "cut":
                content = content[: len(content) // 2]
            new.writestr(entry.filename, content)
    if damage == "changed":
        content = bytearray(broken.read_bytes())
        with zipfile.ZipFile(broken) as archive:
            place = archive.getinfo(part).header_offset + 100
        content[place] ^= 255
        broken.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"missing|damaged|does not run"):
        load(broken).predict(np.zeros((32, 32), np.uint8))


def test_what_is_no_artefact_says_so(tmp_path, artefact):
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ModelError, match="no exported model"):
        load(tmp_path / "text.zip")
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "gone.zip")
    with pytest.raises(ModelError, match="missing"):
        load(tmp_path)
    half = Path(artefact("classification")[0]).read_bytes()
    (tmp_path / "half.zip").write_bytes(half[: len(half) // 2])
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path / "half.zip")


def test_boxes_are_compared_in_the_digits_that_they_have():
    wanted = {
        "boxes": np.array([[10, 10, 20, 20], [30, 40, 50, 60]], np.float32),
        "scores": np.array([0.9, 0.8], np.float32),
        "labels": np.array([0, 1]),
    }
    turned = {name: values[::-1] for name, values in wanted.items()}
    assert export_checks.compare([wanted], [turned]) == {"boxes": 0, "scores": 0}
    for factor, told in ((1, 0.01), (10, 0.01 / 6)):
        moved = wanted["boxes"] * factor + np.float32(0.01)
        found = export_checks.compare(
            [{**wanted, "boxes": wanted["boxes"] * factor}], [{**wanted, "boxes": moved}]
        )
        assert found["boxes"] == pytest.approx(told, rel=1e-2)
    others = {**wanted, "labels": np.array([0, 0])}
    fewer = {name: values[:1] for name, values in wanted.items()}
    for found in (others, fewer):
        with pytest.raises(UserError, match="boxes differ"):
            export_checks.check_equal(export_checks.compare([wanted], [found]))


@pytest.mark.parametrize(
    "name", ["classification", pytest.param("detection", marks=pytest.mark.slow)]
)
def test_what_the_validation_part_decided_is_exported(artefact, name):
    _, description = artefact(name)
    fixed = dataclasses.asdict(DECIDED[name])
    assert {k: v for k, v in description["decisions"].items() if k != "biases"} == {
        k: v for k, v in fixed.items() if k != "biases"
    }
    if name == "detection":
        assert description["score_threshold"] == 0.35


def test_no_folder_of_this_machine_is_exported(runs, artefact, tmp_path):
    path, _ = artefact("classification")
    with zipfile.ZipFile(path) as archive:
        program = archive.read("program.stablehlo")
    assert str(Path(__file__).parents[2]).encode() not in program
    assert b"site-packages" not in program
    workdir = tmp_path / "run"
    shutil.copytree(runs("classification")[0], workdir)
    known = json.loads((workdir / "config.json").read_text())
    known["config"]["plan"] = "somewhere/secret/plan.json"
    known["config"]["model"]["init"] = "somewhere/secret"
    known["config"]["data"]["prepared"] = "somewhere/secret"
    known["data"]["notes"] = ["Left out: secret.png"]
    (workdir / "config.json").write_text(json.dumps(known))
    export_run(workdir, output=tmp_path / "weights", format="safetensors")
    for file in (tmp_path / "weights").glob("*.json"):
        assert "secret" not in file.read_text()
    config = json.loads((tmp_path / "weights/config.json").read_text())["config"]
    assert not [value for value in flatten(config).values() if "/" in str(value)]


def test_nothing_of_a_run_or_another_export_is_written_over(runs, tmp_path):
    workdir, *_ = runs("classification")
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match="is the workdir of a run"):
        export_run(workdir, output=workdir, format="safetensors")
    assert (workdir / "config.json").read_bytes() == before
    (tmp_path / "description.json").write_text('{"format": "onnx"}')
    with pytest.raises(UserError, match="holds an export of onnx"):
        export_run(workdir, output=tmp_path, format="safetensors")
    (tmp_path / "description.json").rename(tmp_path / "weights.safetensors")
    for format in ("onnx", "safetensors"):
        with pytest.raises(UserError, match="holds files that are no export"):
            export_run(workdir, output=tmp_path, format=format)
    (tmp_path / "weights.safetensors").unlink()
    for _ in range(2):
        export_run(workdir, output=tmp_path, format="safetensors")
    with pytest.raises(ModelError, match="holds weights alone"):
        load(tmp_path)


def test_a_program_that_calls_native_code_is_refused():
    like = jax.ShapeDtypeStruct((2,), "float32")
    exported = export.export(
        jax.jit(jax.ffi.ffi_call("strange_target", like)),
        platforms=("cpu",),
        disabled_checks=[export.DisabledSafetyCheck.custom_call("strange_target")],
    )(like)
    with pytest.raises(ModelError, match="its program calls strange_target"):
        check_calls(exported.mlir_module_serialized, "model.zip")
    with pytest.raises(ModelError, match="is damaged"):
        check_calls(b"no program", "model.zip")


def test_a_small_file_that_inflates_and_a_nested_description_are_refused(tmp_path):
    for name, text in (("bomb", b" " * 2**24), ("nested", b"[" * 200_000)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("description.json", text)
        with pytest.raises(ModelError, match="damaged"):
            load(tmp_path / name)


NONSENSE = {
    "task": "juggling",
    "ndim": True,
    "class_names": "ab",
    "prepare": [1],
    "prepare.size": [100_000, 100_000],
    "prepare.spacing": [0.0, 1.0],
    "prepare.options": [["level", 1.0], ["width", "wide"]],
    "windows.size": [2**40, 1],
    "windows.batch": 10**7,
    "windows.overlap": -5,
    "windows.fill": math.nan,
    "trained_on.dtypes": [8],
    "program.weights": ["a", "a"],
    "program.input": ["batch", "float32"],
    "decisions": [1.0],
    "decisions.temperature": 0.0,
    "decisions.threshold": "high",
    "decisions.biases": [1.0] * 9,
    "columns": [[[]]],
}


@pytest.mark.parametrize("key", NONSENSE)
def test_a_description_that_says_nonsense_is_refused_before_memory_is_taken(
    artefact, tmp_path, key
):
    _, description = artefact("classification")
    assert not mistake_in(description)
    *folders, last = key.split(".")
    place = description
    for folder in folders:
        place = place[folder]
    for value in (NONSENSE[key], None):
        place[last] = value
        if value is None:
            del place[last]
        path = tmp_path / "model.zip"
        path.write_bytes(zip_parts({"description.json": json.dumps(description).encode()}))
        with pytest.raises(ModelError, match=f"damaged .{key}.* is .*, expected "):
            load(path)
