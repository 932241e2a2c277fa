import imagecodecs
import imageio.v3 as imageio
import nibabel
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import SimpleITK
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import RNG, check, oblique_affine, save_nifti

from jaxmed.data.formats import common
from jaxmed.data.formats.common import UNSIZED
from jaxmed.data.images import (
    image_shape,
    read_image,
    write_mask,
)
from jaxmed.types import UserError

# Pictures


def test_pictures_of_8_and_16_bits(tmp_path):
    gray, colour = RNG.integers(0, 256, (5, 7), np.uint8), RNG.integers(0, 256, (5, 7, 3), np.uint8)
    deep = RNG.integers(0, 65536, (5, 7), np.uint16)
    for name, array in (("a.png", gray), ("b.bmp", gray), ("c.png", colour), ("d.bmp", colour)):
        imageio.imwrite(tmp_path / name, array)
        check(tmp_path / name, np.atleast_3d(array))
    imageio.imwrite(tmp_path / "deep.png", deep)
    check(tmp_path / "deep.png", deep[..., None].astype(np.float32))


def test_colour_png_of_16_bits_keeps_its_bits(tmp_path):
    deep = RNG.integers(0, 65536, (5, 7, 3), np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(deep))
    check(tmp_path / "a.png", deep.astype(np.float32))


def test_palette_gives_colours_or_indices(tmp_path):
    numbers = RNG.integers(0, 3, (5, 7), np.uint8)
    picture = PIL.Image.new("P", (7, 5))
    picture.putdata(numbers.ravel().tolist())
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 7]], np.uint8)
    picture.putpalette(colours.ravel().tolist())
    picture.save(tmp_path / "a.png")
    check(tmp_path / "a.png", colours[numbers])
    kept = read_image(tmp_path / "a.png", indices=True)
    np.testing.assert_array_equal(kept.array[..., 0], numbers)


def test_opacity_is_dropped_and_told_where_it_varies(tmp_path):
    pixels = RNG.integers(0, 256, (5, 7, 4), np.uint8)
    imageio.imwrite(tmp_path / "varies.png", pixels)
    assert "alpha" in check(tmp_path / "varies.png", pixels[..., :3]).notes[0]
    pixels[..., 3] = 255
    imageio.imwrite(tmp_path / "same.png", pixels)
    assert not check(tmp_path / "same.png", pixels[..., :3]).notes


def test_truncated_loading_of_pillow_is_not_allowed(tmp_path, monkeypatch):
    imageio.imwrite(tmp_path / "a.png", np.zeros((5, 7), np.uint8))
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
        read_image(tmp_path / "a.png")


