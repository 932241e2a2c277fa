"""Anybody's predictions, scored without a model."""

import csv
import json

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest

from jaxmed.build.comparison import compare_evaluations
from jaxmed.build.submissions import evaluate_predictions
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.metrics.detection import match_detections, summarize_detection
from jaxmed.types import UserError


@pytest.fixture
def masks(tmp_path):
    """A folder of true masks of {0, 1}, one of predictions that are the same, and the names."""
    rng = np.random.default_rng(0)
    for folder in ("truth", "predicted"):
        (tmp_path / folder).mkdir()
    for i in range(6):
        mask = np.zeros((20, 24), np.uint8)
        mask[3 : 9 + i, 4 : 10 + rng.integers(5)] = 1
        for folder in ("truth", "predicted"):
            iio.imwrite(tmp_path / folder / f"c{i}.png", mask)
    return tmp_path


def score(folder, truth="truth", predicted="predicted", **options):
    return evaluate_predictions(
        folder / predicted, folder / truth, output=folder / "scores", resamples=50, **options
    )


def values(summary):
    return {name: entry["value"] for name, entry in summary["metrics"].items()}


def test_the_truth_itself_is_perfect(masks):
    found = values(score(masks))
    assert found["dice"] == found["iou"] == found["nsd"] == 1 and found["hd95"] == 0
    with (masks / "scores/cases.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"c{i}" for i in range(6)]
    assert (masks / "scores/sizes.png").is_file()


def test_other_names_and_values_of_the_same_masks(masks):
    for path in (masks / "predicted").glob("*.png"):
        mask = iio.imread(path)
        path.unlink()
        iio.imwrite(path.with_name(f"{path.stem}_seg.tif"), 255 * mask)
    assert values(score(masks))["dice"] == 1


def test_a_missing_mask_counts_as_empty_and_a_strange_one_is_told(masks):
    (masks / "predicted/c3.png").rename(masks / "predicted/stranger.png")
    summary = score(masks)
    assert values(summary)["dice"] == pytest.approx(5 / 6)
    told = " ".join(summary["notes"])
    assert "1 of 6 cases have no prediction and count as empty: c3" in told
    assert "1 predictions fit no case and are left out: stranger.png" in told


def test_masks_that_fit_nothing_are_an_error(masks):
    for path in (masks / "predicted").glob("*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(UserError, match="fits no case of the truth"):
        score(masks)


def test_another_shape_or_class_is_refused_by_name(masks):
    iio.imwrite(masks / "predicted/c2.png", np.zeros((20, 25), np.uint8))
    with pytest.raises(UserError, match=r"c2.png has shape \(20, 25\)"):
        score(masks)
    iio.imwrite(masks / "predicted/c2.png", np.full((20, 24), 3, np.uint8))
    with pytest.raises(UserError, match="c2.png: holds 3 to 3; the classes of the truth"):
        score(masks)


def test_another_place_in_space_is_refused_and_millimetres_count(tmp_path):
    affine = np.diag([1.0, 2.0, 3.0, 1])
    mask = np.zeros((12, 10, 8), np.uint8)
    mask[2:8, 2:8, 2:6] = 1
    for folder in ("truth", "predicted"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            shift = np.roll(mask, 1, axis=2) if folder == "predicted" else mask
            nib.save(nib.Nifti1Image(shift, affine), tmp_path / folder / f"{name}.nii.gz")
    summary = score(tmp_path)
    assert values(summary)["hd95"] == pytest.approx(3.0)
    assert values(score(tmp_path, nsd_tolerance=3.0))["nsd"] == 1
    affine[0, 3] = 5
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "predicted/b.nii.gz")
    with pytest.raises(UserError, match="b.nii.gz.*voxels apart"):
        score(tmp_path)


def test_instances_of_a_set_by_part_and_subgroup(tmp_path):
    data = tmp_path / "set"
    write_phantoms(data, layout="pairs", kind="cells", count=24, size=32, parts=False)
    files = sorted((data / "masks").iterdir())
    with (data / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "scanner", "patient"])
        for i, path in enumerate(files):
            split = "val" if i % 2 else "train"
            writer.writerow([path.stem, split, "ab"[i // 2 % 2], f"Ms Name {i // 4}"])
    summary = evaluate_predictions(
        data / "masks",
        data,
        output=tmp_path / "scores",
        masks="instance",
        part="val",
        subgroups=["scanner"],
        resamples=50,
    )
    assert summary["cases"] == 12 and summary["resampled"] == "patients"
    assert "the predictions of 12 cases of other parts are left out" in summary["notes"]
    assert values(summary)["panoptic_quality"] == 1
    groups = summary["subgroups"]["scanner"]["groups"]
    assert [groups[name]["n"] for name in "ab"] == [6, 6] and groups["a"]["few"]
    written = "".join(p.read_text() for p in (tmp_path / "scores").glob("*.[jc]s*"))
    assert "Ms Name" not in written
    for column, told in (("sex", "'sex'; there is scanner, split"), ("patient", "'patient'")):
        with pytest.raises(UserError, match=told):
            evaluate_predictions(
                data / "masks", data, output=tmp_path / "scores", subgroups=[column]
            )


@pytest.fixture
def boxes(tmp_path):
    """A COCO set of ten pictures, and results near its objects."""
    rng = np.random.default_rng(0)
    (tmp_path / "truth/images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 7, "name": "cell"}, {"id": 9, "name": "clump"}]
    results = []
    for i in range(10):
        iio.imwrite(tmp_path / f"truth/images/p{i}.png", np.zeros((60, 80), np.uint8))
        content["images"].append({"id": 100 + i, "file_name": f"p{i}.png"})
        for _ in range(i % 4):
            box = [*rng.uniform(0, 40, 2).round(2).tolist(), 12.5, 17.0]
            kind = int(rng.choice([7, 9]))
            content["annotations"].append(
                {"id": len(results) + 1, "image_id": 100 + i, "category_id": kind, "bbox": box}
            )
            near = [v + rng.normal(0, 1) for v in box[:2]] + box[2:]
            results.append(
                {"image_id": 100 + i, "category_id": kind, "bbox": near, "score": rng.random()}
            )
    (tmp_path / "truth/instances_all.json").write_text(json.dumps(content))
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted/detections.json").write_text(json.dumps(results))
    return tmp_path, content, results


def expected_boxes(content, results):
    def arrays(entries):
        xywh = np.array([e["bbox"] for e in entries], np.float32).reshape(-1, 4)
        low = xywh[:, 1::-1]
        corners = np.concatenate([low, low + xywh[:, :1:-1]], axis=1)
        return corners, np.array([(e["category_id"] - 7) // 2 for e in entries], int)

    rows = []
    for picture in content["images"]:
        own = [e for e in results if e["image_id"] == picture["id"]]
        true = [e for e in content["annotations"] if e["image_id"] == picture["id"]]
        found, labels = arrays(own)
        scores = np.array([e["score"] for e in own], np.float32)
        rows.append(match_detections(found, scores, labels, *arrays(true), classes=2))
    ones = np.ones((1, len(rows)))
    return summarize_detection(rows, weights=ones, class_names=("cell", "clump"))


@pytest.mark.parametrize("by_name", [False, True])
def test_boxes_are_scored_as_their_arrays_are(boxes, by_name):
    folder, content, results = boxes
    if by_name:  # as predict.py writes them
        names = {picture["id"]: picture["file_name"] for picture in content["images"]}
        kinds = {7: "cell", 9: "clump"}
        told = [
            {
                **{k: e[k] for k in ("bbox", "score")},
                "file_name": names[e["image_id"]],
                "category": kinds[e["category_id"]],
                "image_id": 1,
                "category_id": 1,
            }
            for e in results
        ]
        (folder / "predicted/detections.json").write_text(json.dumps(told))
    summary = score(folder)
    assert summary["scoring"] == {"score_threshold": 0.3}
    expected = expected_boxes(content, results)
    for name, value in values(summary).items():
        assert value == pytest.approx(expected[name][0], abs=1e-6), name
    told = " ".join(summary["notes"])
    assert "3 of 10 cases have no prediction and count as without boxes: p0, p4, p8" in told


def test_boxes_of_unknown_classes_and_no_boxes_are_told(boxes):
    folder, _, results = boxes
    path = folder / "predicted/detections.json"
    path.write_text(json.dumps([{**results[0], "category_id": 8}]))
    with pytest.raises(UserError, match="entry 0: category is 8"):
        score(folder)
    path.write_text(json.dumps([{**results[0], "bbox": [1, 2, 3]}]))
    with pytest.raises(UserError, match="entry 0: expected a bbox of four numbers"):
        score(folder)
    path.write_text("{}")
    with pytest.raises(UserError, match="expected COCO results"):
        score(folder)
    for key in ("image_id", "category_id"):
        path.write_text(json.dumps([{**results[0], key: [1]}]))
        with pytest.raises(UserError, match=rf"entry 0: {key} is \[1\]"):
            score(folder)


def test_nothing_found_anywhere_is_a_result(boxes):
    folder, _, _ = boxes
    (folder / "predicted/detections.json").write_text("[]")
    summary = score(folder)
    assert values(summary)["ap50"] == values(summary)["froc"] == 0
    assert "10 of 10 cases have no prediction" in " ".join(summary["notes"])


def write_probabilities(path, rows, columns=("file", "prediction", "cat", "dog")):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_probabilities_of_class_folders(tmp_path):
    rows = []
    for i in range(12):
        name = ("cat", "dog")[i % 2]
        (tmp_path / "truth" / name).mkdir(parents=True, exist_ok=True)
        iio.imwrite(tmp_path / f"truth/{name}/i{i}.png", np.zeros((8, 8), np.uint8))
        p = 0.9 if name == "dog" else 0.2
        rows.append([f"{name}/i{i}.png", name, 1 - p, p])
    rows[0][2:] = [0.1, 0.9]
    path = tmp_path / "predicted/predictions.csv"
    write_probabilities(path, rows)
    summary = score(tmp_path)
    assert values(summary)["accuracy"] == pytest.approx(11 / 12)
    assert summary["no_information_rate"] == 0.5
    # A case that nothing is said of counts as wrong.
    write_probabilities(path, rows[:-1])
    summary = score(tmp_path)
    assert values(summary)["accuracy"] == pytest.approx(10 / 12)
    assert "1 of 12 cases have no prediction and count as wrong: i11" in summary["notes"]
    write_probabilities(path, [[*rows[0][:2], 0.9, 0.9]])
    with pytest.raises(UserError, match="row 2: the probabilities are 0.9, 0.9"):
        score(tmp_path)
    write_probabilities(path, rows, columns=("file", "prediction", "cat", "bird"))
    with pytest.raises(UserError, match="for each class: cat, dog"):
        score(tmp_path)


def test_two_programs_are_compared_by_what_their_scores_left(masks):
    score(masks)
    (masks / "scores").rename(masks / "first")
    for path in sorted((masks / "predicted").glob("*.png"))[:4]:
        iio.imwrite(path, np.roll(iio.imread(path), 2, axis=0))
    score(masks)
    found = compare_evaluations(
        [str(masks / "first"), str(masks / "scores")], output=masks / "compared", resamples=200
    )
    assert found["cases"] == 6 and found["against"] == "first"
    other = found["runs"]["scores"]
    assert (other["win"], other["tie"], other["lose"]) == (0, 2, 4)
    assert other["differences"]["dice"]["value"] < 0
    with (masks / "compared/compare.csv").open() as file:
        lines = {(row["run"], row["score"]): row for row in csv.DictReader(file)}
    line = lines["scores", "dice"]
    assert float(line["difference"]) == pytest.approx(other["differences"]["dice"]["value"])
    assert line["lose"] == "4" and lines["first", "dice"]["difference"] == ""
    assert iio.imread(masks / "compared/compare.png").std() > 0
    with pytest.raises(UserError, match="two different runs"):
        compare_evaluations([str(masks / "first")])
    with pytest.raises(UserError, match="holds no evaluation/val/summary.json"):
        compare_evaluations([str(masks / "first"), str(masks)])


def test_distances_forgiven_differently_are_not_compared(masks):
    for tolerance, name in ((1.0, "first"), (3.0, "second")):
        summary = score(masks, nsd_tolerance=tolerance)
        assert summary["scoring"] == {"nsd_tolerance": tolerance}
        (masks / "scores").rename(masks / name)
    found = compare_evaluations([str(masks / "first"), str(masks / "second")], resamples=50)
    assert not [s for s in found["runs"]["second"]["metrics"] if s.startswith("nsd")]
    assert "dice" in found["runs"]["second"]["differences"]
    assert "nsd is left out" in found["notes"][-1] and "first 1, second 3" in found["notes"][-1]


def test_an_evaluation_of_an_earlier_version_is_told(masks):
    score(masks)
    path = masks / "scores/summary.json"
    old = json.loads(path.read_text())
    del old["scoring"]
    (masks / "scores").rename(masks / "old")
    (masks / "old/summary.json").write_text(json.dumps(old))
    score(masks)
    with pytest.raises(UserError, match="old/summary.json: is of an earlier version"):
        compare_evaluations([str(masks / "old"), str(masks / "scores")])
