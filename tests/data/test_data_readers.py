"""What we read equals what readers read that share no code with ours, file by file."""

import dataclasses
import itertools
from pathlib import Path

import imagecodecs
import imageio.v3 as imageio
import nibabel
import numpy as np
import PIL.Image
import pydicom
import pydicom.data
import pytest
import SimpleITK
import tifffile
from image_files import RNG, oblique_affine, save_nifti, save_series, write_all
from other_readers import (
    assert_same_volume,
    itk_picture,
    itk_read,
    meta_read,
    nibabel_read,
    nrrd_read,
)

from jaxmed.data.images import read_image, write_image, write_mask
from jaxmed.types import UserError


def thirds(image):
    """A mask of three numbers on the grid of an image."""
    low, high = np.quantile(image.array[..., 0], (0.4, 0.8))
    return (image.array[..., 0] > low) * 1 + (image.array[..., 0] > high) * 2


def assert_mask_lies_on(path, image, folder, read):
    """A mask written for an image is read by the other reader where the image lies."""
    mask = thirds(image)
    written = write_mask(folder / path.name, mask, image)
    other = dataclasses.replace(image, array=mask[..., None].astype(np.uint8))
    assert_same_volume(other, *read(written))


# Real files


def test_every_hippocampus_equals_itk(real_data, tmp_path):
    files = sorted((real_data / "msd_hippocampus").glob("*Tr/*.nii.gz"))
    assert len(files) == 460
    for i, path in enumerate(files):
        image = read_image(path)
        assert_same_volume(image, *itk_read(path))
        if i % 20 == 0:
            assert_mask_lies_on(path, image, tmp_path, itk_read)


def test_every_nrrd_equals_its_header_read_by_hand(real_data, tmp_path):
    files = sorted((real_data / "nrrd").glob("*.nrrd"))
    assert len(files) == 4
    for path in files:
        image = read_image(path)
        assert_same_volume(image, *nrrd_read(path))
        assert_mask_lies_on(path, image, tmp_path, nrrd_read)


def test_every_real_dicom_equals_itk(real_data):
    series = real_data / "dicom_samples" / "mr_hippocrop_series"
    assert_same_volume(read_image(series), *itk_read(series))
    slices = sorted(series.iterdir())
    assert len(slices) == 32
    files = [*slices, real_data / "dicom_samples" / "highdicom" / "ct_image.dcm"]
    files += sorted((real_data / "tcia_ct_dicom").glob("*.dcm"))
    for path in files:
        image = read_image(path)
        array, spacing = itk_picture(path)
        np.testing.assert_array_equal(image.array, array)
        np.testing.assert_allclose(image.spacing, spacing, rtol=1e-6)
    with pytest.raises(UserError, match="holds no picture"):
        read_image(real_data / "dicom_samples" / "highdicom" / "seg_image_ct_binary.dcm")


# Why a file that pydicom ships is refused: words of our error, and what is so about the file.
REFUSED = {
    "holds no picture": "a report, a plan, a waveform, a segmentation, a dose or a directory",
    "pixels are missing": "a header alone",
    "make no volume": "a film, or colours frame by frame, without places in space",
    "(InvalidDicomError)": "begins without the 128 bytes and DICM that every DICOM file has",
    "format not known": "no image: a text, an archive",
}
BROKEN = {
    "JPEG-lossy.dcm": "its JPEG states a scan that sequential JPEG does not have",
    "JPEG2000-embedded-sequence-delimiter.dcm": "its JPEG 2000 is an invented one",
    "MR_truncated.dcm": "cut short",
    "badVR.dcm": "numbers in its header are none",
}
WITHOUT_PREAMBLE = {
    "ExplVR_BigEndNoMeta.dcm",
    "ExplVR_LitEndNoMeta.dcm",
    "no_meta.dcm",
    "rtstruct.dcm",
}
# SimpleITK gives values that none of the eight bits of its twin explains: see the test of twins.
ITK_WRONG = {"SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"}


def shipped_dicom():
    """All files inside the pydicom wheel that may be DICOM."""
    folder = Path(pydicom.data.__file__).parent
    known = (".py", ".pyc", ".json", ".txt", ".md", ".dump", ".icc", "README", ".gz")
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(known))
    return sorted(files)


def tolerance(path):
    """What two decoders of lossy JPEG may differ by."""
    uid = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
    return 2 if uid in (pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit) else 0


