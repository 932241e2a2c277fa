import numpy as np
import pydicom
import pydicom.data
import pytest
import SimpleITK
from image_files import RNG, check, save_dicom, save_series
from pydicom.dataset import Dataset

from jaxmed.data.images import (
    image_shape,
    is_image,
    list_images,
    read_image,
    write_mask,
)
from jaxmed.types import UserError

# DICOM


def test_dicom_rescale_and_spacing(tmp_path):
    pixels = RNG.integers(0, 4096, (4, 6)).astype(np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11,
                      RescaleSlope=1, RescaleIntercept=-1024)  # fmt: skip
    image = check(path, (pixels[..., None].astype(np.int16) - 1024))
    np.testing.assert_array_equal(image.spacing, np.float32([0.5, 0.75]))
    path = save_dicom(tmp_path / "b.dcm", pixels, RescaleSlope=0.5, RescaleIntercept=1)
    np.testing.assert_allclose(read_image(path).array[..., 0], pixels * 0.5 + 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_dicom_monochrome1_is_inverted_once_as_itk_does(tmp_path, dtype):
    pixels = RNG.integers(0, 2000, (4, 6)).astype(dtype)
    path = save_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="MONOCHROME1",
                      Modality="DX", BitsStored=12, HighBit=11, RescaleSlope=2,
                      RescaleIntercept=-5)  # fmt: skip
    top = 4095 if dtype == np.uint16 else -1
    found = read_image(path).array[..., 0]
    np.testing.assert_allclose(found, (top - pixels.astype(int)) * 2 - 5)
    if dtype == np.uint16:
        itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
        np.testing.assert_allclose(found, itk)


def test_dicom_series_is_sorted_by_place(tmp_path):
    folder = save_series(tmp_path / "s", [3, 1, 5, 7], RescaleIntercept=0, RescaleSlope=1)
    image = read_image(folder)
    assert image.array.shape == image_shape(folder) == (6, 4, 4, 1)
    assert image.array[0, 0, :, 0].tolist() == [1, 0, 2, 3]
    np.testing.assert_allclose(image.spacing, [0.75, 0.5, 2])
    # the first voxel: 5 columns to the patient's left of x = -10, 3 rows behind y = 20 (LPS)
    np.testing.assert_allclose(image.affine[:3, 3], [10 - 5 * 0.75, -20 - 3 * 0.5, 1])
    assert list_images(tmp_path) == [folder] and is_image(folder)


@pytest.mark.parametrize(
    ("positions", "words"),
    [([0, 1, 2, 4, 5], "slices are missing"), ([0, 1, 1, 2], "same place")],
)
def test_dicom_series_with_gaps_is_refused(tmp_path, positions, words):
    folder = save_series(tmp_path / "s", positions)
    for call in (read_image, image_shape):
        with pytest.raises(UserError, match=words):
            call(folder)


def test_dicom_mixed_series_are_refused(tmp_path):
    folder = save_series(tmp_path / "s", [0, 1, 2])
    pixels = np.zeros((4, 6), np.int16)
    for i in range(2):
        save_dicom(folder / f"x{i}", pixels, SeriesInstanceUID="9.9",
                   ImagePositionPatient=[0, 0, i])  # fmt: skip
    for call in (read_image, image_shape, list_images):
        with pytest.raises(UserError, match="2 DICOM series") as error:
            call(folder)
        assert "ecret" not in str(error.value).replace("SECRET", "secret")


def test_dicom_slices_of_other_size_are_refused(tmp_path):
    folder = save_series(tmp_path / "s", [0, 1])
    save_dicom(folder / "x.dcm", np.zeros((5, 6), np.int16), ImagePositionPatient=[0, 0, 2])
    with pytest.raises(UserError, match="size differs"):
        read_image(folder)


def test_dicom_views_in_one_series_are_single_pictures(tmp_path):
    for name in ("a", "b.dcm"):
        save_dicom(tmp_path / name, np.zeros((4, 6), np.uint8), Modality="DX")
    assert list_images(tmp_path) == [tmp_path / "a", tmp_path / "b.dcm"]
    with pytest.raises(UserError, match="no position"):
        read_image(tmp_path)


def test_dicom_of_many_frames(tmp_path):
    frames = RNG.integers(0, 99, (3, 4, 6)).astype(np.int16)
    groups = []
    for z in (4, 0, 2):
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, z]
        group.PlanePositionSequence = [place]
        groups.append(group)
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = [0.5, 0.75], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    many = {"NumberOfFrames": 3, "PixelData": frames.tobytes()}
    path = save_dicom(
        tmp_path / "a.dcm",
        frames[0],
        PerFrameFunctionalGroupsSequence=groups,
        SharedFunctionalGroupsSequence=[shared],
    )
    data = pydicom.dcmread(path)
    for name, value in many.items():
        setattr(data, name, value)
    data.save_as(path)
    expected = frames[[1, 2, 0]].transpose(2, 1, 0)[::-1, ::-1]
    check(path, np.ascontiguousarray(expected)[..., None])


