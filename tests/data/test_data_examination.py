"""Every fault that is put into a clean set is found, and a clean set raises no alarm."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from jaxmed.data.examination import CURABLE, SEVERITIES, alike, examine
from jaxmed.data.looks import Look, look_at, pack, unpack
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.data.sources.phantom_files import write_phantoms
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.types import UserError

SPLIT = {"train": list(range(30)), "val": list(range(30, 60))}


class Changed:
    """A set with some of its cases replaced, by row; a text is the problem of a broken one."""

    def __init__(self, source, changes, *, patients=None, labels=None):
        self.source, self.changes = source, changes
        self.info, self.ids = source.info, source.ids
        self.patients = patients
        self.labels = source.labels if labels is None else labels

    def __getitem__(self, row):
        change = self.changes.get(row, {})
        if isinstance(change, str):
            raise UserError(change)
        return {**self.source[row], **change}


def phantoms(task):
    return Phantoms("cells", task=task, ndim=2, size=48, count=60)


def kinds(source, split=SPLIT):
    return {f.kind: (f.severity, f.cases) for f in examine(source, split)}


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_clean_set_raises_no_alarm(task):
    found = examine(phantoms(task), SPLIT)
    assert [f for f in found if f.severity != "note"] == []


def test_broken_constant_and_outlying_cases_are_named():
    source = phantoms("segmentation")
    image = source[3]["image"]
    changes = {
        1: "case1.png: cut short",
        2: {"image": np.full_like(image, 7)},
        3: {"image": image.astype(np.float32) * 1000},
        4: {"mask": np.zeros_like(source[4]["mask"])},
        5: {"spacing": source[5]["spacing"] * 50},
    }
    found = kinds(Changed(source, changes))
    assert found["broken case"] == ("error", ("case1.png: cut short",))
    assert found["image of one value"] == ("error", (source.ids[2],))
    assert found["mask without foreground"][1] == (source.ids[4],)
    outlying = " ".join(found["outlying case"][1])
    assert source.ids[3] in outlying and source.ids[5] in outlying
    assert "spacing along axis 0 50" in outlying
    assert source.ids[6] not in outlying


@pytest.mark.parametrize("factor", [0.1, 0.4, 2.5, 10])
def test_sizes_far_below_most_stand_out_as_those_far_above_do(factor):
    source = phantoms("segmentation")
    changed = Changed(source, {5: {"spacing": source[5]["spacing"] * factor}})
    [case] = kinds(changed)["outlying case"][1]
    assert case.startswith(f"{source.ids[5]}: spacing along axis 0")


def test_identical_and_similar_images_are_found_with_where_they_are():
    source = phantoms("classification")
    noise = np.random.default_rng(0).normal(0, 1, source[8]["image"].shape)
    similar = np.clip(source[8]["image"] * 0.9 + 5 + noise, 0, 255).astype(np.uint8)
    labels = [int(source[row]["label"]) for row in range(60)]
    other = next(row for row in range(13, 30) if labels[row] != labels[7])
    changes = {
        31: {"image": source[5]["image"], "label": source[5]["label"]},  # in train and val
        32: {"image": source[6]["image"], "label": np.int32(1 - labels[6])},  # and another label
        9: {"image": similar},
        other: {"image": source[7]["image"]},
        12: {"image": source[11]["image"], "label": source[11]["label"]},
    }
    ids, names = source.ids, source.info.class_names
    labels[31], labels[32], labels[12] = labels[5], 1 - labels[6], labels[11]
    changed = Changed(source, changes, labels=labels)
    found = kinds(changed)

    def told(*rows):
        return " = ".join(
            f"{ids[row]} ({'train' if row in SPLIT['train'] else 'val'} {names[labels[row]]})"
            for row in rows
        )

    assert found["identical images in several parts"] == ("error", (told(5, 31), told(6, 32)))
    near = [
        case for kind, (_, cases) in found.items() if kind.startswith("nearly") for case in cases
    ]
    assert near == [told(8, 9)]
    different = found["identical images with different labels"]
    assert different == ("error", (told(6, 32), told(7, other)))
    assert found["identical images"] == ("warning", (told(11, 12),))
    findings = {f.kind: f.leave_out for f in examine(changed, SPLIT)}
    assert findings["identical images in several parts"] == (5, 6)  # what is tested on stays
    assert findings["identical images with different labels"] == (6, 7, other, 32)
    assert findings["identical images"] == (12,)
    assert all(kind in CURABLE for kind, rows in findings.items() if rows)


def test_boxes_marked_twice_and_missing_classes():
    source = phantoms("detection")
    example = source[0]
    boxes, labels = example["boxes"], example["box_label"]
    twice = {
        "boxes": np.concatenate([boxes, boxes[:1] + 0.2]),
        "box_label": np.append(labels, labels[0]),
    }
    only = {row: {"box_label": np.zeros_like(source[row]["box_label"])} for row in SPLIT["val"]}
    found = kinds(Changed(source, {0: twice, **only}))
    assert found["boxes marked twice"] == (
        "warning",
        (f"{source.ids[0]}: boxes 0 and {len(boxes)}",),
    )
    names = source.info.class_names
    assert found["class without a case"][1] == tuple(f"{name} in val" for name in names[1:])


def test_patients_in_two_parts_are_told_by_their_cases_and_not_named():
    source = phantoms("classification")
    patients = [f"name{row}" for row in range(29)] + ["shared"] * 31
    severity, cases = kinds(Changed(source, {}, patients=patients))["patients in several parts"]
    [told] = cases
    assert severity == "error" and "shared" not in told
    assert told.count("(train)") == 1 and told.count("(val)") == 30 and source.ids[29] in told


def test_near_duplicates_in_parts_show_beside_identical_images():
    source = phantoms("classification")
    image = source[0]["image"]
    nearly = {"image": np.clip(image.astype(int) + 1, 0, 255).astype(image.dtype)}
    # Row 40 (val) is row 0 (train), and row 1 (train) nearly so: leaving out row 0 is not enough.
    found = kinds(Changed(source, {40: {"image": image}, 1: nearly}))
    assert "identical images in several parts" in found
    [near] = found["nearly identical images in several parts"][1]
    assert source.ids[1] in near and source.ids[40] in near


def test_findings_are_ordered_and_volumes_work():
    source = Phantoms("cells", task="segmentation", ndim=3, size=24, count=12)
    changes = {0: "broken", 5: {"image": source[4]["image"]}}
    found = examine(Changed(source, changes), {"train": list(range(12))})
    order = [SEVERITIES.index(f.severity) for f in found]
    assert order == sorted(order)
    assert any(f.kind == "identical images" for f in found)


def test_only_copies_of_one_size_are_compared():
    example = phantoms("classification")[0]
    half = {**example, "image": example["image"][::4, ::4]}
    looks = {0: look_at(example), 1: look_at(half), 2: dataclasses.replace(look_at(example))}
    assert list(alike(looks, [0, 1, 2])) == [(0, 2)]


def test_cases_that_did_not_change_are_not_read_again(tmp_path):
    write_phantoms(tmp_path, layout="pairs", count=12, size=40)
    known = {}
    first = examine(ImageMaskPairs(tmp_path), {"train": range(12)}, known=known)
    assert len(known) == 12
    known = json.loads(json.dumps(known))

    class Counted(ImageMaskPairs):
        seen = []

        def read_noted(self, row, region=None):
            self.seen.append(row)
            return super().read_noted(row, region)

    again = examine(Counted(tmp_path), {"train": range(12)}, known=known)
    assert again == first and Counted.seen == []
    source = Counted(tmp_path)
    double = source.cases[7].images[0]
    double.write_bytes(source.cases[2].images[0].read_bytes())
    broken = source.cases[4].mask
    broken.write_bytes(broken.read_bytes()[:50])
    mended = examine(source, {"train": range(12)}, known=known)
    assert sorted(Counted.seen) == [4, 7]
    assert mended == examine(ImageMaskPairs(tmp_path), {"train": range(12)})
    assert {"broken case", "identical images"} <= {finding.kind for finding in mended}
    assert len(known) == 12, "nothing of files as they once were is kept"


def test_a_packed_look_is_the_same_look():
    for task, ndim in (("detection", 2), ("segmentation", 3), ("classification", 2)):
        look = look_at(Phantoms("cells", task=task, ndim=ndim, size=30, count=1)[0])
        same = unpack(json.loads(json.dumps(pack(look))))
        np.testing.assert_array_equal(same.thumbnail, look.thumbnail)
        assert dataclasses.replace(same, thumbnail=None) == dataclasses.replace(
            look, thumbnail=None
        )
    assert unpack(json.loads(json.dumps(pack(Look(problem="cut short"))))) == Look("cut short")


def test_what_readers_left_out_is_told_and_kept(tmp_path):
    """Once a note with the cases, also by a look that was stored."""
    write_phantoms(tmp_path, layout="pairs", count=8, size=40)
    for case in ImageMaskPairs(tmp_path).cases[:5]:
        gray = np.asarray(PIL.Image.open(case.images[0]).convert("L"))
        opacity = np.full_like(gray, 255)
        opacity[0] = 9
        PIL.Image.fromarray(np.stack([gray, opacity], -1)).save(case.images[0])
    known = {}
    for _ in range(2):
        found = examine(ImageMaskPairs(tmp_path), {"train": range(8)}, known=known)
        told = [f for f in found if f.kind == "files not taken as they are"]
        assert len(told) == 1 and told[0].severity == "note" and len(told[0].cases) == 1
        assert "opacity (alpha) channel varies; it was left out: 5 cases" in told[0].cases[0]
        known = json.loads(json.dumps(known))
