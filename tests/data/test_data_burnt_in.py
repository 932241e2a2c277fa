"""Text in the pixels is found, and what only looks like it from afar is not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from jaxmed.data.burnt_in import CHARACTERS, longest_row
from jaxmed.data.examination import CURABLE, examine
from jaxmed.data.sources.phantoms import Phantoms


def picture(seed, side=256):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(side, side)), 12)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return np.clip(smooth * 160 + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def write_on(image, text, *, size, place=(6, 8)):
    drawn = Image.fromarray(image)
    ImageDraw.Draw(drawn).text(place, text, fill=255, font=ImageFont.load_default(size))
    return np.asarray(drawn)[..., None]


@pytest.mark.parametrize("size", [14, 18, 24, 32])
@pytest.mark.parametrize("text", ["DOE JOHN", "1961-03-02", "ID 8841507"])
def test_a_line_of_text_is_found(size, text):
    image = picture(0)
    assert longest_row(image[..., None]) < CHARACTERS
    assert longest_row(write_on(image, text, size=size)) >= CHARACTERS
    colours = np.repeat(write_on(image, text, size=size), 3, -1)
    assert longest_row(colours) >= CHARACTERS
    deep = write_on(image, text, size=size).astype(np.int16) * 100 - 12_000
    assert longest_row(deep) >= CHARACTERS


@pytest.mark.parametrize("blur", [0.5, 1.0, 2.0, 4.0])
def test_grain_and_side_markers_are_no_text(blur):
    rng = np.random.default_rng(0)
    speckle = np.abs(ndimage.gaussian_filter(rng.normal(size=(512, 512, 2)), (blur, blur, 0)))
    assert longest_row(speckle.astype(np.float32)[..., :1]) < CHARACTERS
    assert longest_row(write_on(picture(1), "L", size=30)) < CHARACTERS
    assert longest_row(np.zeros((40, 50, 1), np.float32)) == 0


def test_images_with_text_are_told_and_may_be_left_out():
    source = Phantoms("cells", task="classification", size=160, count=20)

    class Written:
        info, ids, patients = source.info, source.ids, None
        labels = [int(source[row]["label"]) for row in range(20)]

        def __getitem__(self, row):
            example = source[row]
            if row in (3, 11):
                image = write_on(example["image"][..., 0], "A. PATIENT 1961", size=14)
                example = {**example, "image": image}
            return example

    for changed, rows in ((source, ()), (Written(), (3, 11))):
        found = [f for f in examine(changed, {"train": range(20)}) if f.kind == "text in the image"]
        assert tuple(row for f in found for row in f.leave_out) == rows
        assert all(f.kind in CURABLE and "suspected" in f.advice for f in found)