def test_every_file_of_pydicom_equals_itk_or_is_refused_for_a_reason():
    read = 0
    for path in shipped_dicom():
        try:
            image = read_image(path)
        except UserError as error:
            known = [words for words in REFUSED if words in str(error)]
            assert known or path.name in BROKEN, error
            if "(InvalidDicomError)" in known:
                assert path.name in WITHOUT_PREAMBLE
            continue
        assert image.orientation is None
        read += 1
        array, spacing = itk_picture(path)
        np.testing.assert_allclose(image.spacing, spacing, rtol=1e-6, err_msg=path.name)
        if path.name not in ITK_WRONG:
            # float32 of ours against ITK's float64 where values are scaled
            np.testing.assert_allclose(
                image.array, array, rtol=1e-6, atol=tolerance(path), err_msg=path.name
            )
    assert read >= 85


def test_deep_colours_of_pydicom_equal_their_twin_of_eight_bits():
    def get(name):
        return read_image(pydicom.data.get_testdata_file(name, download=False)).array

    eight = get("SC_rgb_rle.dcm").astype(np.int64)
    np.testing.assert_array_equal(get("SC_rgb_rle_16bit.dcm"), eight * 257)
    deepest = (eight * (0xFFFFFFFF // 255)).astype(np.float32)
    np.testing.assert_array_equal(get("SC_rgb_rle_32bit.dcm"), deepest)


def test_a_dose_is_no_picture_with_one_frame_or_many():
    for name in ("rtdose.dcm", "rtdose_1frame.dcm"):
        with pytest.raises(UserError, match="holds no picture"):
            read_image(pydicom.data.get_testdata_file(name, download=False))


def test_every_nifti_of_nibabel_equals_itk():
    folder = Path(nibabel.__file__).parent / "tests" / "data"
    files = sorted([*folder.glob("*.nii"), *folder.glob("*.nii.gz")])
    if not files:
        pytest.skip("this nibabel comes without its test files")
    for path in files:
        if path.name == "row_major.dconn.nii":  # connections of a brain's surface
            with pytest.raises(UserError, match="too long to be channels"):
                read_image(path)
            continue
        image = read_image(path)
        # ITK does not know the second version, and turns NaN into 0.
        read = nibabel_read if "nifti2" in path.name else itk_read
        array, affine = read(path)
        kept = dataclasses.replace(image, array=np.nan_to_num(image.array))
        assert_same_volume(kept, array, affine)


# Files written here

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), [1, -1], [1, -1], [1, -1]))


def test_nifti_of_all_48_orientations_equals_itk_and_nibabel(tmp_path):
    assert len(ORIENTATIONS) == 48
    for i, (order, *signs) in enumerate(ORIENTATIONS):
        array = RNG.integers(-99, 99, (3, 4, 5)).astype(np.int16)
        path = save_nifti(tmp_path / f"{i}.nii.gz", array, oblique_affine(order, signs))
        image = read_image(path)
        assert_same_volume(image, *itk_read(path))
        assert_same_volume(image, *nibabel_read(path))
        assert_mask_lies_on(path, image, tmp_path / "masks", itk_read)
        assert_mask_lies_on(path, image, tmp_path / "masks", nibabel_read)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [True, False])
def test_nrrd_and_metaimage_of_all_48_orientations_equal_their_headers(tmp_path, suffix, packed):
    read = nrrd_read if suffix == ".nrrd" else meta_read
    for i, (order, *signs) in enumerate(ORIENTATIONS):
        array = RNG.integers(-99, 99, (3, 4, 5)).astype(np.int16)
        affine = np.diag([-1.0, -1, 1, 1]) @ oblique_affine(order, signs)
        volume = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        volume.SetDirection((affine[:3, :3] / spacing).ravel())
        volume.SetSpacing(spacing)
        volume.SetOrigin(affine[:3, 3])
        path = tmp_path / f"{i}{suffix}"
        SimpleITK.WriteImage(volume, str(path), useCompression=packed)
        image = read_image(path)
        assert_same_volume(image, *read(path))
        assert_mask_lies_on(path, image, tmp_path / "masks", read)


