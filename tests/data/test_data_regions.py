"""A region of a file is the same as that part of the whole, and costs no more than it must."""

import contextlib
import tracemalloc

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import oblique_affine, save_nifti, write_all

from jaxmed.data.images import read_image, read_region
from jaxmed.data.sources.pairs import ImageMaskPairs
from jaxmed.types import UserError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def regions(draw, shape):
    low = [draw(st.integers(0, side - 1)) for side in shape]
    return tuple(slice(a, draw(st.integers(a + 1, n))) for a, n in zip(low, shape, strict=True))


def check_region(path, region, **options):
    whole = read_image(path, **options)
    part = read_region(path, region, **options)
    np.testing.assert_array_equal(part.array, whole.array[region])
    assert part.array.dtype == whole.array.dtype
    assert part.array.flags["C_CONTIGUOUS"] and part.array.flags.writeable
    assert (part.spacing == whole.spacing).all() and part.kind == whole.kind
    if whole.affine is None:
        assert part.affine is None
    else:
        corner = [s.start for s in region]
        np.testing.assert_allclose(
            part.affine[:3, 3], whole.affine[:3, :3] @ corner + whole.affine[:3, 3]
        )


KINDS = ("gray", "deep", "bool", "float", "rgb", "rgba", "planar", "palette", "white", "channels")


