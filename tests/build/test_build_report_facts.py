import json
from unittest.mock import Mock

import pytest

from jaxmed.build.report_facts import _tell_short, describe_split, read_card
from jaxmed.build.trained import TrainedRun
from jaxmed.data.sources.phantoms import Phantoms
from jaxmed.types import UserError


class Drawn:
    """What is known of five cases."""

    def __init__(self, *, patients, parts=None):
        made = Phantoms("body", task="classification", count=5)
        self.info, self.ids = made.info, made.ids
        self.patients = patients
        self.labels = [0, 0, 1, 1, 1]
        self.parts = parts or {}
        self.notes = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        raise AssertionError("no case is read")

    read = __getitem__


def write_split(folder, source, split):
    named = {part: [source.ids[row] for row in rows] for part, rows in split.items()}
    (folder / "split.json").write_text(json.dumps(named))


def test_the_split_counts_cases_patients_and_classes(tmp_path):
    source = Drawn(patients=["p", "p", "q", "r", "s"])
    write_split(tmp_path, source, {"train": [0, 1, 2], "val": [3, 4]})
    first, second = source.info.class_names
    found = describe_split(tmp_path, source, is_own=True)
    assert found["parts"] == {
        "train": {"cases": 3, "patients": 2, "classes": {first: 2, second: 1}},
        "val": {"cases": 2, "patients": 2, "classes": {first: 0, second: 2}},
    }
    assert "None of the 4 patients is in several parts (checked)." in found["told"]
    assert any("cut at random" in sentence for sentence in found["told"])


def test_patients_in_several_parts_and_unknown_ones_are_told(tmp_path):
    source = Drawn(patients=["p", "p", "q", "q", "s"], parts={"train": [0, 1, 2], "val": [3]})
    write_split(tmp_path, source, {"train": [0, 1, 2], "val": [3, 4]})
    told = " ".join(describe_split(tmp_path, source, is_own=True)["told"])
    assert "1 of 3 patients in several parts: scores are too good." in told
    assert "as the data give them" in told
    unknown = Drawn(patients=None)
    told = " ".join(describe_split(tmp_path, unknown, is_own=True)["told"])
    assert "Patients are not known" in told
    cells = Phantoms("cells", count=5)
    assert cells.patients is None
    write_split(tmp_path, cells, {"train": [0, 1, 2], "val": [3, 4]})
    assert "Patients" not in " ".join(describe_split(tmp_path, cells, is_own=True)["told"])


def test_statements_of_people_are_read_and_checked(tmp_path):
    assert read_card(tmp_path) == {}
    path = tmp_path / "model_card.json"
    path.write_text('{"intended_use": "to try"}')
    assert read_card(tmp_path) == {"intended_use": "to try"}
    for text, told in (("{", "cannot be read"), ("[1]", "must hold"), ('{"use": ""}', "'use'")):
        path.write_text(text)
        with pytest.raises(UserError, match=told):
            read_card(tmp_path)


@pytest.mark.parametrize(
    ("steps", "folds", "short"), [(20, 0, True), (50, 0, False), (45, 5, False)]
)
def test_a_short_training_is_told(steps, folds, short):
    run = Mock(spec=TrainedRun)
    run.experiment = Mock()
    run.experiment.config.training.steps, run.experiment.config.training.folds = steps, folds
    run.experiment.config.data.batch_size = 10
    told = _tell_short(run, {"parts": {"train": {"cases": 100}}})
    assert bool(told) is short
    if short:
        assert "seen 2.0 times" in told[0]
