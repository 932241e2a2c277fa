import shutil
from unittest.mock import Mock

import imageio.v3 as iio
import numpy as np
import pydicom.data
import pytest

from jaxmed.build import predictions
from jaxmed.build.prediction_files import check_apart, claim, find_inputs
from jaxmed.build.trained import TrainedRun
from jaxmed.inference.standalone import __main__ as exported
from jaxmed.inference.standalone import files as exported_files
from jaxmed.inference.standalone.contents import ModelError
from jaxmed.types import UserError


def test_dicom_images_of_several_series_are_found_one_by_one_and_pictures_beside_them(tmp_path):
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(pydicom.data.get_testdata_file(name), tmp_path / name)
    iio.imwrite(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    found = find_inputs([str(tmp_path)])
    assert [name for name, _ in found] == ["CT_small.dcm", "MR_small.dcm", "a.png"]
    (tmp_path / "MR_small.dcm").unlink()
    assert [name for name, _ in find_inputs([str(tmp_path)])] == ["CT_small.dcm", "a.png"]


def test_the_slices_of_a_series_are_one_image_with_the_folder_s_name(tmp_path):
    (tmp_path / "scan").mkdir()
    file = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    for number in range(3):
        file.SOPInstanceUID = pydicom.uid.generate_uid()
        file.ImagePositionPatient = [0, 0, 5.0 * number]
        file.save_as(tmp_path / f"scan/{number}.dcm")
    assert find_inputs([str(tmp_path / "scan")]) == [("scan", tmp_path / "scan")]
    assert find_inputs([str(tmp_path)]) == [("scan", tmp_path / "scan")]


def test_predictions_of_an_earlier_call_are_no_input(tmp_path):
    for name in ("a.png", "out/a.png", "out/overlays/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"png")
    found = find_inputs([str(tmp_path)], output=tmp_path / "out")
    assert [name for name, _ in found] == ["a.png"]
    assert len(find_inputs([str(tmp_path / "out")], output=tmp_path / "out")) == 2


def test_masks_are_not_written_among_images(tmp_path):
    """The mask of a.jpg is a.png, which may be another image."""
    for name in ("a.jpg", "b.png", "inside/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"picture")
    for given in (str(tmp_path / "a.jpg"), str(tmp_path)):
        named = [("a.jpg", tmp_path / "a.jpg")], find_inputs([given], output=tmp_path)
        for files in named:
            with pytest.raises(UserError, match="choose another folder"):
                check_apart(files, tmp_path)
            with pytest.raises(ModelError, match="choose another folder"):
                exported.check_apart(files, tmp_path)
    for check in (check_apart, exported.check_apart):
        check(find_inputs([str(tmp_path)]), tmp_path / "masks")
    (tmp_path / "series").mkdir()
    series = [("series", tmp_path / "series")]
    check_apart(series, tmp_path)
    with pytest.raises(UserError, match="choose another folder"):
        check_apart(series, tmp_path / "series")


def test_only_a_folder_of_predictions_is_written_to_again(tmp_path):
    """Masks of a data set have the names of its images, as predicted ones have."""
    origin = {"trained_on": "set", "step": 3, "parameters_sha256": "0" * 64}
    notes = []
    for name, make, error in (
        ("a", claim, UserError),
        ("b", exported_files.claim, ModelError),
    ):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / ".DS_Store").touch()
        for _ in range(2):
            make(folder, origin)
        (folder / "mask.png").write_bytes(b"predicted")
        make(folder, origin)
        notes.append((folder / "predicted_by.json").read_text())
        with pytest.raises(error, match="by other weights"):
            make(folder, {**origin, "parameters_sha256": "1" * 64})
        (folder / "predicted_by.json").unlink()
        with pytest.raises(error, match="holds files that are no predictions"):
            make(folder, origin)
        assert {path.name for path in folder.iterdir()} == {".DS_Store", "mask.png"}
    assert notes[0] == notes[1]


def test_predictions_of_an_earlier_call_are_no_input_of_an_export(tmp_path):
    for name in ("a.png", "out/a.png", "out/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"png")
    found = exported.find([str(tmp_path)], output=tmp_path / "out")
    assert [name for name, _ in found] == ["a.png"]
    with pytest.raises(UserError, match="besides those in"):
        (tmp_path / "a.png").unlink()
        find_inputs([str(tmp_path)], output=tmp_path / "out")


def test_voxels_of_another_size_are_told_where_nothing_is_resampled():
    def told(own, trained, *, resampled=(), ndim=3, task="segmentation"):
        run = Mock(spec=TrainedRun)
        run.run = {"data": {"spacing": trained}}
        run.info = Mock(task=task, ndim=ndim)
        run.experiment = Mock()
        run.experiment.config.data.spacing = resampled
        return predictions._spacing_apart({"spacing": np.array(own)}, run)

    assert "2 x 1 x 1 mm" in told([2.0, 1, 1], [1.0, 1, 1])
    assert told([0.5, 0.5], [1.0, 2.0], ndim=2)
    assert not told([1.1, 1, 1], [1.0, 1, 1])
    assert not told([2.0, 1, 1], [1.0, 1, 1], resampled=(1.0, 1.0, 1.0))
    assert not told([2.0, 2.0], [1.0, 1.0], ndim=2)  # a picture whose file states no size
    assert not told([2.0, 1, 1], [1.0, 1, 1], task="classification")
    assert not told([2.0, 1, 1], None)  # of a run that noted none