def test_pictures_equal_itk(tmp_path):
    gray, colour = RNG.integers(0, 256, (9, 7), np.uint8), RNG.integers(0, 256, (9, 7, 3), np.uint8)
    deep = RNG.integers(0, 65536, (9, 7), np.uint16)
    for name, array in (("gray.png", gray), ("colour.png", colour), ("deep.png", deep),
                        ("gray.bmp", gray), ("colour.bmp", colour), ("gray.jpg", gray),
                        ("colour.jpg", colour)):  # fmt: skip
        # As many colours as voxels, for how to fill in left-out ones is the decoder's own choice.
        options = {"subsampling": 0} if name.endswith(".jpg") else {}
        imageio.imwrite(tmp_path / name, array, **options)
    (tmp_path / "deepest.png").write_bytes(
        imagecodecs.png_encode(RNG.integers(0, 65536, (9, 7, 3), np.uint16))
    )
    for path in sorted(tmp_path.iterdir()):
        image = read_image(path)
        lossy = 2 if path.suffix == ".jpg" else 0
        expected = itk_picture(path)[0][..., : image.array.shape[-1]]  # it makes gray BMP coloured
        np.testing.assert_allclose(image.array, expected, rtol=0, atol=lossy)
        mask = thirds(image)
        written = write_mask(tmp_path / "masks" / path.name, mask, image)
        np.testing.assert_array_equal(itk_picture(written)[0][..., 0], mask)


def test_tiff_equals_pillow(tmp_path):
    volume = RNG.integers(0, 999, (4, 5, 7)).astype(np.uint16)
    colour = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    size = {"PhysicalSizeX": 500.0, "PhysicalSizeY": 250.0, "PhysicalSizeZ": 2000.0}
    tifffile.imwrite(tmp_path / "a.ome.tif", volume, metadata={"axes": "ZYX", **size})
    tifffile.imwrite(tmp_path / "b.tif", volume, compression="zlib", photometric="minisblack")
    tifffile.imwrite(tmp_path / "c.tif", colour, photometric="rgb", compression="lzw")
    tifffile.imwrite(tmp_path / "d.tif", colour, photometric="rgb", tile=(16, 16))
    for path in sorted(tmp_path.iterdir()):
        image = read_image(path)
        mask = thirds(image)
        written = write_mask(tmp_path / "masks" / path.name, mask, image)
        if image.array.ndim == 3:
            np.testing.assert_array_equal(image.array, np.asarray(PIL.Image.open(path)))
            np.testing.assert_array_equal(np.asarray(PIL.Image.open(written)), mask)
            continue
        for file, expected in ((path, image.array[..., 0]), (written, mask)):
            with PIL.Image.open(file) as pages:
                for z in range(pages.n_frames):
                    pages.seek(z)
                    np.testing.assert_array_equal(np.asarray(pages).T, expected[..., z])
    np.testing.assert_allclose(read_image(tmp_path / "a.ome.tif").spacing, [0.5, 0.25, 2])


def test_probabilities_are_read_by_others_where_the_image_lies(tmp_path):
    array = RNG.integers(0, 99, (3, 4, 5)).astype(np.int16)
    affine = oblique_affine((2, 0, 1), (1, -1, -1))
    files = [save_nifti(tmp_path / name, array, affine) for name in ("a.nii", "b.nii.gz")]
    for name in ("c.nrrd", "d.mha"):
        files.append(tmp_path / name)
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(files[0])), str(files[-1]))
    for path in files:
        image = read_image(path)
        numbers = RNG.random((*image.array.shape[:3], 3), np.float32)
        written = write_image(tmp_path / "out" / path.name, numbers, image)
        assert written.name == path.name
        assert_same_volume(dataclasses.replace(image, array=numbers), *itk_read(written))
        if "nii" in path.name:
            original, again = nibabel.load(path), nibabel.load(written)
            assert (original.affine == again.affine).all() and again.shape == (3, 4, 5, 3)
        np.testing.assert_array_equal(read_image(written).array, numbers)


def test_probabilities_of_other_formats_come_back(tmp_path):
    for path in write_all(tmp_path):
        image = read_image(path)
        numbers = RNG.random((*image.array.shape[:-1], 2), np.float32)
        written = write_image(tmp_path / "out" / path.name, numbers, image)
        np.testing.assert_array_equal(read_image(written).array, numbers)
    series = read_image(save_series(tmp_path / "s", [0, 2, 4]))
    numbers = RNG.random((*series.array.shape[:3], 2), np.float32)
    written = write_image(tmp_path / "out" / "s", numbers, series)
    assert written.name == "s.nii.gz"
    assert_same_volume(dataclasses.replace(series, array=numbers), *itk_read(written))
    with pytest.raises(UserError, match="on the grid"):
        write_image(tmp_path / "out" / "s", numbers[1:], series)
