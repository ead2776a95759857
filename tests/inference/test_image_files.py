"""Which files of a folder are images."""

import pytest
from support.data import GREY, write

from spdfq.errors import DataError, MissingDataError
from spdfq.inference import image_files


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, {"photos": {"b.png": GREY, "a.JPG": GREY}, "photos/deep": {"c.png": GREY}, "empty": {}})
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "photos/.hidden.png").write_text("no image")
    return tmp_path


def test_a_folder_stands_for_the_images_below_it_by_name(folder):
    photos = folder / "photos"
    assert image_files([photos]) == [photos / "a.JPG", photos / "b.png", photos / "deep/c.png"]
    assert image_files([str(photos / "deep"), photos / "notes.txt"]) == [photos / "deep/c.png", photos / "notes.txt"]
    assert image_files(str(photos / "b.png")) == [photos / "b.png"]


def test_what_has_no_images_is_refused(folder):
    with pytest.raises(DataError, match=r"empty: the folder holds no images; give one with PNG or JPEG files"):
        image_files([folder / "photos", folder / "empty"])
    with pytest.raises(MissingDataError, match=r"gone.png: no such file or folder; give an image or a folder"):
        image_files([folder / "gone.png"])
    with pytest.raises(DataError, match="images: none given"):
        image_files([])
    with pytest.raises(DataError, match="images: expected paths of images and folders, got 3"):
        image_files([3])
    (folder / "photos/lost").symlink_to(folder / "nowhere")
    with pytest.raises(DataError, match=r"lost: is a link to .*nowhere, which does not exist"):
        image_files([folder / "photos"])