def test_opacity_of_gray_palette_and_tiff(tmp_path):
    pixels = RNG.integers(0, 256, (5, 7, 4), np.uint8)
    PIL.Image.fromarray(pixels[..., :2]).save(tmp_path / "gray.png")
    check(tmp_path / "gray.png", pixels[..., :1])
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    check(tmp_path / "a.tif", pixels[..., :3])
    tifffile.imwrite(
        tmp_path / "v.tif", np.stack([pixels] * 3), photometric="rgb", extrasamples=["unassalpha"]
    )
    check(tmp_path / "v.tif", np.stack([pixels[..., :3].transpose(1, 0, 2)] * 3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.bmp"])
def test_one_bit_picture_is_black_and_white_and_a_mask_of_0_and_1(tmp_path, name):
    bits = RNG.integers(0, 2, (5, 7)).astype(bool)
    PIL.Image.fromarray(bits).save(tmp_path / name)
    image = check(tmp_path / name, 255 * bits[..., None].astype(np.uint8))
    assert image.notes == ("1-bit gray, spread over 0 to 255",)
    mask = read_image(tmp_path / name, indices=True)
    np.testing.assert_array_equal(mask.array[..., 0], bits.astype(np.uint8))
    assert not mask.notes


def test_exif_orientation_leaves_pixels_as_stored(tmp_path):
    picture = PIL.Image.fromarray(np.zeros((8, 16, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").array.shape == (8, 16, 3)


def test_channels_convert_between_gray_and_colour(tmp_path):
    gray = RNG.integers(0, 256, (5, 7), np.uint8)
    imageio.imwrite(tmp_path / "gray.png", gray)
    imageio.imwrite(tmp_path / "rgb.png", np.stack([gray] * 3, -1))
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png", channels=1).array[..., 0], gray)
    assert read_image(tmp_path / "gray.png", channels=3).array.shape == (5, 7, 3)
    with pytest.raises(UserError, match="has 1 channels, which cannot become 4"):
        read_image(tmp_path / "gray.png", channels=4)


# TIFF


def test_tiff_pictures_and_volumes(tmp_path):
    for i, (array, options, expected) in enumerate(
        [
            (RNG.integers(0, 256, (5, 7), np.uint8), {}, lambda a: a[..., None]),
            (RNG.integers(0, 256, (5, 7, 3), np.uint8), {"photometric": "rgb"}, lambda a: a),
            (
                RNG.integers(0, 256, (3, 5, 7), np.uint8),
                {"photometric": "rgb", "planarconfig": "separate"},
                lambda a: a.transpose(1, 2, 0),
            ),
            (
                RNG.integers(0, 9, (4, 5, 7)).astype(np.int16),
                {"photometric": "minisblack", "compression": "lzw"},
                lambda a: a.transpose(2, 1, 0)[..., None],
            ),
            (
                RNG.random((4, 2, 5, 7), np.float32),
                {"ome": True, "metadata": {"axes": "ZCYX"}},
                lambda a: a.transpose(3, 2, 0, 1),
            ),
        ]
    ):
        tifffile.imwrite(tmp_path / f"{i}.tif", array, **options)
        check(tmp_path / f"{i}.tif", expected(array))


def test_tiff_sizes_of_ome_and_imagej_in_millimetres(tmp_path):
    array = np.ones((4, 5, 7), np.uint16)
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(tmp_path / "a.ome.tif", array, metadata={"axes": "ZYX", **sizes})
    np.testing.assert_allclose(
        read_image(tmp_path / "a.ome.tif").spacing, [5e-4, 2.5e-4, 2e-3], rtol=1e-6
    )
    tifffile.imwrite(
        tmp_path / "b.tif",
        array,
        imagej=True,
        resolution=(2.0, 4.0),
        metadata={"axes": "ZYX", "spacing": 2.0, "unit": "um"},
    )
    np.testing.assert_allclose(
        read_image(tmp_path / "b.tif").spacing, [5e-4, 2.5e-4, 2e-3], rtol=1e-6
    )


def test_tiff_palette_and_white_is_zero(tmp_path):
    numbers = RNG.integers(0, 256, (5, 7), np.uint8)
    table = RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "p.tif", numbers, photometric="palette", colormap=table)
    check(tmp_path / "p.tif", (table.T[numbers] >> 8).astype(np.uint8))
    assert (read_image(tmp_path / "p.tif", indices=True).array[..., 0] == numbers).all()
    tifffile.imwrite(tmp_path / "w.tif", numbers, photometric="miniswhite")
    assert check(tmp_path / "w.tif", 255 - numbers[..., None]).notes


def test_tiff_that_asks_to_be_turned_is_taken_as_stored_and_told(tmp_path):
    pixels = RNG.integers(0, 256, (5, 7), np.uint8)
    for turn, notes in ((1, 0), (6, 1)):
        tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=[(274, "H", 1, turn, True)])
        assert len(check(tmp_path / "a.tif", pixels[..., None]).notes) == notes


def test_tiff_over_time_is_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((3, 5, 7), np.uint8), ome=True, metadata={"axes": "TYX"}
    )
    with pytest.raises(UserError, match="axes TYX"):
        read_image(tmp_path / "a.tif")


# NIfTI

orders = st.permutations(range(3))
sign_triples = st.tuples(*[st.sampled_from([-1, 1])] * 3)


@settings(max_examples=15, deadline=None)
@given(orders, sign_triples)
def test_nifti_is_ras_and_masks_return_to_the_file_bit_for_bit(tmp_path_factory, order, signs):
    folder = tmp_path_factory.mktemp("n")
    array = RNG.integers(-99, 99, (3, 4, 5)).astype(np.int16)
    path = save_nifti(folder / "a.nii.gz", array, oblique_affine(order, signs), codes=(2, 1))
    image = read_image(path)
    assert image.array.dtype == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.spacing, [0.7, 1.1, 2.5], rtol=1e-5)
    # the same voxel lies at the same place in the world
    reference = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_array_equal(image.array[..., 0], np.asarray(reference.dataobj))
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-5)
    np.testing.assert_array_equal(common.from_ras(image.array, image.orientation)[..., 0], array)
    mask = (image.array[..., 0] > 0).astype(np.int32) * 2
    stored = nibabel.load(write_mask(folder / "out" / "a.png", mask, image))
    original = nibabel.load(path)
    assert stored.get_filename().endswith("a.nii.gz") and stored.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(stored.dataobj), (array > 0) * 2)
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
                  "qoffset_x", "qoffset_y", "qoffset_z", "pixdim", "sform_code", "qform_code",
                  "xyzt_units"):  # fmt: skip
        assert stored.header[field].tobytes() == original.header[field].tobytes(), field
    np.testing.assert_array_equal(read_image(stored.get_filename()).array[..., 0], mask)