def write_tiff(path, draw):
    """A TIFF picture or volume of random layout; returns its spatial shape."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    height, width = draw(st.integers(1, 70)), draw(st.integers(2, 70))
    kind = draw(st.sampled_from(KINDS))
    dtype = {"deep": np.uint16, "float": np.float32}.get(kind, np.uint8)
    samples = {"rgb": 3, "rgba": 4, "planar": 3}.get(kind)
    shape = (height, width) if samples is None else (height, width, samples)
    options = {"photometric": "rgb" if samples else "minisblack"}
    if kind == "planar":
        shape, options["planarconfig"] = (3, height, width), "separate"
    if kind == "channels":
        shape, options["metadata"] = (5, height, width), {"axes": "CYX"}
    depth = draw(st.sampled_from([None, None, 3])) if kind in ("gray", "rgb", "deep") else None
    if depth:
        shape, options["metadata"] = (depth, *shape), {"axes": "ZYXS"[: len(shape) + 1]}
    values = rng.integers(0, 200, shape).astype(dtype)
    if kind == "bool":
        values = values > 100
    if kind == "white":
        options["photometric"] = "miniswhite"
    if kind == "palette":
        options |= {"photometric": "palette", "colormap": rng.integers(0, 2**16, (3, 256), "u2")}
    layout = draw(st.sampled_from(["strips", "tiles", "one"]))
    if layout == "tiles":
        options["tile"] = (16 * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 3)))
    elif layout == "strips":
        options["rowsperstrip"] = draw(st.integers(1, 20))
    options["compression"] = draw(st.sampled_from([None, "zlib", "lzw", "packbits", "zstd"]))
    if options["compression"] in ("zlib", "lzw", "zstd") and kind not in ("bool", "float"):
        options["predictor"] = draw(st.booleans())
    big, order = draw(st.booleans()), draw(st.sampled_from("<>"))
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as writer:
        writer.write(values, **options)
    return (width, height, depth) if depth else (height, width)


@QUICK
@given(data=st.data())
def test_regions_of_tiff(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    shape = write_tiff(path, data.draw)
    for _ in range(3):
        region = data.draw(regions(shape))
        check_region(path, region)
        check_region(path, region, indices=True)


def test_regions_of_jpeg_tiles_pyramids_and_empty_tiles(tmp_path):
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(0, 256, (8, 9, 3), np.uint8), 16, 0), 16, 1)
    picture[32:96, 32:96] = 0
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        options = {"tile": (32, 32), "photometric": "rgb", "compression": "jpeg"}
        writer.write(picture, subifds=1, **options)
        writer.write(picture[::2, ::2], subfiletype=1, **options)

    def tiles():
        for i in range(4):
            for j in range(5):
                tile = picture[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
                yield tile if tile.any() else None

    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(
            tiles(),
            shape=picture.shape,
            dtype=np.uint8,
            tile=(32, 32),
            photometric="rgb",
            compression="zlib",
        )
    for name in ("a.tif", "b.tif"):
        for region in ((slice(0, 128), slice(0, 144)), (slice(30, 100), slice(33, 65))):
            check_region(tmp_path / name, region)


@QUICK
@given(data=st.data())
def test_regions_of_every_format(tmp_path_factory, data):
    folder = write_every_format(tmp_path_factory)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    shape = read_image(path).array.shape[:-1]
    check_region(path, data.draw(regions(shape)))


WRITTEN = []


def write_every_format(factory):
    if not WRITTEN:
        folder = factory.mktemp("all")
        write_all(folder)
        volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
        turned = oblique_affine(order=(2, 0, 1), signs=(-1, 1, -1))
        save_nifti(folder / "turned.nii", volume, turned)
        save_nifti(folder / "scaled.nii", volume, turned, slope=(0.5, 3))
        np.save(folder / "colours.npy", volume.reshape(8, 5, 3).astype("<u2"))
        np.save(folder / "columns.npy", np.asfortranarray(volume[0].astype(np.float64)))
        WRITTEN.append(folder)
    return WRITTEN[0]


@pytest.mark.parametrize(
    "region",
    [
        (slice(0, 5),),
        (slice(3, 3), slice(0, 4)),
        (slice(0, 8, 2), slice(0, 4)),
        (slice(40, 50), slice(0, 4)),
    ],
)
def test_a_region_that_is_none_is_refused(tmp_path, region):
    for name in ("a.tif", "a.png"):
        imageio.imwrite(tmp_path / name, np.zeros((30, 20), np.uint8))
        with pytest.raises(ValueError, match="region"):
            read_region(tmp_path / name, region)


@pytest.mark.parametrize("layout", [{"tile": (16, 16)}, {"rowsperstrip": 4}, {}])
@pytest.mark.parametrize("compression", [None, "zlib", "jpeg"])
def test_broken_files_raise_only_our_own_error(tmp_path, layout, compression):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.tif"
    picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
    tifffile.imwrite(path, picture, photometric="rgb", compression=compression, **layout)
    content = path.read_bytes()
    for trial in range(60):
        spoiled = bytearray(content)
        if trial % 3 == 0:
            del spoiled[rng.integers(1, len(content)) :]
        else:
            end = len(content) if trial % 3 == 1 else 400
            for place in rng.integers(0, end, 8):
                spoiled[place] = rng.integers(0, 256)
        path.write_bytes(bytes(spoiled))
        with contextlib.suppress(UserError, ValueError if trial % 3 else UserError):
            read_region(path, (slice(5, 30), slice(20, 50)), max_voxels=10**6)


def test_the_limit_and_the_memory_are_those_of_the_region(tmp_path):
    path = tmp_path / "a.tif"
    picture = np.zeros((2000, 2000, 3), np.uint8)
    tifffile.imwrite(path, picture, photometric="rgb", compression="zlib", tile=(256, 256))
    np.save(tmp_path / "a.npy", picture)
    for name in ("a.tif", "a.npy"):
        with pytest.raises(UserError, match="max_voxels"):
            read_image(tmp_path / name, max_voxels=10**6)
        tracemalloc.start()
        part = read_region(tmp_path / name, (slice(90, 190), slice(0, 100)), max_voxels=10**6)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert part.array.shape == (100, 100, 3)
        assert peak < 3e6, "the whole takes 12e6"
        with pytest.raises(UserError, match="max_voxels"):
            read_region(tmp_path / name, (slice(0, 1000), slice(0, 1000)), max_voxels=10**6)


def test_a_source_reads_a_region_as_it_would_cut_it(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    picture = rng.integers(0, 256, (50, 60, 3), np.uint8)
    mask = rng.integers(0, 2, (50, 60), np.uint8) * 255
    tifffile.imwrite(tmp_path / "images/a.tif", picture, photometric="rgb", tile=(16, 16))
    imageio.imwrite(tmp_path / "masks/a.png", mask)
    source = ImageMaskPairs(tmp_path)
    whole, part = source[0], source.read(0, (slice(11, 31), slice(20, 55)))
    for key in ("image", "mask"):
        np.testing.assert_array_equal(part[key], whole[key][11:31, 20:55])
    np.testing.assert_array_equal(part["offset"], [-11, -20])
    np.testing.assert_array_equal(part["shape"], [50, 60])
