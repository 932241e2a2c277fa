"""A data set looked at and planned, without training."""

import dataclasses
import json
import re

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
from small_runs import small_config

from jaxmed.build import datasets
from jaxmed.build import resolve as resolving
from jaxmed.build.planning import PLAN_FILE, QUALITY_FILE, plan_run, write_split
from jaxmed.build.runs import train_run
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.data.splits import split_cases
from jaxmed.preprocessing.plan import is_ct
from jaxmed.types import DatasetInfo, UserError


@pytest.fixture
def folder(tmp_path):
    write_phantoms(tmp_path / "data", layout="pairs", count=20, size=32)
    return tmp_path


def config_of(folder, **settings):
    plain = {"model.features": (), "data.batch_size": 0, "training.steps": 0}
    path = {"data.path": str(folder / "data")}
    return small_config("segmentation", "pairs", **{**plain, **path, **settings})


def test_a_plan_is_written_and_can_be_trained_with(folder, capsys):
    assert plan_run(config_of(folder), folder / "plan")
    plan = json.loads((folder / "plan" / PLAN_FILE).read_text())
    assert {"data.patch", "model.features", "training.steps"} <= plan.keys()
    said = capsys.readouterr().out
    assert "data.patch" in said and "in its proportions" in said
    findings = json.loads((folder / "plan" / QUALITY_FILE).read_text())
    assert all(f"{f['severity']}: {f['kind']}" in said for f in findings)
    file = str(folder / "plan" / PLAN_FILE)
    train_run(config_of(folder, plan=file), folder / "run", dry_run=True)
    assert f"data.patch = {tuple(plan['data.patch'])!r}" in capsys.readouterr().out


def test_what_is_broken_is_told_and_stops_the_plan(folder, capsys):
    images = sorted((folder / "data").rglob("images/**/*.png"))
    images[0].write_bytes(images[0].read_bytes()[:100])
    iio.imwrite(images[1], np.full((32, 32), 9, np.uint8))
    assert not plan_run(config_of(folder), folder / "plan")
    said = capsys.readouterr().out
    assert images[0].name in said and "no plan" in said
    found = {f["kind"] for f in json.loads((folder / "plan" / QUALITY_FILE).read_text())}
    assert {"broken case", "image of one value"} <= found
    assert not (folder / "plan" / PLAN_FILE).exists()


def test_what_training_drops_is_neither_in_the_plan_nor_to_be_mended(folder, capsys):
    images = sorted((folder / "data").rglob("images/**/*.png"))
    images[0].write_bytes(images[0].read_bytes()[:100])
    assert plan_run(config_of(folder, **{"data.invalid": "drop"}), folder / "plan")
    said = capsys.readouterr().out
    assert "left out: broken case (1)" in said and "mend" not in said
    assert (folder / "plan" / PLAN_FILE).exists()


def test_what_another_kind_left_out_is_no_error_any_more(folder, capsys):
    images = sorted((folder / "data").rglob("images/**/*.png"))
    for image in images[:2]:
        iio.imwrite(image, np.full((32, 32), 9, np.uint8))
    config = config_of(folder)
    # Images of one value are all the same, and cured with them.
    assert plan_run(config, folder / "plan", leave_out=["image of one value"])
    said = capsys.readouterr().out
    assert "left out: image of one value (2)" in said
    assert "left out: identical images" in said and "error" not in said


def test_what_was_agreed_to_is_left_out(folder, capsys):
    images = sorted((folder / "data").rglob("images/**/*.png"))
    images[0].write_bytes(images[0].read_bytes()[:100])
    assert not plan_run(config_of(folder), folder / "plan", leave_out=["outlying case"])
    assert "no plan" in capsys.readouterr().out
    kinds = ["broken case", "identical images"]  # of the second there is none
    assert plan_run(config_of(folder), folder / "plan", leave_out=kinds)
    assert (folder / "plan" / PLAN_FILE).exists()
    (folder / "plan/split.csv").rename(folder / "data/split.csv")
    assert "leaves out 1 case" in capsys.readouterr().out
    assert plan_run(config_of(folder), folder / "again")
    with pytest.raises(UserError, match="'cats' is nothing to leave cases out for"):
        plan_run(config_of(folder), folder / "plan", leave_out=["cats"])


