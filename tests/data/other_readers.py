"""Images as readers read them that share no code with ours: SimpleITK, nibabel, a few lines."""

import gzip
import zlib

import nibabel
import numpy as np
import SimpleITK

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def itk_volume(image):
    """Of a SimpleITK volume: (i, j, k, channels), and (4, 4) from its indices to RAS mm."""
    array, axes = SimpleITK.GetArrayFromImage(image), image.GetDimension()
    array = np.moveaxis(array, 0, -1) if axes == 4 else array  # channels as a fourth axis
    array = array.reshape(*array.shape[:3], -1).transpose(2, 1, 0, 3)
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(axes, axes)
    affine[:3, :3] = (directions * image.GetSpacing())[:3, :3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return array, LPS_TO_RAS @ affine


def itk_read(path):
    """A volume in a file, or the DICOM series in a folder, by SimpleITK."""
    if path.is_dir():
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
        return itk_volume(SimpleITK.ReadImage(names))
    return itk_volume(SimpleITK.ReadImage(str(path)))


def nibabel_read(path):
    """A NIfTI volume by nibabel, scaled and with a channel axis."""
    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    return array.reshape(*array.shape[:3], -1), image.affine


def itk_picture(path):
    """(rows, cols, channels) and spacing (rows, cols) of a picture, by SimpleITK."""
    image = SimpleITK.ReadImage(str(path))
    array = SimpleITK.GetArrayFromImage(image)
    array = array[0] if image.GetDimension() == 3 else array
    return np.atleast_3d(array), np.array(image.GetSpacing()[1::-1])


_TYPES = {"signed short": "i2", "short": "i2", "unsigned char": "u1", "uint8": "u1", "float": "f4"}
_TYPES |= {"int": "i4", "double": "f8", "unsigned short": "u2", "int16": "i2", "uchar": "u1"}
_TYPES |= {"MET_SHORT": "i2", "MET_UCHAR": "u1", "MET_FLOAT": "f4", "MET_USHORT": "u2"}


def nrrd_read(path):
    """A volume in one NRRD file by the words of its header (teem.sourceforge.net/nrrd)."""
    header, _, data = path.read_bytes().partition(b"\n\n")
    lines = [line.split(":", 1) for line in header.decode().splitlines() if ":" in line]
    fields = {key.strip(): value.strip(" =") for key, value in lines if not key.startswith("#")}
    data = gzip.decompress(data) if fields["encoding"].startswith("gz") else data
    sizes = [int(size) for size in fields["sizes"].split()]
    order = ">" if fields.get("endian") == "big" else "<"
    array = np.frombuffer(data, order + _TYPES[fields["type"]]).reshape(sizes, order="F")
    affine = np.eye(4)
    vectors = fields["space directions"].replace("none ", "").strip("() ").split(") (")
    affine[:3, :3] = np.array([vector.split(",") for vector in vectors], float).T
    affine[:3, 3] = np.array(fields["space origin"].strip("()").split(","), float)
    assert fields["space"] in ("left-posterior-superior", "LPS", "right-anterior-superior")
    if fields["space"] != "right-anterior-superior":
        affine = LPS_TO_RAS @ affine
    return (array[..., None] if array.ndim == 3 else np.moveaxis(array, 0, -1)), affine


def meta_read(path):
    """A volume in MetaImage by the words of its header."""
    fields, rest = {}, path.read_bytes()
    while "ElementDataFile" not in fields:
        line, _, rest = rest.partition(b"\n")
        key, _, value = line.decode().partition("=")
        fields[key.strip()] = value.strip()
    local = fields["ElementDataFile"] == "LOCAL"
    data = rest if local else (path.parent / fields["ElementDataFile"]).read_bytes()
    data = zlib.decompress(data) if fields["CompressedData"] == "True" else data
    numbers = {k: np.array(fields[k].split(), float) for k in ("TransformMatrix", "Offset")}
    sizes = [int(size) for size in fields["DimSize"].split()]
    array = np.frombuffer(data, "<" + _TYPES[fields["ElementType"]]).reshape(sizes, order="F")
    affine = np.eye(4)
    directions = numbers["TransformMatrix"].reshape(3, 3).T  # one row an axis of the file
    affine[:3, :3] = directions * np.array(fields["ElementSpacing"].split(), float)
    affine[:3, 3] = numbers["Offset"]
    return array[..., None], LPS_TO_RAS @ affine


def assert_same_volume(image, array, affine, *, loss=0):
    """Every voxel of ours has the value that the other reader has at the same place in the body.

    Args:
        image: of `read_image`.
        array: (i, j, k, channels) in any order of axes.
        affine: (4, 4) from its indices to RAS mm.
        loss: that two decoders of a lossy format may differ by.
    """
    between = np.linalg.inv(affine) @ image.affine
    whole = np.rint(between).astype(int)
    corners = np.array(image.array.shape[:3]) - 1
    # Both readers may round what the header says: less than a hundredth of a voxel at the far end.
    assert (np.abs(between - whole)[:3, :3] @ corners).max() < 0.01
    assert np.abs(between - whole)[:3, 3].max() < 0.01
    steps = whole[:3, :3]
    assert (np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all()
    order = np.abs(steps).argmax(0)  # the other's axis that each of ours is
    flips = tuple(slice(None, None, steps[axis].sum()) for axis in range(3))
    moved = np.transpose(array[flips], [*order, 3])
    assert moved.shape == image.array.shape
    expected = moved.astype(image.array.dtype)
    np.testing.assert_allclose(image.array, expected, rtol=0, atol=loss)
    first = np.where(steps.sum(1) > 0, 0, np.array(array.shape[:3]) - 1)
    np.testing.assert_array_equal(whole[:3, 3], first)
    sides = np.linalg.norm(affine[:3, :3], axis=0)[order]
    np.testing.assert_allclose(image.spacing, sides, rtol=1e-5)
    # RAS: each axis grows towards what it is named after, and lies nearest to it.
    assert (np.diag(image.affine)[:3] > 0).all()
