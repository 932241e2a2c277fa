"""Makes image files of every format for the tests beside it."""

import shutil

import imageio.v3 as imageio
import nibabel
import numpy as np
import pydicom
import pydicom.data
import SimpleITK
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from scipy.spatial.transform import Rotation

from jaxmed.data.images import image_shape, read_image

RNG = np.random.default_rng(0)


def oblique_affine(order=(0, 1, 2), signs=(1, 1, 1)):
    """A turned, anisotropic affine, whose axes are then permuted and flipped."""
    turn = Rotation.from_euler("xyz", [7, -5, 11], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (turn * [0.7, 1.1, 2.5] * np.array(signs))[:, list(order)]
    affine[:3, 3] = [3.25, -40.5, 17.125]
    return affine


def save_nifti(path, array, affine=None, *, slope=None, codes=(1, 1)):
    image = nibabel.Nifti1Image(array, oblique_affine() if affine is None else affine)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine, codes[1])
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nibabel.save(image, path)
    return path


def save_dicom(path, pixels, **fields):
    """A little CT slice with a patient's name in it."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.SeriesInstanceUID = data.StudyInstanceUID = data.FrameOfReferenceUID = "1.2.3"
    data.PatientName, data.PatientID, data.Modality = "Secret^Name", "SECRET-ID", "CT"
    data.PatientBirthDate = data.PatientSex = data.StudyID = data.AccessionNumber = ""
    data.StudyDate, data.StudyTime, data.ReferringPhysicianName = "20200101", "000000", ""
    data.SeriesNumber = data.InstanceNumber = 1
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored, data.HighBit = data.BitsAllocated, data.BitsAllocated - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelSpacing, data.ImageOrientationPatient = [0.5, 0.75], [1, 0, 0, 0, 1, 0]
    for name, value in fields.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def save_series(folder, positions, **fields):
    folder.mkdir()
    for i, z in enumerate(positions):
        pixels = np.full((4, 6), i, np.int16)
        save_dicom(
            folder / f"{(i * 7) % 11}.dcm", pixels, ImagePositionPatient=[-10, 20, z], **fields
        )
    return folder


def check(path, array):
    image = read_image(path)
    assert image.array.dtype == array.dtype and image.array.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(image.array, array)
    assert image_shape(path) == array.shape
    assert image.spacing.dtype == np.float32 and image.spacing.shape == (array.ndim - 1,)
    return image


def write_all(folder):
    """A file of every format, big enough that cutting it must be noticed."""
    picture = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    volume = RNG.integers(0, 999, (16, 17, 18)).astype(np.int16)
    for name in ("a.png", "b.jpg", "c.bmp"):
        imageio.imwrite(folder / name, picture)
    tifffile.imwrite(folder / "d.tif", volume, photometric="minisblack")
    tifffile.imwrite(
        folder / "e.tif", picture, photometric="rgb", compression="zlib", rowsperstrip=8
    )
    save_nifti(folder / "f.nii", volume)
    save_nifti(folder / "g.nii.gz", volume)
    image = SimpleITK.GetImageFromArray(volume)
    for name in ("h.nrrd", "i.nrrd", "j.mha", "k.mha"):
        SimpleITK.WriteImage(image, str(folder / name), useCompression=name[0] in "hj")
    save_dicom(folder / "l.dcm", volume[0])
    np.save(folder / "m.npy", volume)
    np.savez(folder / "n.npz", volume)
    np.savez_compressed(folder / "o.npz", image=picture, other=volume)
    encodings = ("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless")
    for name in (*encodings, "SC_rgb_jpeg"):
        source = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
        shutil.copyfile(source, folder / f"{name}.dcm")
    return sorted(folder.iterdir())