LAYOUTS = {
    "class_folders": "classification",
    "medmnist": "classification",
    "pairs": "segmentation",
    "msd": "segmentation",
    "voc": "detection",
    "coco": "detection",
}


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_left_out_stays_out_in_every_layout(tmp_path, layout, parts):
    root = tmp_path / "data"
    write_phantoms(root, layout=layout, count=30, size=16, parts=parts)
    # Some layouts know no parts of their own, or have them in a manifest.
    config = small_config(LAYOUTS[layout], layout, **{"data.path": str(root)})

    def open_and_cut():
        source = datasets.make_source(config)
        cut, _ = split_cases(
            source.ids,
            patients=source.patients,
            labels=source.labels,
            parts=source.parts,
            seed=0,
        )
        return source, {part: {source.ids[row] for row in rows} for part, rows in cut.items()}, cut

    source, before, rows = open_and_cut()
    out = set()
    for _ in range(2):  # what was left out first must not come back
        gone = {rows["train"][1], rows["val"][0]}
        out |= {source.ids[row] for row in gone}
        write_split(root / "split.csv", root, source, rows, gone)
        source, after, rows = open_and_cut()
        assert after == {part: names - out for part, names in before.items()}
        assert not out & set(source.ids)
    assert any("4 cases of 30 left out" in note for note in source.notes)


@pytest.mark.parametrize("written", ["{}", "./{}", "{}:backslash"])
def test_patients_of_a_former_split_are_kept_however_its_files_are_written(tmp_path, written):
    root = tmp_path / "data"
    write_phantoms(root, layout="class_folders", count=12, size=16)
    config = small_config("classification", "class_folders", **{"data.path": str(root)})
    files = [case.images[0].relative_to(root) for case in datasets.make_source(config).cases]
    names = [written.partition(":")[0].format(file.as_posix()) for file in files]
    names = [name.replace("/", "\\") if "backslash" in written else name for name in names]
    lines = [f"{name},p{i // 2}" for i, name in enumerate(names)]
    (root / "split.csv").write_text("file,patient\n" + "\n".join(lines) + "\n")
    source = datasets.make_source(config)
    write_split(root / "split.csv", root, source, {"train": list(range(12))}, {3})
    again = datasets.make_source(config)
    assert again.patients == [p for row, p in enumerate(source.patients) if row != 3]


def test_cases_that_are_not_to_be_used_stop_nothing(tmp_path):
    root = tmp_path / "data"
    write_phantoms(root, layout="class_folders", count=12, size=16)
    (root / "odd").mkdir()
    iio.imwrite(root / "odd/colours.png", np.zeros((16, 16, 3), np.uint8))
    broken = next(path for path in sorted(root.rglob("*.png"))).parent / "broken.png"
    broken.write_bytes(b"no picture")
    (root / "stray.png").write_bytes(b"in no class")
    config = small_config("classification", "class_folders", **{"data.path": str(root)})
    with pytest.raises(UserError):
        datasets.make_source(config)
    names = ("odd/colours.png", broken.relative_to(root).as_posix(), "stray.png")
    (root / "manifest.csv").write_text("file,split\n" + "".join(f"{n},none\n" for n in names))
    source = datasets.make_source(config)
    assert len(source) == 12 and len(source.info.class_names) == 3
    assert source.info.channels == 1
    everything = [path.relative_to(root).as_posix() for path in root.rglob("*.png")]
    (root / "split.csv").write_text("file,split\n" + "".join(f"{n},none\n" for n in everything))
    with pytest.raises(UserError, match="split.csv leaves out all cases"):
        datasets.make_source(config)


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_boxes_of_pictures_that_are_not_to_be_used_stop_nothing(tmp_path, layout):
    root = tmp_path / "data"
    write_phantoms(root, layout=layout, count=6, size=32, parts=False)
    config = small_config("detection", layout, **{"data.path": str(root)})
    names = list(datasets.make_source(config).ids)
    bad = names[2]
    for file in [*root.rglob("*.xml"), *root.rglob("*.json")]:
        if layout == "voc" and file.stem == bad:
            text = re.sub(r"<xmax>.*?</xmax>", "<xmax>1</xmax>", file.read_text())
            file.write_text(re.sub(r"<xmin>.*?</xmin>", "<xmin>1</xmin>", text))
        elif layout == "coco":
            content = json.loads(file.read_text())
            [key] = [row["id"] for row in content["images"] if bad in row["file_name"]]
            for row in content["annotations"]:
                if row["image_id"] == key:
                    row["bbox"][2] = 0
            file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="area"):
        datasets.make_source(config)
    (root / "split.csv").write_text(f"id,split\n{bad},none\n")
    source = datasets.make_source(config)
    assert list(source.ids) == [name for name in names if name != bad]
    assert all(len(source[row]["boxes"]) for row in range(5))


