"""What headers say of units, places and other files is followed, told or refused; never guessed."""

import gzip
import zlib

import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from image_files import RNG, save_dicom, save_series
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from jaxmed.data.formats.common import UNSIZED
from jaxmed.data.images import image_files, image_grid, read_image
from jaxmed.types import UserError

VALUES = RNG.integers(0, 99, (4, 5, 6)).astype(np.int16)  # (z, y, x)


def save_nrrd(path, *lines, data=None):
    text = "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\n"
    text += "sizes: 6 5 4\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,0,0)\n"
    text += "endian: little\n"
    if not any(line.startswith("encoding") for line in lines):
        text += "encoding: raw\n"
    content = (text + "".join(f"{line}\n" for line in lines) + "\n").encode()
    path.write_bytes(content + (VALUES.tobytes() if data is None else data))
    return path


def save_meta(path, *lines, data=None, name="LOCAL"):
    text = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementSpacing = 2 3 4\n"
    text += "".join(f"{line}\n" for line in lines)
    text += f"ElementType = MET_SHORT\nElementDataFile = {name}\n"
    path.write_bytes(text.encode() + (VALUES.tobytes() if data is None else data))
    return path


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("um", 1e-3), ("cm", 10), ("m", 1e3)])
def test_units_of_length_become_millimetres(tmp_path, unit, factor):
    three = " ".join([f'"{unit}"'] * 3)
    for path in (
        save_nrrd(tmp_path / "a.nrrd", f"space units: {three}"),
        save_meta(
            tmp_path / "a.mha", f"DistanceUnits = {unit}", "TransformMatrix = 1 0 0 0 1 0 0 0 1"
        ),
    ):
        image = read_image(path)
        np.testing.assert_allclose(image.spacing, np.array([2, 3, 4]) * factor, rtol=1e-6)
        np.testing.assert_allclose(
            np.linalg.norm(image.affine[:3, :3], axis=0), image.spacing, rtol=1e-6
        )
        np.testing.assert_array_equal(image_grid(path).affine, image.affine)
        assert not image.notes
    found = read_image(tmp_path / "a.nrrd").affine[0, 3]
    np.testing.assert_allclose(found, 10 * factor, rtol=1e-6)


def test_a_header_without_directions_is_told(tmp_path):
    [note] = read_image(save_meta(tmp_path / "a.mha")).notes
    assert note == "the header gives no orientation; left, posterior, superior is assumed"


def test_a_unit_that_is_unknown_is_told(tmp_path):
    image = read_image(save_nrrd(tmp_path / "a.nrrd", 'space units: "furlong" "furlong" "furlong"'))
    assert image.spacing.tolist() == [2, 3, 4] and "'furlong', is taken for mm" in image.notes[0]


def test_sizes_of_ome_in_odd_units(tmp_path):
    def spacing(unit):
        metadata = {"axes": "YX", "PhysicalSizeX": 5.0, "PhysicalSizeXUnit": unit}
        metadata |= {"PhysicalSizeY": 5.0, "PhysicalSizeYUnit": unit}
        tifffile.imwrite(tmp_path / "a.ome.tif", VALUES[0], ome=True, metadata=metadata)
        return read_image(tmp_path / "a.ome.tif").spacing

    np.testing.assert_allclose(spacing("Å"), 5e-7, rtol=1e-6)
    np.testing.assert_allclose(spacing("in"), 127, rtol=1e-6)
    assert spacing("reference frame").tolist() == [1, 1]  # no length: unknown


def test_voxels_that_are_fewer_than_the_header_says_are_refused(tmp_path):
    packed = zlib.compress(VALUES.tobytes()[:100])  # a whole stream, of too little
    with pytest.raises(UserError, match=r"a.mha: the file is cut short"):
        read_image(save_meta(tmp_path / "a.mha", "CompressedData = True", data=packed))
    whole = zlib.compress(VALUES.tobytes())
    for size in ([], ["CompressedDataSize = 7"]):
        with pytest.raises(UserError, match="CompressedDataSize is"):
            read_image(save_meta(tmp_path / "b.mha", "CompressedData = True", *size, data=whole))
    size = f"CompressedDataSize = {len(whole)}"
    image = read_image(save_meta(tmp_path / "b.mha", "CompressedData = True", size, data=whole))
    assert sorted(image.array.ravel()) == sorted(VALUES.ravel())
    with pytest.raises(UserError, match=r"c.nrrd: .* cut short"):
        read_image(save_nrrd(tmp_path / "c.nrrd", data=VALUES.tobytes()[:-2]))


