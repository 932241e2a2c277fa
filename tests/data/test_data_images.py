import gzip
import threading
import warnings
from pathlib import Path

import imageio.v3 as imageio
import nibabel
import numpy as np
import pytest
import SimpleITK
from image_files import RNG, save_nifti, write_all

from jaxmed.data.formats import common
from jaxmed.data.images import (
    image_shape,
    image_stem,
    is_image,
    list_images,
    read_image,
    write_mask,
)
from jaxmed.types import UserError


def test_a_file_cut_short_is_an_error_or_lost_only_padding(tmp_path):
    for path in write_all(tmp_path):
        whole, raw = read_image(path).array, path.read_bytes()
        for cut in (0, 3, 100, len(raw) // 3, len(raw) // 2):
            path.write_bytes(raw[:cut])
            with pytest.raises(UserError, match=path.name):
                read_image(path)
        for lost in (1, 4, 20, 140, 400):
            path.write_bytes(raw[:-lost])
            try:
                found = read_image(path).array
            except UserError as error:
                assert path.name in str(error)
            else:  # what is lost was padding, a checksum or a closing tag
                np.testing.assert_array_equal(found, whole)
        path.write_bytes(raw)


def test_damage_in_a_file_with_checksums_is_an_error(tmp_path):
    for path in write_all(tmp_path):
        if path.name in ("a.png", "e.tif", "g.nii.gz", "h.nrrd", "j.mha", "n.npz"):
            read_image(path)
            raw = bytearray(path.read_bytes())
            end = 200 if path.suffix == ".npz" else 50  # an archive ends in a list, told twice
            for place in (len(raw) // 2, len(raw) * 3 // 4, len(raw) - end):
                damaged = raw.copy()
                damaged[place] ^= 0x55
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=path.name):
                    read_image(path)


def test_long_runs_of_one_value_unpack(tmp_path):
    volume = SimpleITK.GetImageFromArray(np.zeros((20, 512, 512), np.uint8))
    for name in ("a.nrrd", "a.mha", "a.mhd", "a.nhdr"):
        SimpleITK.WriteImage(volume, str(tmp_path / name), useCompression=True)
        assert not read_image(tmp_path / name).array.any()


def test_size_is_checked_from_the_header(tmp_path):
    for path in write_all(tmp_path):
        with pytest.raises(UserError, match="max_voxels=50"):
            read_image(path, max_voxels=50)
        assert read_image(path).array.size > 50


def test_a_header_that_lies_about_its_size_takes_no_memory(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.ones((5, 6, 7), np.uint8))
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(UserError, match="more than the limit"):
        read_image(tmp_path / "b.nii.gz")


def test_masks_come_back_as_written(tmp_path):
    for path in write_all(tmp_path):
        if path.suffix == ".dcm":
            continue
        image = read_image(path)
        shape = image.array.shape[:-1]
        for top in (3, 300):
            mask = RNG.integers(0, top, shape).astype(np.int32)
            written = write_mask(tmp_path / "out" / path.name, mask, image)
            found = read_image(written)
            np.testing.assert_array_equal(found.array[..., 0], mask)
            np.testing.assert_allclose(found.spacing, image.spacing)
        assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_write_mask_refuses_mistakes(tmp_path):
    imageio.imwrite(tmp_path / "a.png", np.zeros((5, 7), np.uint8))
    image = read_image(tmp_path / "a.png")
    mask = np.zeros((5, 7), np.int32)
    for bad, path, words in (
        (mask, tmp_path / "a", "the image itself"),
        (mask.T, tmp_path / "b", "on the grid"),
        (mask - 1, tmp_path / "b", "from -1"),
        (mask + 70000, tmp_path / "b", "to 65535"),
        (mask + 0.5, tmp_path / "b", "whole numbers"),
    ):
        with pytest.raises(UserError, match=words):
            write_mask(path, bad, image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_names(tmp_path):
    assert image_stem("x/a.nii.gz") == "a" and image_stem("a.ome.tif") == "a"
    assert image_stem("a.b.PNG") == "a.b" and image_stem("1.2.840") == "1.2.840"
    for name in ("b.png", ".hidden.png", "sub/a.JPG", "sub/notes.txt", ".git/c.png", "z.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not read by listing")
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == ["b.png", "sub/a.JPG", "z.nii.gz"]
    assert is_image(tmp_path / "b.png") and not is_image(tmp_path / "sub" / "notes.txt")
    for call in (read_image, image_shape, list_images):
        with pytest.raises(UserError, match="no such"):
            call(tmp_path / "missing.png")
    with pytest.raises(UserError, match="format not known"):
        read_image(tmp_path / "sub" / "notes.txt")
    with pytest.raises(UserError, match="no DICOM"):
        read_image(tmp_path / "sub")


def test_quiet_is_undone_when_threads_overlap():
    before = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with common.reading(Path("a")):
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(5)
    with common.reading(Path("b")):
        leave.set()
        thread.join()
        warnings.warn("silent", stacklevel=1)
    assert warnings.filters == before


# Real images


def test_real_volumes_agree_with_other_readers(real_data):
    path = real_data / "nrrd" / "brain1_image.nrrd"
    image, itk = read_image(path), SimpleITK.ReadImage(str(path))
    oriented = SimpleITK.DICOMOrient(itk, "RAS")  # ITK names where axes point to as we do
    np.testing.assert_array_equal(
        image.array[..., 0], SimpleITK.GetArrayFromImage(oriented).transpose(2, 1, 0)
    )
    folder = real_data / "dicom_samples" / "mr_hippocrop_series"
    image = read_image(folder)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    itk = SimpleITK.DICOMOrient(SimpleITK.ReadImage(names), "RAS")
    np.testing.assert_array_equal(
        image.array[..., 0], SimpleITK.GetArrayFromImage(itk).transpose(2, 1, 0)
    )
    np.testing.assert_allclose(image.affine[:3, 3], np.array(itk.GetOrigin()) * [-1, -1, 1])
    np.testing.assert_allclose(image.spacing, itk.GetSpacing(), rtol=1e-6)


def test_real_folders_are_listed_and_shapes_are_those_of_the_header(real_data):
    for name, count in (("nrrd", 4), ("tcia_ct_dicom", 6), ("dicom_samples", 2), ("bccd", 292)):
        found = list_images(real_data / name)
        assert len(found) == count
        for path in found[:3]:
            image = read_image(path)
            assert image.array.shape == image_shape(path) and not image.notes
    for path in list_images(real_data / "tcia_ct_dicom"):
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
        np.testing.assert_allclose(read_image(path).array[..., 0], expected)


def test_real_nifti_round_trip(real_data, tmp_path):
    image = read_image(real_data / "msd_hippocampus" / "imagesTr" / "hippocampus_001.nii.gz")
    mask = (image.array[..., 0] > image.array.mean()).astype(np.uint8)
    written = nibabel.load(write_mask(tmp_path / "m", mask, image))
    assert (written.affine == nibabel.load(image.path).affine).all()
    np.testing.assert_array_equal(np.asarray(written.dataobj), mask)
