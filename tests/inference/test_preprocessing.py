"""Preprocessing in Pillow and NumPy: the numbers of the teacher's transform, which is timm's, bit for bit."""

import numpy as np
import pytest
import torch
from attrs import asdict
from PIL import Image
from support.data import teacher
from support.onnx_files import PREPROCESSING

from spdfq.errors import DataError
from spdfq.inference import Preprocessing
from spdfq.inference.pixels import MODES
from spdfq.inference.preprocessing import CROP_MODES, INTERPOLATIONS
from spdfq.teacher import load_teacher

PHOTOS = [(16, 16), (40, 30), (31, 47), (12, 9), (23, 5)]


def photo(size, mode="RGB"):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(noise.squeeze(-1) if mode == "L" else noise, mode)


def of(owner):
    channels, height, width = owner.input_size
    kept = {key: getattr(owner, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    return Preprocessing(size=(height, width), channels=channels, **kept)


def same(owner, image):
    found = of(owner)(image)
    assert found.dtype == np.float32
    return np.array_equal(found, owner.transform()(image).numpy())


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("side", [(16, 16), (12, 20)])
@pytest.mark.parametrize("crop_pct", [0.8, 0.95, 1.0, 1.15])
def test_the_numbers_are_those_of_the_teachers_transform(crop_mode, side, crop_pct):
    for interpolation in INTERPOLATIONS:
        options = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
        owner = teacher(size=(3, *side), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **options)
        assert all(same(owner, photo(size)) for size in PHOTOS), interpolation


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_images_of_each_number_of_channels(mode, crop_mode):
    owner = teacher(size=(len(mode), 16, 16), crop_mode=crop_mode, interpolation="bicubic", crop_pct=0.9)
    assert all(same(owner, photo(size, mode)) for size in PHOTOS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr"])
def test_images_of_other_modes_are_converted(mode):
    assert same(teacher(size=(3, 16, 16)), photo((40, 30)).convert(mode))
    assert same(load_teacher("bundled:vit_fmnist"), photo((40, 30)).convert(mode))


def test_a_grey_png_of_16_bits_is_read_and_other_deep_pixels_are_refused(tmp_path):
    deep = np.full((8, 8), 51 * 257, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert np.allclose(PREPROCESSING(image), (51 / 255 - 0.5) / 0.25)
    with pytest.raises(DataError, match="F pixels instead of 8 bits per channel; convert it first"):
        PREPROCESSING(Image.new("F", (8, 8)))
    with pytest.raises(DataError, match=r"expected a PIL image, got Tensor; open it with PIL.Image.open\(path\)"):
        PREPROCESSING(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", 8, "size: expected height and width, got 8"),
        ("size", (8, 0), r"size: expected height and width, got \(8, 0\)"),
        ("channels", 7, r"channels: expected 1 \(grey\), 2 \(grey and alpha\), 3 \(RGB\) or 4 \(RGBA\)"),
        ("mean", (0.5,), r"mean: expected a number for each of the 3 channels, got \(0.5,\)"),
        ("mean", (0.5, 0.5, float("nan")), "mean: expected a number"),
        ("std", (0.5, 0.5, 0.0), "std: expected a number above 0 for each of the 3 channels"),
        ("interpolation", "cubic", "interpolation: expected one of nearest, bilinear, .*, got 'cubic'"),
        ("interpolation", ["bicubic"], "interpolation: expected one of nearest, bilinear, "),
        ("crop_mode", None, "crop_mode: expected one of center, squash, border, got None"),
        ("crop_pct", 0, "crop_pct: expected a share such as 0.875, got 0"),
        ("crop_pct", "1", "crop_pct: expected a share such as 0.875, got '1'"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused(key, value, message):
    with pytest.raises(DataError, match=f"^{message}") as caught:
        Preprocessing(**{**asdict(PREPROCESSING), key: value})
    assert "\n" not in str(caught.value)