def test_compressed_voxels_without_their_checksum_are_refused(tmp_path):
    packed = zlib.compress(VALUES.tobytes())[:-4]  # all voxels unpack, the end is missing
    meta = ("CompressedData = True", f"CompressedDataSize = {len(packed)}")
    for path in (
        save_meta(tmp_path / "a.mha", *meta, data=packed),
        save_nrrd(tmp_path / "a.nrrd", "encoding: gzip", data=packed),
    ):
        with pytest.raises(UserError, match=f"{path.name}.*damaged"):
            read_image(path)


@pytest.mark.parametrize("name", ["../secret.raw", "/etc/secret.raw", "LIST"])
def test_voxels_outside_the_folder_are_not_read(tmp_path, name):
    (tmp_path / "secret.raw").write_bytes(VALUES.tobytes())
    folder = tmp_path / "set"
    folder.mkdir()
    listed = b"../secret.raw\n" * 4
    with pytest.raises(UserError, match="leads out of the folder"):
        read_image(save_meta(folder / "a.mhd", data=listed, name=name))
    with pytest.raises(UserError, match="leads out of the folder"):
        read_image(save_nrrd(folder / "a.nhdr", f"data file: {name}", data=listed))


def test_files_of_voxels_are_known_wherever_they_lie_below_the_header(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.raw").write_bytes(VALUES.tobytes())
    (tmp_path / "a.raw").write_bytes(bytes(9))  # of another image
    header = save_meta(tmp_path / "a.mhd", data=b"", name="raw/a.raw")
    assert image_files(header) == [header, tmp_path / "raw/a.raw"]
    assert sorted(read_image(header).array.ravel()) == sorted(VALUES.ravel())
    for number, plane in enumerate(VALUES):
        (tmp_path / f"raw/{number}.raw").write_bytes(plane.tobytes())
    names = "".join(f"raw/{number}.raw\n" for number in range(4)).encode()
    listed = save_meta(tmp_path / "b.mhd", data=names, name="LIST")
    assert image_files(listed) == [listed, *(tmp_path / f"raw/{n}.raw" for n in range(4))]
    assert sorted(read_image(listed).array.ravel()) == sorted(VALUES.ravel())


def test_a_second_channel_of_unspecified_meaning_is_data(tmp_path):
    both = RNG.integers(0, 9, (8, 9, 2)).astype(np.uint16)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "a.tif", both, **options)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, both)
    tifffile.imwrite(tmp_path / "b.tif", both, extrasamples=["unassalpha"], **options)
    assert read_image(tmp_path / "b.tif").array.shape == (8, 9, 1)


@pytest.mark.parametrize("move", [[50.0, 0, 0], [0, 0.2, 0]])
def test_slices_beside_their_row_are_refused(tmp_path, move):
    folder = save_series(tmp_path / "s", [0, 2, 4, 6, 8, 10])
    read_image(folder)
    file = sorted(folder.iterdir())[2]
    moved = pydicom.dcmread(file)
    moved.ImagePositionPatient = [
        float(a) + b for a, b in zip(moved.ImagePositionPatient, move, strict=True)
    ]
    moved.save_as(file)
    with pytest.raises(UserError, match="follow no straight line"):
        read_image(folder)


def test_hounsfield_units_are_not_turned_round_for_display(tmp_path):
    pixels = RNG.integers(0, 2000, (4, 6)).astype(np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="MONOCHROME1",
                      Modality="CT", BitsStored=12, HighBit=11, RescaleSlope=1,
                      RescaleIntercept=-1024)  # fmt: skip
    np.testing.assert_array_equal(read_image(path).array[..., 0], pixels.astype(int) - 1024)


