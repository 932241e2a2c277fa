"""DICOM volumes as scanners and archives write them, against SimpleITK (GDCM)."""

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK
from image_files import RNG, save_dicom, save_series
from other_readers import assert_same_volume, itk_read
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from jaxmed.data.images import read_image
from jaxmed.types import UserError

ALONG, DOWN = [0.0, 0.96, -0.28], [-0.8, 0.168, 0.576]
"""Directions of a row and of a column of a slanted slice."""


def slanted_series(folder, *, dtype=np.int16, top=4000, count=5):
    """Slices 1.5 mm apart, whose files and instance numbers are in no order of space."""
    folder.mkdir()
    normal = np.cross(ALONG, DOWN)
    for name, i in enumerate(RNG.permutation(count)):
        place = np.array([5.0, -7, 11]) + normal * 1.5 * i
        pixels = np.add.outer(np.arange(16) * 9, np.arange(24) * 5) + 20 * i
        pixels = (pixels + RNG.integers(0, 4, pixels.shape)) % top
        save_dicom(folder / f"{name}.dcm", pixels.astype(dtype),
                   ImageOrientationPatient=ALONG + DOWN,
                   ImagePositionPatient=[round(float(x), 6) for x in place],
                   InstanceNumber=int(RNG.integers(1, 999)))  # fmt: skip
    return folder


ENCODERS = {
    pydicom.uid.RLELossless: None,  # by pydicom itself
    pydicom.uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    pydicom.uid.JPEG2000Lossless: lambda x: imagecodecs.jpeg2k_encode(
        x, codecformat="j2k", reversible=True, level=0
    ),
    pydicom.uid.JPEGLosslessSV1: imagecodecs.ljpeg_encode,
    pydicom.uid.JPEGBaseline8Bit: lambda x: imagecodecs.jpeg8_encode(x, level=100),
    pydicom.uid.DeflatedExplicitVRLittleEndian: None,
    pydicom.uid.ImplicitVRLittleEndian: None,
}


def encode(path, syntax):
    """Rewrite a DICOM file in another transfer syntax."""
    data = pydicom.dcmread(path)
    if ENCODERS[syntax]:
        data.PixelData = encapsulate([ENCODERS[syntax](data.pixel_array)])
        data["PixelData"].VR = "OB"
    elif syntax == pydicom.uid.RLELossless:
        data.compress(syntax, generate_instance_uid=False)
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_a_series_in_every_transfer_syntax_equals_the_plain_one_and_itk(tmp_path, syntax):
    is_lossy = syntax == pydicom.uid.JPEGBaseline8Bit
    # Signed pixels of JPEG-LS and lossless JPEG are stored without sign.
    dtype = np.uint8 if is_lossy else np.uint16 if ENCODERS[syntax] else np.int16
    folder = slanted_series(tmp_path / "s", dtype=dtype, top=250 if is_lossy else 4000)
    plain = read_image(folder)
    assert_same_volume(plain, *itk_read(folder))
    for path in folder.iterdir():
        encode(path, syntax)
    image, loss = read_image(folder), 2 if is_lossy else 0
    np.testing.assert_allclose(image.array, plain.array, rtol=0, atol=loss)
    np.testing.assert_array_equal(image.affine, plain.affine)
    assert_same_volume(image, *itk_read(folder), loss=loss)


def test_shuffled_instance_numbers_do_not_order_a_series(tmp_path):
    folder = slanted_series(tmp_path / "s", count=9)
    image = read_image(folder)
    assert_same_volume(image, *itk_read(folder))
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.InstanceNumber = int(RNG.integers(1, 999))
        data.save_as(path)
    np.testing.assert_array_equal(read_image(folder).array, image.array)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([0, 2, 4.3, 6, 8], "unevenly spaced"),
        ([0, 1, 2, 3.06, 4, 5], "unevenly spaced"),
        ([0, 2, 2, 4], "same place"),
        ([0, 2, 2.0005, 4], "same place"),
        ([0, 2, 4, 8, 10, 12], "slices are missing"),
    ],
)
def test_a_series_that_is_no_even_pile_is_refused(tmp_path, positions, words):
    with pytest.raises(UserError, match=words):
        read_image(save_series(tmp_path / "s", positions))


def test_positions_rounded_on_writing_are_no_fault(tmp_path):
    folder = save_series(tmp_path / "s", [0, 1.67, 3.33, 5, 6.67])
    image = read_image(folder)
    np.testing.assert_allclose(image.spacing[2], 6.67 / 4, rtol=1e-5)


def test_two_series_with_one_number_but_other_directions_are_refused(tmp_path):
    folder = save_series(tmp_path / "s", [0, 1, 2])
    save_dicom(folder / "x.dcm", np.zeros((4, 6), np.int16), ImagePositionPatient=[-10, 20, 3],
               ImageOrientationPatient=[0, 1, 0, 0, 0, -1])  # fmt: skip
    with pytest.raises(UserError, match=r"direction differs|x\.dcm"):
        read_image(folder)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_an_enhanced_file_equals_the_series_of_its_frames(tmp_path, order):
    folder = slanted_series(tmp_path / "s", count=4)
    files = sorted(folder.iterdir())
    slices = [pydicom.dcmread(files[i]) for i in order]
    groups = []
    for one in slices:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = one.ImagePositionPatient
        group.PlanePositionSequence = [place]
        groups.append(group)
    shared, measures, plane, values = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = [0.5, 0.75], ALONG + DOWN
    values.RescaleSlope, values.RescaleIntercept = 1, -1024
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [values]
    many = slices[0]
    del many.ImagePositionPatient, many.ImageOrientationPatient, many.PixelSpacing
    many.SOPClassUID = many.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    many.NumberOfFrames = len(slices)
    many.PerFrameFunctionalGroupsSequence = groups
    many.SharedFunctionalGroupsSequence = [shared]
    many.PixelData = b"".join(pydicom.dcmread(files[i]).PixelData for i in order)
    many.save_as(tmp_path / "many.dcm")
    image, series = read_image(tmp_path / "many.dcm"), read_image(folder)
    np.testing.assert_array_equal(image.array, series.array - 1024)
    np.testing.assert_allclose(image.affine, series.affine, atol=1e-6)


def test_one_slice_of_a_series_is_a_picture_as_itk_reads_it(tmp_path):
    for path in slanted_series(tmp_path / "s").iterdir():
        image, other = read_image(path), SimpleITK.ReadImage(str(path))
        np.testing.assert_array_equal(image.array[..., 0], SimpleITK.GetArrayFromImage(other)[0])
        np.testing.assert_allclose(image.spacing, other.GetSpacing()[1::-1])