def test_pairs_that_are_not_to_be_used_stop_nothing(tmp_path):
    root = tmp_path / "data"
    write_phantoms(root, layout="pairs", count=6, size=16)
    source = datasets.make_source(small_config("segmentation", "pairs", **{"data.path": str(root)}))
    odd, mismatched = source.cases[1], source.cases[4]
    iio.imwrite(odd.mask, np.full((16, 16), 77, np.uint8))
    iio.imwrite(mismatched.mask, np.zeros((9, 9), np.uint8))
    gone = [source.ids[1], source.ids[4]]
    (root / "split.csv").write_text("id,split\n" + "".join(f"{name},none\n" for name in gone))
    again = datasets.make_source(small_config("segmentation", "pairs", **{"data.path": str(root)}))
    assert again.ids == [name for name in source.ids if name not in gone]
    assert again.info.class_names == source.info.class_names


def test_what_else_a_split_said_is_kept_where_names_clash(tmp_path):
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    lines = ["file,patient,split"]
    for part in ("train", "val"):
        for name in "ab":
            for row in range(4):
                path = root / part / name / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                iio.imwrite(path, rng.integers(0, 255, (16, 16), np.uint8))
                lines.append(f"{path.relative_to(root)},p{row // 2}{part},{part}")
    (root / "split.csv").write_text("\n".join(lines))
    config = small_config("classification", "class_folders", **{"data.path": str(root)})
    source = datasets.make_source(config)
    write_split(root / "split.csv", root, source, source.parts, {0, 3})
    again = datasets.make_source(config)
    kept = [row for row in range(len(source)) if row not in (0, 3)]
    assert again.ids == [source.ids[row] for row in kept]
    assert again.patients == [source.patients[row] for row in kept]
    in_val = {source.ids[row] for row in source.parts["val"]} - {source.ids[0], source.ids[3]}
    assert {again.ids[row] for row in again.parts["val"]} == in_val


def test_what_the_headers_of_the_files_tell_is_in_the_table_and_in_json(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(10):
        for name in ("images", "masks"):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            affine = np.eye(4)
            affine[0, 3] = 0.05 * (name == "masks" and i == 3)
            values = rng.integers(0, 99, (8, 8, 8)).astype(np.int16)
            values = (values > 50).astype(np.int16) if name == "masks" else values
            values *= 1 + 254 * (name == "masks" and i == 4)  # 0 and 255 among masks of 0 and 1
            volume = nibabel.Nifti1Image(values, affine)
            nibabel.save(volume, tmp_path / "data" / name / f"case{i}.nii.gz")
    (tmp_path / "data/classes.txt").write_text("background\ncell\n")
    assert not plan_run(config_of(tmp_path), tmp_path / "plan")
    said = capsys.readouterr().out
    assert "warning: files slightly apart in space (1): case3: case3.nii.gz by 0.05 voxels" in said
    found = json.loads((tmp_path / "plan" / QUALITY_FILE).read_text())
    assert {"files slightly apart in space", "broken case"} <= {f["kind"] for f in found}
    (broken,) = [f for f in found if f["kind"] == "broken case"]
    assert "case4.nii.gz: mask holds labels 0 to 255" in " ".join(broken["cases"])


def test_a_gray_image_among_colours_is_not_called_broken(folder, capsys):
    images = sorted((folder / "data").rglob("images/**/*.png"))
    for image in images[1:]:
        iio.imwrite(
            image, np.repeat(iio.imread(image)[..., None], 3, -1) // np.array([1, 2, 3], np.uint8)
        )
    # Most images say how many channels the set has, the first one or not.
    assert not plan_run(config_of(folder), folder / "plan")
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if "error: other number of channels" in line]
    assert "(1)" in line and images[0].stem in line and "broken" not in said.split("no plan")[0]
    assert plan_run(config_of(folder, **{"data.channels": 3}), folder / "plan")


@pytest.mark.slow
def test_a_plan_fits_the_memory_as_it_is_measured(folder, monkeypatch, capsys):
    write_phantoms(folder / "images", layout="pairs", count=20, size=128)
    path = {"data.path": str(folder / "images")}
    # Few weights, so that the memory is that of the images.
    settings = {"training.epochs": 3.0, "data.batch_size": 0, "model.features": (16, 16, 16)}
    config = config_of(folder, **path, **settings)
    plan_run(config, folder / "large")
    large = json.loads((folder / "large" / PLAN_FILE).read_text())
    said = capsys.readouterr().out
    need = float(said.split("a step takes ")[1].split()[0])
    monkeypatch.setattr(resolving, "device_bytes", lambda: int(need * 2**30))  # a share is used
    plan_run(config, folder / "small")
    small = json.loads((folder / "small" / PLAN_FILE).read_text())
    assert small["data.batch_size"] < large["data.batch_size"]
    monkeypatch.setattr(resolving, "device_bytes", lambda: 2**18)
    with pytest.raises(UserError, match="GiB even so"):
        plan_run(config, folder / "tiny")
    said = capsys.readouterr().out
    assert said.count("a step takes") >= 4  # smaller batches, then a smaller patch