def test_dicom_errors_name_no_patient(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", np.zeros((40, 60), np.int16), PixelSpacing=[1, 1])
    raw = path.read_bytes()
    for cut in (200, 400, 700, 2000, len(raw) - 2):
        path.write_bytes(raw[:cut])
        with pytest.raises(UserError) as error:
            read_image(path)
        assert "ecret" not in str(error.value) and "SECRET" not in str(error.value)


def test_dicom_files_of_pydicom():
    """What decodes must equal its uncompressed twin; what does not must be told."""

    def get(name):
        return read_image(pydicom.data.get_testdata_file(name, download=False)).array

    for name in ("RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit"):
        np.testing.assert_array_equal(get(f"MR_small_{name}.dcm"), get("MR_small.dcm"))
    assert get("examples_palette.dcm").shape == (350, 800, 3)
    raw = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    np.testing.assert_allclose(get("CT_small.dcm")[..., 0], raw.pixel_array - 1024.0)
    for name in ("MR_truncated.dcm", "rtplan.dcm", "rtdose.dcm", "SC_rgb_rle_2frame.dcm"):
        with pytest.raises(UserError, match=name):
            get(name)


def read_seg(path, files):
    """The class numbers (slices, rows, cols) that a DICOM SEG gives to the given files."""
    highdicom = pytest.importorskip("highdicom")
    found = highdicom.seg.segread(path)
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files]
    return found.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )


def test_dicom_seg_of_a_series(tmp_path):
    pytest.importorskip("highdicom")
    folder = save_series(tmp_path / "s", [3, 1, 5, 7])
    image = read_image(folder)
    mask = np.zeros((6, 4, 4), np.int32)
    mask[1, 2, 3], mask[4, 0, 0] = 1, 2
    path = write_mask(tmp_path / "out" / "s", mask, image)
    assert path.name == "s.dcm"
    files = sorted(folder.iterdir(), key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2])
    # RAS x and y run against the columns and rows of this series
    expected = mask.transpose(2, 1, 0)[:, ::-1, ::-1]
    np.testing.assert_array_equal(read_seg(path, files), expected)
    empty = write_mask(tmp_path / "empty", np.zeros_like(mask), image)
    assert (read_seg(empty, files) == 0).all()


def test_dicom_seg_of_one_picture(tmp_path, real_data):
    pytest.importorskip("highdicom")
    image = read_image(real_data / "dicom_samples" / "highdicom" / "ct_image.dcm")
    mask = (image.array[..., 0] > 0).astype(np.uint8)
    path = write_mask(tmp_path / "m", mask, image)
    np.testing.assert_array_equal(read_seg(path, [image.path])[0], mask)


def test_dicom_seg_without_highdicom_tells_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    path = save_dicom(tmp_path / "a.dcm", np.zeros((4, 6), np.int16))
    image = read_image(path)
    with pytest.raises(UserError, match=r"EXTRAS=dicom-seg"):
        write_mask(tmp_path / "m", image.array[..., 0], image)


def test_dicom_seg_never_replaces_a_slice(tmp_path):
    folder = save_series(tmp_path / "s", [0, 1, 2])
    image = read_image(folder)
    with pytest.raises(UserError, match="the image itself"):
        write_mask(folder / "0.dcm", image.array[..., 0], image)


def test_a_slice_that_is_damaged_does_not_go_missing(tmp_path):
    folder = save_series(tmp_path / "s", [0, 1, 2])
    (folder / "3.dcm").write_bytes(b"")
    for call in (read_image, image_shape, list_images):
        with pytest.raises(UserError, match=r"3\.dcm"):
            call(folder)


def test_values_above_the_stored_bits_do_not_wrap(tmp_path):
    pixels = np.array([[60000, 5]], np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels)
    data = pydicom.dcmread(path)
    data.BitsStored, data.HighBit = 12, 11
    data.save_as(path)
    found = read_image(path).array[..., 0]
    assert found[0, 1] == 5 and found[0, 0] in (60000, 60000 % 4096)


def test_series_of_slanted_slices_lies_where_itk_says(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    along, down = np.array([0.0, 0.96, -0.28]), np.array([-0.8, 0.168, 0.576])
    normal = np.cross(along, down)
    for i in range(4):
        place = np.array([5.0, -7, 11]) + normal * 1.5 * i
        pixels = RNG.integers(0, 99, (4, 6)).astype(np.int16)
        save_dicom(
            folder / f"{3 - i}.dcm",
            pixels,
            ImageOrientationPatient=[*along, *down],
            ImagePositionPatient=[round(float(x), 6) for x in place],
        )
    image = read_image(folder)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    other = SimpleITK.ReadImage(names)
    for index in np.ndindex(*image.array.shape[:3]):
        x, y, z = (image.affine @ [*index, 1])[:3]
        there = other.TransformPhysicalPointToIndex((-x, -y, z))
        assert other[there] == image.array[(*index, 0)]
