"""The second real test-bed: which pictures it takes, how it prepares them, and its split."""

import sys

import numpy as np
import pytest
from PIL import Image
from support.docs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import clipart_vit


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Two folders with 6 different pictures each, one with 3, and one at the first level."""
    monkeypatch.setattr(clipart_vit, "FEWEST", 4)
    monkeypatch.setattr(clipart_vit, "MOST", 5)
    random = np.random.default_rng(0)
    for folder, count in {"animals/birds": 6, "animals/fish/deep": 6, "food/fruit": 3, "loose": 6}.items():
        target = tmp_path / "png" / folder
        target.mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (4, 4, 4), dtype=np.uint8)
            pixels[..., 3] = 255
            Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(target / f"{index}.png")
    return tmp_path / "png"


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_classes_are_second_level_folders_with_enough_pictures_and_the_split_is_always_the_same(pictures, tmp_path):
    facts = clipart_vit.write_images(pictures, tmp_path / "a")
    assert facts == {"classes": 2, "train": 8, "test": 2, "too_large": 0}
    assert sorted(path.name for path in (tmp_path / "a" / "test").iterdir()) == ["animals-birds", "animals-fish"]
    clipart_vit.write_images(pictures, tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b")


def test_pictures_that_look_alike_count_once_in_whatever_folder_they_are(pictures, tmp_path):
    for path in list((pictures / "animals" / "birds").iterdir()):
        with Image.open(path) as picture:
            pixels = np.asarray(picture).copy()
        pixels[..., :3] = np.clip(pixels[..., :3].astype(int) + 3, 0, 255)
        Image.fromarray(pixels).save(pictures / "food" / "fruit" / f"copy-{path.name}")
    assert clipart_vit.write_images(pictures, tmp_path / "out")["classes"] == 2


def test_a_picture_lies_in_the_middle_of_a_white_square(tmp_path):
    drawn = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    drawn.paste((255, 0, 0, 255), (0, 0, 20, 20))
    drawn.save(path := tmp_path / "x.png")
    square = clipart_vit.on_white(path)
    assert square.size == (224, 224)
    assert square.mode == "RGB"
    assert [square.getpixel(at) for at in ((112, 10), (112, 214), (40, 112), (180, 112))] == [
        (255, 255, 255),
        (255, 255, 255),
        (255, 0, 0),
        (255, 255, 255),
    ]


def test_the_size_is_read_from_the_header_and_large_pictures_are_left_out_and_counted(pictures, tmp_path, monkeypatch):
    assert clipart_vit.pixels_of(next((pictures / "loose").iterdir())) == 64 * 48
    monkeypatch.setattr(clipart_vit, "LARGEST", 64 * 48)
    Image.new("RGB", (64, 49)).save(pictures / "food" / "fruit" / "large.png")
    assert clipart_vit.write_images(pictures, tmp_path / "out")["too_large"] == 1
