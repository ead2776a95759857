"""Calibration images in files and in pictures, and what comes back from them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from spdfq.calibration_data import CalibrationImages
from spdfq.errors import DataError, SpdfqError

MEAN, STD = (0.25, 0.5, 0.75), (0.5, 0.25, 0.125)


def sample(count=3, channels=3, seed=0):
    """Images whose pixels lie between black and white."""
    mean, std = (np.array(values[:channels], np.float32) for values in (MEAN, STD))
    pixels = np.random.default_rng(seed).random((count, channels, 6, 8), np.float32)
    images = (pixels - mean[:, None, None]) / std[:, None, None]
    return CalibrationImages(images=images, mean=mean, std=std)


def test_a_file_gives_back_the_same_bits_and_holds_no_objects(tmp_path):
    given = sample()
    assert given.save(tmp_path / "new/images.npz") is None
    found = CalibrationImages.load(tmp_path / "new/images.npz")
    assert found.images.dtype == np.float32
    assert np.array_equal(found.images, given.images)
    assert np.array_equal(found.mean, given.mean)
    assert np.array_equal(found.std, given.std)
    with np.load(tmp_path / "new/images.npz", allow_pickle=False) as stored:
        assert sorted(stored.files) == ["images", "mean", "size", "std"]
        assert stored["size"].tolist() == [6, 8] == list(found.size)


def test_the_same_images_give_the_same_file(tmp_path):
    for name in ("a.npz", "b.npz"):
        sample().save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_lose_at_most_half_a_step_of_8_bits(tmp_path, channels):
    given = sample(channels=channels)
    lost = given.save(tmp_path / "png")
    found = CalibrationImages.load(tmp_path / "png")
    change = np.abs(found.images - given.images)
    assert lost.largest == pytest.approx(change.max())
    assert lost.mean == pytest.approx(change.mean(), rel=1e-4)
    assert lost.largest <= 0.5 / 255 / min(STD[:channels]) + 1e-5
    assert lost.clipped == 0
    with Image.open(tmp_path / "png/00002.png") as picture:
        assert picture.size == (8, 6)


def test_pixels_below_black_and_above_white_are_clipped_and_counted(tmp_path):
    images = np.zeros((1, 1, 1, 4), np.float32)
    images[0, 0, 0] = [-3, 0, 0, 5]  # pixels are 0.5 + value / 4: -0.25, 0.5, 0.5 and 1.75
    lost = CalibrationImages(images=images, mean=[0.5], std=[0.25]).save(tmp_path / "png")
    assert lost.clipped == 50
    assert lost.largest == pytest.approx(3)  # 1.75 became 1
    found = CalibrationImages.load(tmp_path / "png").images.ravel()
    assert found == pytest.approx([-2, 4 * (128 / 255 - 0.5), 4 * (128 / 255 - 0.5), 2], abs=1e-6)


def test_pictures_of_an_earlier_call_are_replaced_but_no_other_files(tmp_path):
    sample(count=5).save(tmp_path / "png")
    sample(count=2).save(f"{tmp_path}/png/")
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == ["00000.png", "00001.png", "images.json"]
    (tmp_path / "png/cat.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"png: holds other files \(cat.png\); choose another folder"):
        sample().save(tmp_path / "png")
    assert len(CalibrationImages.load(tmp_path / "png")) == 2


def test_tensors_are_taken_as_they_are():
    images = torch.zeros(2, 3, 4, 4, requires_grad=True)
    found = CalibrationImages(images=images, mean=torch.tensor(MEAN), std=list(STD))
    assert isinstance(found.images, np.ndarray)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"images": np.zeros((1, 3, 2, 2))},
            r"images: expected float32 images \[n, C, H, W\], got float64 \[1, 3, 2, 2\]",
        ),
        ({"images": np.zeros((3, 2, 2), np.float32)}, r"got float32 \[3, 2, 2\]"),
        ({"images": [1]}, r"got \[1\]"),
        ({"images": np.zeros((0, 3, 2, 2), np.float32)}, "holds no images"),
        ({"mean": (0.5,)}, "mean has 1 values and std 3, the images have 3 channels"),
        ({"mean": "grey"}, "mean and std: expected a number for each channel, got 'grey'"),
        ({"std": (0.5, 0.5, 0)}, "not above 0"),
        ({"images": np.full((1, 3, 2, 2), np.nan, np.float32)}, "NaN or infinite"),
    ],
)
def test_what_is_not_images_is_refused(change, line):
    given = {"images": np.zeros((1, 3, 2, 2), np.float32), "mean": MEAN, "std": STD}
    with pytest.raises(DataError, match=line):
        CalibrationImages(**{**given, **change})


def test_places_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.jpg: give a file that ends in .npz, or a folder for PNG pictures"):
        sample().save(tmp_path / "a.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: is a file; choose another folder"):
        sample().save(tmp_path / "file")
    many = CalibrationImages(images=np.zeros((1, 5, 2, 2), np.float32), mean=[0.5] * 5, std=[1] * 5)
    with pytest.raises(DataError, match=r"pictures have 1 to 4 channels, these images 5; write a file: --to FILE.npz"):
        many.save(tmp_path / "png")
    many.save(tmp_path / "five.npz")
    assert CalibrationImages.load(tmp_path / "five.npz").images.shape == (1, 5, 2, 2)


def test_damaged_files_are_one_line_that_names_them(tmp_path):
    path = tmp_path / "a.npz"
    lines = {}

    def refused(name):
        with pytest.raises(DataError) as caught:
            CalibrationImages.load(path)
        assert "\n" not in str(caught.value)
        lines[name] = str(caught.value)

    refused("missing")
    path.write_bytes(b"PK\x03\x04 not a zip")
    refused("damaged")
    np.savez(path, images=np.zeros((1, 1, 2, 2), np.float32), mean=[0.5], std=[0.5])
    refused("incomplete")
    np.savez(path, images=np.zeros((1, 1, 2, 2), np.float32), mean=[0.5], std=[0.5], size=[3, 3])
    refused("other size")
    np.savez(path, images=np.array([{}], dtype=object), mean=[0.5], std=[0.5], size=[3, 3])
    refused("pickled")
    np.save(path.open("wb"), np.zeros(3))
    refused("one array")
    assert "no such file" in lines["missing"]
    assert "has no array 'size" in lines["incomplete"]
    assert "size is [3, 3], its images are [1, 1, 2, 2]" in lines["other size"]
    assert "Object arrays cannot be loaded" in lines["pickled"]
    assert all(str(path) in line and "spdfq images RUN --to FILE.npz" in line for line in lines.values())


def test_damaged_pictures_are_one_line_that_names_them(tmp_path):
    folder = tmp_path / "png"
    for change, line in (
        (lambda: (folder / "00001.png").unlink(), "00001.png: cannot be read"),
        (lambda: (folder / "00001.png").write_bytes(b"x"), "00001.png: cannot be read"),
        (lambda: Image.new("RGB", (3, 3)).save(folder / "00001.png"), "is RGB of 3 × 3 pixels, expected RGB of 8 × 6"),
        (lambda: (folder / "images.json").write_text("{}"), "images.json: damaged"),
        (lambda: (folder / "images.json").unlink(), "has no images.json"),
    ):
        sample().save(folder)
        change()
        with pytest.raises(DataError, match=line):
            CalibrationImages.load(folder)


def test_reading_imports_neither_torch_nor_onnxruntime(tmp_path):
    sample().save(tmp_path / "a.npz")
    sample().save(tmp_path / "png")
    code = f"""
import sys
from spdfq.calibration_data import CalibrationImages
for place in {json.dumps([str(tmp_path / "a.npz"), str(tmp_path / "png")])}:
    reader = CalibrationImages.load(place).onnxruntime_reader("x")
    assert next(reader)["x"].shape == (1, 3, 6, 8)
print(sorted({{"torch", "timm", "onnx", "onnxruntime"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_batch_that_is_no_number_of_images_is_refused():
    for batch in (0, 1.0, True):
        with pytest.raises(SpdfqError, match="batch: expected a whole number of images, at least 1"):
            sample().torch_batches(batch)
