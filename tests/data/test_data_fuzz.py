"""Files that are cut short or corrupted: only our own error comes out, and memory stays bounded."""

import contextlib
import gzip
import io
import resource
import zipfile

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import write_all

from jaxmed.data.images import image_shape, read_image, read_region
from jaxmed.types import UserError

MOST_BYTES = 2**30
"""That reading a small file may take beyond what the process has."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The content of a file of every format, by name; of a NIfTI also what its gzip holds."""
    folder = tmp_path_factory.mktemp("whole")
    contents = {path.name: path.read_bytes() for path in write_all(folder)}
    return contents, tmp_path_factory.mktemp("broken")


@contextlib.contextmanager
def bounded_memory(extra):
    """Fail with a MemoryError where the process asks for so much more than it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def spoil(content, draw):
    """Cut, overwrite (anywhere, or in the header) or insert some bytes."""
    content = bytearray(content)
    kind = draw(st.sampled_from(["cut", "flip", "header", "insert"]))
    if kind == "cut":
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    if kind == "insert":
        place = draw(st.integers(0, min(2000, len(content))))
        return bytes(content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:])
    last = len(content) - 1 if kind == "flip" else min(400, len(content)) - 1
    for _ in range(draw(st.integers(1, 12))):
        content[draw(st.integers(0, last))] = draw(st.integers(0, 255))
    return bytes(content)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_only_our_own_error_comes_out(files, data):
    contents, folder = files
    name = data.draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    if name.endswith(".gz") and data.draw(st.booleans()):  # a sound archive of a broken file
        content = gzip.compress(spoil(gzip.decompress(content), data.draw), 1)
    else:
        content = spoil(content, data.draw)
    path = folder / name
    path.write_bytes(content)
    with contextlib.suppress(UserError), bounded_memory(MOST_BYTES):
        image = read_image(path)
        assert image.array.nbytes < MOST_BYTES
    with contextlib.suppress(UserError), bounded_memory(MOST_BYTES):
        half = tuple(slice(side // 2, side) for side in image_shape(path)[:-1])
        read_region(path, half)


def claim(folder, name, side):
    """A file of a few bytes whose header says that it holds side ** 3 voxels of 16 bits."""
    path = folder / name
    shape = (side,) * 3
    if name.endswith(".nii"):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.int16)
        header["dim"][:4] = (3, *shape)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        path.write_bytes(header.binaryblock + bytes(100))
    elif name.endswith(".nrrd"):
        sizes = " ".join(map(str, shape))
        text = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nendian: little\n"
        path.write_bytes((text + "encoding: raw\n\n").encode() + bytes(100))
    elif name.endswith(".mha"):
        text = f"ObjectType = Image\nNDims = 3\nDimSize = {side} {side} {side}\n"
        path.write_bytes((text + "ElementType = MET_SHORT\nElementDataFile = LOCAL\n").encode())
    else:
        array = io.BytesIO()
        content = {"descr": "<i2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(array, content)
        array.write(bytes(100))
        if name.endswith(".npy"):
            path.write_bytes(array.getvalue())
        else:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("image.npy", array.getvalue())
            # The archive too claims that it holds all of it.
            size, claimed = len(array.getvalue()), min(2 * side**3, 2**32 - 2)
            pair = [n.to_bytes(4, "little") for n in (size, claimed)]
            path.write_bytes(path.read_bytes().replace(*pair))
    return path


@pytest.mark.parametrize("side", [10_000, 1_200])  # 10^12 voxels, and fewer than are refused
@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mha", "a.npy", "a.npz"])
def test_what_a_header_claims_takes_no_memory(tmp_path, name, side):
    path = claim(tmp_path, name, side)
    with bounded_memory(MOST_BYTES), pytest.raises(UserError, match=name) as caught:
        read_image(path)
    # Refused before memory was asked for, not because there was none.
    assert not isinstance(caught.value.__cause__, MemoryError)