def test_a_slope_of_nothing_is_refused(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", np.ones((4, 6), np.uint16), RescaleSlope=0)
    with pytest.raises(UserError, match="RescaleSlope is 0"):
        read_image(path)


def test_one_frame_of_an_enhanced_file_keeps_its_spacing(tmp_path):
    measures, group = Dataset(), Dataset()
    measures.PixelSpacing = [0.25, 0.5]
    group.PixelMeasuresSequence = Sequence([measures])
    path = save_dicom(tmp_path / "a.dcm", np.ones((4, 6), np.uint16), PixelSpacing=None,
                      SharedFunctionalGroupsSequence=Sequence([group]))  # fmt: skip
    np.testing.assert_array_equal(read_image(path).spacing, np.float32([0.25, 0.5]))


def test_masks_of_images_in_other_units_lie_on_them_for_itk(tmp_path):
    from jaxmed.data.images import write_mask

    path = save_nrrd(tmp_path / "a.nrrd", 'space units: "um" "um" "um"')
    image = read_image(path)
    written = write_mask(tmp_path / "mask.nrrd", image.array[..., 0] > 50, image)
    one, other = (SimpleITK.ReadImage(str(file)) for file in (path, written))
    assert one.GetSpacing() == other.GetSpacing() and one.GetOrigin() == other.GetOrigin()


@pytest.mark.parametrize("yes", ["True", "T", "true", "1"])
@pytest.mark.parametrize("sign", [" = ", " : "])
def test_compressed_metaimages_are_known_in_every_spelling(tmp_path, yes, sign):
    """ITK looks at the first letter, takes colons too, and reads damaged voxels without a word."""
    directions = f"TransformMatrix{sign}1 0 0 0 1 0 0 0 1"
    packed = zlib.compress(RNG.bytes(VALUES.nbytes))  # nothing shrinks, so that no size tells
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    lines = directions, f"CompressedData{sign}{yes}", f"CompressedDataSize{sign}{len(packed)}"
    assert not read_image(save_meta(tmp_path / "a.mha", *lines, data=packed)).notes
    with pytest.raises(UserError, match="damaged|checksum|incorrect"):
        read_image(save_meta(tmp_path / "b.mha", *lines, data=bytes(flipped)))
    with pytest.raises(UserError, match="CompressedData is 'yes'"):
        read_image(save_meta(tmp_path / "c.mha", "CompressedData = yes", data=packed))
    for no in ("False", "No", ""):
        plain = read_image(save_meta(tmp_path / "d.mha", directions, f"CompressedData = {no}"))
        assert sorted(plain.array.ravel()) == sorted(VALUES.ravel())


def test_names_of_files_are_those_that_itk_takes(tmp_path):
    """Free text that looks like a field, a colon, and a field stated twice hide no other path."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.raw").write_bytes(VALUES.tobytes())
    (inside / "ok.raw").write_bytes(VALUES.tobytes())
    (inside / "=ok.raw").write_bytes(VALUES.tobytes())
    for number, lines in enumerate(
        (
            (f"data file: {tmp_path}/secret.raw", "data file:=ok.raw"),
            ("data file: ok.raw", f"datafile: {tmp_path}/secret.raw"),
            ("data file: ok.raw", f"data file: {tmp_path}/secret.raw"),
        )
    ):
        with pytest.raises(UserError, match=r"leads out of the folder|states data file twice"):
            read_image(save_nrrd(inside / f"{number}.nhdr", *lines, data=b""))
    meta = save_meta(inside / "a.mhd", name="ok.raw", data=b"")
    text = meta.read_text().replace(" = ok.raw", f" : {tmp_path}/secret.raw")
    meta.write_text(text)
    with pytest.raises(UserError, match="leads out of the folder"):
        read_image(meta)
    assert (read_image(save_nrrd(inside / "b.nhdr", "data file: ok.raw", data=b"")).array).any()


@pytest.mark.parametrize("line", ["ElementSpacing = 5 5 5", "Offset = 1 2 3\nOffset = 0 0 0"])
def test_geometry_stated_twice_is_refused(tmp_path, line):
    with pytest.raises(UserError, match=r"states (elementspacing|offset) twice"):
        read_image(save_meta(tmp_path / "a.mha", line))
    assert read_image(save_meta(tmp_path / "b.mha", "ElementSpacing = 2 3 4")).array.any()


@pytest.mark.parametrize("skip", ["byte skip: 16", "line skip: 1"])
def test_compressed_voxels_that_cannot_be_checked_are_refused(tmp_path, skip):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(16) + VALUES.tobytes()))
    path = save_nrrd(tmp_path / "a.nhdr", "encoding: gzip", skip, "data file: a.gz", data=b"")
    with pytest.raises(UserError, match="nothing tells whether they are whole; save them as one"):
        read_image(path)


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-right-handed"])
def test_a_space_that_is_not_of_the_body_is_told(tmp_path, space):
    path = save_nrrd(tmp_path / "a.nrrd")
    path.write_bytes(path.read_bytes().replace(b"right-anterior-superior", space.encode()))
    assert read_image(path).notes == (
        f"its space, {space!r}, is taken for left-posterior-superior",
    )


def test_sides_of_voxels_that_are_missing_are_told(tmp_path):
    path = save_nrrd(tmp_path / "a.nrrd")
    text = path.read_bytes().replace(b"space directions: (2,0,0) (0,3,0) (0,0,4)\n", b"")
    text = text.replace(b"space origin: (10,0,0)\n", b"spacings: 2 3 nan\n")
    path.write_bytes(text.replace(b"space: right-anterior-superior\n", b""))
    told = read_image(path).notes
    assert UNSIZED in told
    meta = save_meta(tmp_path / "a.mha", "TransformMatrix = 1 0 0 0 1 0 0 0 1")
    meta.write_bytes(meta.read_bytes().replace(b"ElementSpacing = 2 3 4\n", b""))
    assert len(read_image(meta).notes) == 1