def test_nifti_agrees_with_itk_in_the_world(tmp_path):
    array = RNG.random((5, 6, 7), np.float32)
    path = save_nifti(tmp_path / "a.nii", array, oblique_affine((1, 2, 0), (-1, 1, -1)))
    image, other = read_image(path), SimpleITK.ReadImage(str(path))
    for index in np.ndindex(*image.array.shape[:3]):
        x, y, z = (image.affine @ [*index, 1])[:3]
        there = other.TransformPhysicalPointToIndex((-x, -y, z))  # ITK's world is LPS
        assert other[there] == image.array[(*index, 0)]


def test_nifti_scaling_types_and_channels(tmp_path):
    array = RNG.integers(0, 99, (3, 4, 5)).astype(np.int16)
    scaled = read_image(save_nifti(tmp_path / "a.nii", array, np.eye(4), slope=(0.5, -3)))
    assert scaled.array.dtype == np.float32
    np.testing.assert_allclose(scaled.array[..., 0], array * 0.5 - 3)
    for dtype, expected in (("u1", "u1"), ("i1", "i2"), ("u2", "f4"), ("i4", "f4"), ("f8", "f4")):
        path = save_nifti(tmp_path / f"{dtype}.nii", array.astype(dtype), np.eye(4))
        check(path, array[..., None].astype(expected))
    modalities = RNG.random((3, 4, 5, 2), np.float32)
    check(save_nifti(tmp_path / "c.nii", modalities, np.eye(4)), modalities)
    check(save_nifti(tmp_path / "v.nii", modalities[:, :, :, None], np.eye(4)), modalities)
    path = save_nifti(tmp_path / "t.nii", np.zeros((2, 2, 2, 40), np.uint8), np.eye(4))
    with pytest.raises(UserError, match="time"):
        read_image(path)


def test_nifti_second_version_and_units(tmp_path):
    image = nibabel.Nifti2Image(np.ones((2, 3, 4), np.uint8), np.diag([10.0, 20, 30, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii.gz")
    found = check(tmp_path / "a.nii.gz", np.ones((2, 3, 4, 1), np.uint8))
    np.testing.assert_allclose(found.spacing, [0.01, 0.02, 0.03], rtol=1e-6)
    written = nibabel.load(write_mask(tmp_path / "m", found.array[..., 0], found))
    assert isinstance(written, nibabel.Nifti2Image)


def test_nifti_keeps_nan_and_tells_large_integers(tmp_path):
    array = np.array([np.nan, np.inf, -np.inf, 1], np.float32).reshape(2, 2, 1)
    found = read_image(save_nifti(tmp_path / "a.nii", array, np.eye(4))).array
    np.testing.assert_array_equal(found[..., 0], array)
    large = np.array([2**24 + 1, 0], np.int32).reshape(2, 1, 1)
    assert "rounded" in read_image(save_nifti(tmp_path / "b.nii", large, np.eye(4))).notes[0]


def test_nifti_mask_holds_no_texts_of_the_original(tmp_path):
    image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.uint8), np.eye(4))
    image.header["descrip"] = b"Secret Name"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Secret Name"))
    nibabel.save(image, tmp_path / "a.nii")
    found = read_image(tmp_path / "a.nii")
    written = write_mask(tmp_path / "mask.nii", found.array[..., 0], found)
    assert b"Secret" not in written.read_bytes()


def test_nifti_with_broken_affine_is_refused(tmp_path):
    image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.uint8), np.eye(4))
    image.header["srow_x"] = 0
    image.header["sform_code"] = 1
    raw = nibabel.Nifti1Image(np.ones((2, 3, 4), np.uint8), None, image.header)
    nibabel.save(raw, tmp_path / "a.nii")
    with pytest.raises(UserError, match="affine"):
        read_image(tmp_path / "a.nii")


