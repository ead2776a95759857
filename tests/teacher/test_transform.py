"""A teacher's transform: from a PIL image to the model's input."""

import pickle

import pytest
import torch
from PIL import Image
from support.data import teacher
from timm.data import create_transform

from spdfq.errors import DataError
from spdfq.teacher import load_teacher


def photo(size=(40, 30)):
    gradient = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))


def test_the_transform_is_that_of_timms_evaluation():
    options = {"crop_pct": 0.8, "interpolation": "bicubic", "crop_mode": "squash"}
    own = teacher(size=(3, 16, 16), **options)
    expected = create_transform((3, 16, 16), mean=own.mean, std=own.std, **options)
    assert torch.equal(own.transform()(photo()), expected(photo()))
    plain = teacher(size=(3, 16, 16)).transform()(photo())
    assert not torch.equal(own.transform()(photo()), plain)


def test_an_image_gets_the_channels_of_the_model():
    grey = load_teacher("bundled:vit_fmnist").transform()
    assert grey(photo()).shape == (1, 28, 28)
    colour = teacher().transform()
    assert torch.equal(colour(photo().convert("L")), colour(photo().convert("L").convert("RGB")))
    assert torch.equal(pickle.loads(pickle.dumps(colour))(photo()), colour(photo()))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"expected a PIL image, got Tensor; open it with PIL.Image.open\(path\)"),
        ("cat.png", "expected a PIL image, got 'cat.png'"),
        (Image.new("F", (8, 8)), "F pixels instead of 8 bits per channel; convert it first"),
    ],
)
def test_what_is_no_image_of_8_bits_is_refused(image, message):
    with pytest.raises(DataError, match=message):
        teacher().transform()(image)


def test_a_model_of_many_channels_has_no_transform():
    with pytest.raises(DataError, match="Means: takes 7 channels, but image files give 1 to 4"):
        teacher(size=(7, 8, 8)).transform()
