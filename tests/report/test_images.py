"""The calibration images on the page: their classes, and real images beside them."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from spdfq.errors import DataError
from spdfq.report.images import CLASSES_FILE, REAL_FILE, pictures
from spdfq.report.pictures import _contact_sheet, tiles_of, write_real_images


def sheet(folder, count):
    """A ``synthetic.png`` whose pictures have the grey values 10, 20 and so on."""
    _contact_sheet(np.stack([np.full((4, 4, 1), 10 * each + 10, np.uint8) for each in range(count)])).save(
        folder / "synthetic.png"
    )


def classes(folder, *found):
    (folder / CLASSES_FILE).write_text(json.dumps([{"class": c, "percent": p, "drawn": d} for c, p, d in found]))


def grey(encoded):
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_each_picture_has_its_class_and_what_it_was_made_for(tmp_path):
    sheet(tmp_path, 2)
    classes(tmp_path, (1, 93.6, [0, 1, 0]), (7, 50.0, []))
    first, second = pictures(tmp_path, ["cat", "dog"]).first
    assert (first.label, first.percent, first.drawn) == ("dog", "94 %", "made for cat, dog")
    assert (second.label, second.percent, second.drawn) == ("class 7", "50 %", "")
    assert np.all(grey(second.image) == 20)
    assert not pictures(tmp_path, []).real


def test_pictures_after_the_first_16_are_folded(tmp_path):
    sheet(tmp_path, 18)
    classes(tmp_path, *[(0, 50, [])] * 18)
    found = pictures(tmp_path, ["a"])
    assert (len(found.first), len(found.more)) == (16, 2)
    assert np.all(grey(found.more[1].image) == 180)


def test_real_images_lie_beside_theirs_and_places_without_one_stay_empty(tmp_path):
    sheet(tmp_path, 3)
    classes(tmp_path, *[(0, 50, [])] * 3)
    write_real_images(tmp_path / REAL_FILE, [None, torch.full((1, 4, 4), 0.2), None])
    found = pictures(tmp_path, ["a"])
    assert [each.real is not None for each in found.first] == [False, True, False]
    assert np.all(grey(found.first[1].real) == 51)
    assert found.real


@pytest.mark.parametrize("channels", [1, 3])
def test_large_real_images_are_made_small(tmp_path, channels):
    write_real_images(tmp_path / "real.png", [torch.rand(channels, 224, 448)])
    tile = Image.open(io.BytesIO(tiles_of(tmp_path / "real.png", 1)[0]))
    assert (tile.size, tile.mode) == ((112, 56), "L" if channels == 1 else "RGB")


def test_without_images_or_classes_there_are_no_pictures(tmp_path):
    assert pictures(tmp_path, []) is None
    sheet(tmp_path, 1)
    assert pictures(tmp_path, []) is None


def test_damaged_files_are_named(tmp_path):
    sheet(tmp_path, 1)
    (tmp_path / CLASSES_FILE).write_text("[")
    with pytest.raises(DataError, match=r"image_classes\.json: damaged"):
        pictures(tmp_path, [])
    classes(tmp_path, (0, 50, []))
    (tmp_path / "synthetic.png").write_text("no picture")
    with pytest.raises(DataError, match=r"synthetic\.png: damaged"):
        pictures(tmp_path, [])