@pytest.mark.slow
def test_the_report_of_a_run_tells_what_was_found(folder):
    images = sorted((folder / "data").rglob("images/**/*.png"))
    iio.imwrite(images[1], iio.imread(images[0]))
    config = config_of(folder, **{"training.steps": 2})
    plan_run(config, folder / "run")
    train_run(config, folder / "run")
    page = (folder / "run/report.html").read_text()
    assert ">Data</h2>" in page and "identical images" in page


def test_sets_too_small_for_parts_are_looked_at_all_the_same(tmp_path, capsys):
    write_phantoms(tmp_path / "data", layout="pairs", count=2, size=32, parts=False)
    assert not plan_run(config_of(tmp_path), tmp_path / "plan")
    said = capsys.readouterr().out
    assert "error: parts (1): 2 cases are too few for 3 parts" in said and "plan:" in said


def test_intensities_are_of_ct_only_where_all_is_like_it():
    picture = {"least": [-1000.0], "dtypes": ["int16"]}
    info = DatasetInfo("set", "classification", 2, 1, ("a", "b"))
    assert is_ct(picture, info)
    assert not is_ct({**picture, "dtypes": ["int16", "uint8"]}, info)  # one scan among pictures
    assert not is_ct({"least": [-3141.0, 0.0], "dtypes": ["int16"]}, info)  # phase and magnitude
    assert not is_ct(picture, dataclasses.replace(info, kind="MRI"))
    assert is_ct({**picture, "least": [-90.0]}, dataclasses.replace(info, kind="CT"))


def test_a_wrong_path_is_told(folder):
    with pytest.raises(UserError, match="nowhere"):
        plan_run(config_of(folder, **{"data.path": str(folder / "nowhere")}), folder / "plan")


def test_kinds_of_which_there_is_nothing_and_other_labels_are_told(tmp_path, capsys):
    root = tmp_path / "data"
    write_phantoms(root, layout="class_folders", count=24, size=16, parts=True)
    images = sorted(root.rglob("train/*/*.png"))
    first, second = images[0], next(p for p in images if p.parent.name != images[0].parent.name)
    second.write_bytes(first.read_bytes())
    config = small_config("classification", "class_folders", **{"data.path": str(root)})
    plan_run(config, tmp_path / "plan", leave_out=["identical images"])
    said = capsys.readouterr().out
    assert "nothing was found that is called 'identical images'; there is: identical images" in said
    files = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.png"))]
    lines = [f"{name},{name.split('/')[1]}" for name in files]
    other = second.parent.name
    lines[0] = f"{files[0]},{other if files[0].split('/')[1] != other else first.parent.name}"
    (root / "manifest.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    [note] = [n for n in datasets.make_source(config).notes if "another label" in n]
    assert note.startswith("The manifest gives 1 image another label than the folder:")


def test_a_link_to_nowhere_is_a_broken_case(tmp_path, capsys):
    root = tmp_path / "data"
    write_phantoms(root, layout="class_folders", count=12, size=16)
    image = sorted(root.rglob("*.png"))[7]
    image.unlink()
    image.symlink_to(tmp_path / "gone.png")
    config = small_config("classification", "class_folders", **{"data.path": str(root)})
    for _ in range(2):  # also where a look is known already
        assert not plan_run(config, tmp_path / "plan")
        said = capsys.readouterr().out
        assert "error: broken case (1)" in said and image.name in said


def test_volumes_are_resampled_even_where_all_training_ones_are_alike():
    """What is predicted later may have other voxels."""
    config = small_config("segmentation", **{"data.ndim": 3, "data.kind": "body"})
    source = datasets.make_source(config)
    found, settings, fingerprint = resolving.resolve(config, source, range(3))
    assert settings["data.spacing"] == tuple(fingerprint["spacing"]) == tuple(found.data.spacing)
    assert fingerprint["unsized"] == 0
    pictures = small_config("segmentation")
    _, settings, _ = resolving.resolve(pictures, datasets.make_source(pictures), range(3))
    assert "data.spacing" not in settings


def test_volumes_whose_files_state_no_size_are_not_resampled(tmp_path):
    """To the one millimetre that is only assumed."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    volume = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    for name in "abc":
        np.save(tmp_path / f"images/{name}.npy", volume)
        np.save(tmp_path / f"masks/{name}.npy", (volume > 1).astype(np.uint8))
    config = small_config("segmentation", "pairs", **{"data.path": str(tmp_path)})
    found, settings, fingerprint = resolving.resolve(config, datasets.make_source(config), range(3))
    assert fingerprint["unsized"] == 3
    assert "data.spacing" not in settings and found.data.spacing == ()