# NRRD and MetaImage


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_agree_with_nifti(tmp_path, suffix):
    array = RNG.integers(0, 99, (5, 6, 7)).astype(np.int16)
    nifti = save_nifti(tmp_path / "a.nii", array, oblique_affine((2, 0, 1), (1, -1, -1)))
    path = tmp_path / f"a{suffix}"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(nifti)), str(path))
    image, reference = read_image(path), read_image(nifti)
    np.testing.assert_array_equal(image.array, reference.array)
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-4)
    np.testing.assert_allclose(image.spacing, reference.spacing, rtol=1e-5)
    assert image_shape(path) == image.array.shape
    mask = (image.array[..., 0] > 50).astype(np.uint8)
    written = write_mask(tmp_path / "out" / "a", mask, image)
    again, first = SimpleITK.ReadImage(str(written)), SimpleITK.ReadImage(str(path))
    np.testing.assert_allclose(again.GetOrigin(), first.GetOrigin(), rtol=1e-12)
    np.testing.assert_allclose(again.GetDirection(), first.GetDirection(), atol=1e-12)
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(again), SimpleITK.GetArrayFromImage(first) > 50
    )
    np.testing.assert_array_equal(read_image(written).array[..., 0], mask)


def test_itk_pictures_and_vectors(tmp_path):
    array = RNG.integers(0, 99, (5, 7)).astype(np.uint8)
    picture = SimpleITK.GetImageFromArray(array)
    picture.SetSpacing((0.5, 0.25))
    SimpleITK.WriteImage(picture, str(tmp_path / "a.mha"))
    np.testing.assert_array_equal(
        check(tmp_path / "a.mha", array[..., None]).spacing, np.float32([0.25, 0.5])
    )
    image = read_image(tmp_path / "a.mha")
    written = write_mask(tmp_path / "m.mha", image.array[..., 0] % 3, image)
    np.testing.assert_array_equal(read_image(written).array, image.array % 3)
    vectors = RNG.random((4, 5, 6, 2), np.float32)
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(vectors, isVector=True), str(tmp_path / "v.nrrd")
    )
    assert image_shape(tmp_path / "v.nrrd") == read_image(tmp_path / "v.nrrd").array.shape
    assert read_image(tmp_path / "v.nrrd").array.shape == (6, 5, 4, 2)


# NumPy arrays


def test_npy(tmp_path):
    for i, shape in enumerate([(5, 7), (5, 7, 3), (5, 7, 9), (5, 7, 9, 2)]):
        array = RNG.random(shape, np.float32)
        np.save(tmp_path / f"{i}.npy", array)
        check(tmp_path / f"{i}.npy", array if i in (1, 3) else array[..., None])
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="Python objects"):
        read_image(tmp_path / "o.npy")
    np.save(tmp_path / "volume.npy", np.zeros((5, 6, 7), np.uint8))
    assert read_image(tmp_path / "volume.npy").notes == (UNSIZED,)
    np.save(tmp_path / "picture.npy", np.zeros((5, 6), np.uint8))
    assert not read_image(tmp_path / "picture.npy").notes


def test_npz_holds_one_array_or_one_called_image(tmp_path):
    array, other = RNG.random((5, 7), np.float32), np.zeros((3, 3))
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", scan=array)
    np.savez_compressed(tmp_path / "c.npz", image=array, mask=other)
    np.savez(tmp_path / "d.npz", array, second=other)
    for path in sorted(tmp_path.iterdir()):
        check(path, array[..., None])
    np.savez(tmp_path / "two.npz", one=array, two=other)
    with pytest.raises(UserError, match="holds the arrays one, two; expected one"):
        read_image(tmp_path / "two.npz")
    np.savez(tmp_path / "none.npz")
    with pytest.raises(UserError, match="holds the arrays none"):
        image_shape(tmp_path / "none.npz")
    np.savez(tmp_path / "o.npz", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="Python objects"):
        read_image(tmp_path / "o.npz")
    image = read_image(tmp_path / "c.npz")
    written = write_mask(tmp_path / "out" / "c.npz", image.array[..., 0] > 0.5, image)
    assert written.name == "c.npy"
    np.testing.assert_array_equal(np.load(written), array > 0.5)


def test_arrays_with_more_behind_them_or_of_changed_names_are_refused(tmp_path):
    array = np.arange(35, dtype=np.int16).reshape(5, 7)
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, array)
        np.save(file, array)
    np.savez(tmp_path / "b.npz", array)
    raw = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(raw.replace(b"(5, 7)", b"(5, 5)"))
    np.savez(tmp_path / "c.npz", image=array, other=array)
    raw = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(raw.replace(b"image.npy", b"image.npz"))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name):
            read_image(path)
