"""Labelled images prepared for a model: folders and the bundled dataset."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.data import GREY, RED, teacher, write

from spdfq.data import FashionMnist, ImageFolder
from spdfq.errors import DataError
from spdfq.registry import datasets
from spdfq.teacher import Teacher


@pytest.fixture
def folder(tmp_path):
    """``folder({"cat": {"a.png": colour}})`` writes 8×8 images of one colour and gives the dataset."""

    def make(classes, **options):
        write(tmp_path, classes)
        return ImageFolder(root=str(tmp_path), **options)

    return make


# image folders


def test_labels_count_the_subfolders_in_order_and_the_last_partial_batch_is_given(folder):
    dataset = folder(
        {"dog": {"1.png": RED, "2.jpg": RED}, "cat": {"1.png": GREY, "x/2.PNG": GREY}, "elk": {"1.bmp": RED}}
    )
    batches = list(dataset.batches(teacher(3), 2))
    assert (len(dataset), dataset.classes) == (5, 3)
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 1, 1, 2]


def test_an_empty_subfolder_keeps_its_place_among_the_labels(folder):
    dataset = folder({"a": {"1.png": RED}, "b": {}, "c": {"1.png": RED}})
    (batch,) = dataset.batches(teacher(3), 10)
    assert (dataset.classes, batch.labels.tolist()) == (3, [0, 2])


def test_files_that_are_not_images_are_left_out(folder, tmp_path):
    dataset = folder({"a": {"1.png": RED}})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "list.csv").write_text("x")
    assert (len(dataset), dataset.classes) == (1, 1)


def test_every_suffix_that_pillow_reads_is_an_image_and_nothing_hidden_is(folder, tmp_path):
    dataset = folder(
        {"a": {"1.png": RED, ".hidden.png": RED, ".cache/3.png": RED}, ".ipynb_checkpoints": {"4.png": RED}}
    )
    for name in ("5.JFIF", "6.jpe", "7.jp2"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "a" / "1.png").read_bytes())
    assert [entry.name for entry in dataset.entries()] == ["a/1.png", "a/5.JFIF", "a/6.jpe", "a/7.jp2"]
    assert (dataset.classes, dataset.class_names) == (1, ["a"])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_left_out_with_the_reason_instead_of_clipped(folder, tmp_path, mode):
    dataset = folder({"a": {"1.png": RED}})
    Image.new(mode, (8, 8), 1000).save(tmp_path / "a" / "2.tif")
    ((images, _, damaged),) = dataset.batches(teacher(), 2)
    reason = f"({mode} pixels instead of 8 bits per channel; convert it first)"
    assert (len(images), damaged) == (1, (f"a/2.tif {reason}",))
    with pytest.raises(DataError, match=rf"2\.tif: not a readable image \({mode} pixels instead of 8.*; convert"):
        list(ImageFolder(root=str(tmp_path), damaged="refuse").batches(teacher(), 2))


def test_a_grey_png_of_16_bits_is_read_by_its_high_byte_as_those_in_colour_are(folder, tmp_path):
    dataset = folder({"a": {}})
    values = np.array([0, 255, 256, 0x33FF, 0xFEFF, 0xFFFF], np.uint16)
    Image.fromarray(np.resize(values, (6, 6)).T.copy()).save(tmp_path / "a" / "1.png")
    with Image.open(tmp_path / "a" / "1.png") as stored:
        assert stored.mode.startswith("I")
    for size in ((1, 6, 6), (3, 6, 6)):
        owner = teacher(size=size)
        ((images, _, damaged),) = dataset.batches(owner, 2)
        assert damaged == ()
        found = (owner.denormalise(images) * 255).round().int()
        assert found[0, :, :, 0].tolist() == [[0, 0, 1, 0x33, 0xFE, 0xFF]] * size[0]


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "seen"),
    [
        ("1", 1, "png", [255] * 3),
        ("1", 1, "tif", [255] * 3),
        ("LA", (51, 7), "png", [51] * 3),
        ("CMYK", (0, 255, 255, 0), "tif", [255, 0, 0]),
        ("CMYK", (0, 255, 255, 0), "jpg", [255, 0, 0]),
        ("RGBA", (255, 0, 0, 7), "png", [255, 0, 0]),
    ],
)
def test_images_of_every_mode_of_8_bits_are_read_as_colours(folder, tmp_path, mode, colour, suffix, seen):
    dataset, owner = folder({"a": {}}), teacher()
    Image.new(mode, (8, 8), colour).save(tmp_path / "a" / f"1.{suffix}")
    ((images, _, damaged),) = dataset.batches(owner, 2)
    assert ((owner.denormalise(images) * 255).round()[0, :, 0, 0].tolist(), damaged) == (seen, ())


def test_a_model_of_four_channels_sees_colours_and_transparency(folder, tmp_path):
    dataset, owner = folder({"a": {"1.png": ("RGBA", (255, 0, 51, 102)), "2.png": RED}}), teacher(size=(4, 8, 8))
    ((images, _, damaged),) = dataset.batches(owner, 2)
    assert (owner.denormalise(images) * 255).round()[:, :, 0, 0].tolist() == [[255, 0, 51, 102]]
    assert damaged == ("a/2.png (no alpha channel, but the model takes 4 channels: RGBA)",)
    ((images, _, _),) = dataset.batches(owner := teacher(size=(2, 8, 8)), 2, [0])
    assert (owner.denormalise(images) * 255).round()[:, :, 0, 0].tolist() == [[82, 102]]
    with pytest.raises(
        DataError, match=r"^Means: takes 5 channels, but image files give 1 to 4 .*; write a dataset of"
    ):
        list(dataset.batches(teacher(size=(5, 8, 8)), 2))


def linked(dataset, link, target):
    path = Path(dataset.root) / link
    path.symlink_to(target)
    return [(entry.name, entry.label) for entry in dataset.entries()]


def test_linked_folders_are_read_once_and_loops_end(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, {"more": {"3.png": RED, "deep/4.png": RED}})
    dataset = folder({"a": {"1.png": RED}, "b": {"2.png": RED}})
    expected = [("a/1.png", 0), ("a/link/3.png", 0), ("a/link/deep/4.png", 0), ("b/2.png", 1)]
    assert linked(dataset, "a/link", elsewhere / "more") == expected
    assert linked(dataset, "a/twice", elsewhere / "more") == expected
    assert linked(dataset, "a/loop", "../a") == expected
    assert linked(dataset, "a/up", "..") == expected
    assert linked(dataset, "a/.hidden", elsewhere) == expected
    assert len(next(iter(dataset.batches(teacher(), 9))).labels) == 4
    more = [("c/more/3.png", 2), ("c/more/deep/4.png", 2)]
    assert linked(dataset, "c", elsewhere) == [*expected, *more]
    assert len(set(dataset.identities())) == 4


@pytest.mark.parametrize("link", ["a/more", "bb"])
def test_a_link_that_leads_nowhere_is_refused_because_it_may_be_a_class(folder, tmp_path, link):
    dataset = folder({"a": {"1.png": RED}})
    with pytest.raises(
        DataError, match=rf"^image_folder: .*{link}: is a link to .*gone, which does not exist; mend or"
    ):
        linked(dataset, link, tmp_path / "gone")


def test_an_image_that_cannot_be_preprocessed_counts_as_damaged(folder, monkeypatch):
    def full(image):
        if image.width > 8:
            raise MemoryError
        return torch.zeros(3, 8, 8)

    dataset = folder({"a": {"1.png": RED, "2.png": RED}})
    Image.new("L", (2000, 1)).save(dataset.entries()[1].location)
    monkeypatch.setattr(Teacher, "transform", lambda self: full)
    ((images, _, damaged),) = dataset.batches(teacher(), 2)
    assert (len(images), damaged) == (1, ("a/2.png (MemoryError: )",))


def kill(location):
    if location.name == "2.png":
        while not location.with_name("now").exists():  # the first image has arrived
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return location


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_that_is_killed_is_one_clear_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFolder, "reader", lambda self: kill)
    dataset = folder({"a": {"1.png": RED, "2.png": RED}}, workers=1)
    batches = dataset.batches(teacher(), 1)
    next(batches)
    (tmp_path / "a" / "now").touch()
    time.sleep(1)  # a model at work: nothing may be raised there
    with pytest.raises(
        DataError, match=r"^image_folder: .* was killed, .* set fewer workers, or workers = 0$"
    ) as raised:
        next(batches)
    assert "\n" not in str(raised.value)


def test_grey_images_fill_three_channels_and_colours_become_grey_for_one(folder):
    dataset = folder({"a": {"1.png": GREY}, "b": {"1.png": RED}})
    ((images, _, _),) = dataset.batches(teacher(), 2)
    # (0.2 - 0.5) / 0.25 = -1.2; red: (1 - 0.5) / 0.25 = 2 and (0 - 0.5) / 0.25 = -2
    assert images[:, :, 0, 0].tolist() == [pytest.approx([-1.2] * 3), pytest.approx([2, -2, -2])]
    ((images, _, _),) = dataset.batches(teacher(size=(1, 8, 8)), 2)
    # ITU-R 601: 0.299 of red, 76 of 255
    assert images[:, 0, 0, 0].tolist() == pytest.approx([-1.2, (76 / 255 - 0.5) / 0.25])


def test_images_with_a_palette_or_transparency_are_read_as_colours(folder):
    dataset = folder({"a": {"1.png": ("RGBA", (255, 0, 0, 7)), "2.gif": ("P", 0)}})
    ((images, _, _),) = dataset.batches(teacher(1 + 1), 2)
    assert images[0, :, 0, 0].tolist() == pytest.approx([2, -2, -2])


def test_the_crop_is_the_models_own(folder, tmp_path):
    dataset = folder({"a": {"1.png": ("RGB", (0, 0, 0))}})
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (4, 0, 12, 8))
    image.save(tmp_path / "a" / "1.png")

    def white(**options):
        ((images, _, _),) = dataset.batches(teacher(**options), 1)
        return float((images > 0).float().mean())

    assert white() == 1.0, "the centre square is all white"
    assert 0.4 < white(crop_mode="squash") < 0.6, "the whole width, squashed, is half white"


def test_a_folder_that_is_missing_or_empty_is_one_clear_line(tmp_path):
    for use in (len, lambda dataset: dataset.classes, lambda dataset: list(dataset.batches(teacher(), 1))):
        with pytest.raises(DataError, match=r"none: no such folder; give root = 'path/to/val'"):
            use(ImageFolder(root=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"^image_folder: an empty root: no such folder; give root = "):
        len(ImageFolder(root=""))
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    expected = (
        r"holds no images; expected a subfolder of images for each class \(for one folder .* type = 'image_list'\)"
    )
    with pytest.raises(DataError, match=expected):
        len(ImageFolder(root=str(tmp_path)))


def test_a_subfolder_without_read_permission_is_not_treated_as_empty(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    dataset = folder({"cat": {"1.png": RED}, "dog": {"1.png": RED}})
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="dog"):
        dataset.entries()


def test_the_fingerprint_follows_names_sizes_times_and_classes(folder, tmp_path):
    dataset = folder({"a": {"1.png": RED}, "b": {"1.png": RED}})
    known = {dataset.fingerprint(), ImageFolder(root=str(tmp_path), workers=1).fingerprint()}
    assert len(known) == 1
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    known.add(dataset.fingerprint())
    Image.new("L", (8, 8)).save(tmp_path / "a" / "2.png")
    known.add(dataset.fingerprint())
    assert len(known) == 3
    os.utime(tmp_path / "a" / "2.png", ns=(0, 1))  # as of another image that happens to be of the same size
    assert dataset.fingerprint() not in known


# Fashion-MNIST


@pytest.mark.parametrize(("split", "count"), [("test", 2000), ("train", 256)])
def test_the_bundled_splits_have_ten_classes_in_equal_or_nearly_equal_parts(split, count):
    dataset = FashionMnist(split=split)
    batches = list(dataset.batches(teacher(10, (1, 28, 28)), 300))
    labels = torch.cat([batch.labels for batch in batches])
    assert (len(dataset), dataset.classes, len(labels)) == (count, 10, count)
    assert len(batches[-1].labels) == count % 300
    assert labels.dtype == torch.int64
    assert int(labels.bincount().max() - labels.bincount().min()) <= 1


def test_the_two_splits_share_no_image():
    pixels = [FashionMnist(split=split)._load()[0].flatten(1) for split in ("test", "train")]
    assert not {row.numpy().tobytes() for row in pixels[0]} & {row.numpy().tobytes() for row in pixels[1]}
    assert FashionMnist().fingerprint() != FashionMnist(split="train").fingerprint()


def test_a_model_of_28_by_28_grey_pixels_sees_the_images_unchanged():
    owner = teacher(10, (1, 28, 28))
    images, *_ = next(FashionMnist().batches(owner, 5))
    stored = FashionMnist()._load()[0][:5]
    assert torch.equal((owner.denormalise(images) * 255).round().to(torch.uint8), stored)


def test_other_models_see_them_resized_and_repeated_over_the_channels():
    small, large = teacher(10, (1, 28, 28)), teacher(10, (3, 56, 56))
    images, labels, _ = next(FashionMnist().batches(large, 5))
    reference, same, _ = next(FashionMnist().batches(small, 5))
    assert images.shape == (5, 3, 56, 56)
    assert torch.equal(labels, same)
    assert torch.equal(images[:, 0], images[:, 2])
    resized = F.interpolate(reference, (56, 56), mode="bilinear", antialias=True)
    assert torch.allclose(images[:, :1], resized, atol=1e-5)


@pytest.mark.parametrize("name", datasets.names())
def test_every_dataset_has_what_evaluation_and_the_store_ask_for(name):
    kind = datasets.get(name)
    assert {"__len__", "classes", "check_classes", "batches", "fingerprint"} <= set(dir(kind))


# subsets and chosen images


def test_chosen_images_come_in_the_order_asked_for():
    everything = torch.cat([batch.images for batch in FashionMnist().batches(bundled_like(), 500)])
    images, labels, _ = next(FashionMnist().batches(bundled_like(), 10, [1999, 3, 700]))
    assert torch.equal(images, everything[[1999, 3, 700]])
    assert len(labels) == 3


def test_a_limit_draws_a_subset_by_its_seed_and_keeps_the_order():
    dataset = FashionMnist(limit=50)
    chosen = dataset.chosen(2000)
    assert len(dataset) == len(set(chosen)) == 50
    assert chosen == sorted(chosen) == FashionMnist(limit=50).chosen(2000)
    assert chosen != FashionMnist(limit=50, subset_seed=1).chosen(2000)
    assert FashionMnist(limit=3000).chosen(2000) == list(range(2000))
    others = FashionMnist(limit=100, skip=50)
    assert len(others) == 100
    assert not set(others.chosen(2000)) & set(chosen)
    assert set(FashionMnist(skip=50).chosen(2000)) == set(range(2000)) - set(chosen)
    with pytest.raises(DataError, match="skip = 2000 leaves none of the 2000 images of the dataset; lower it"):
        FashionMnist(skip=2000).check_classes(bundled_like())
    limited = torch.cat([batch.labels for batch in dataset.batches(bundled_like(), 20)])
    full = torch.cat([batch.labels for batch in FashionMnist().batches(bundled_like(), 500)])
    assert torch.equal(limited, full[chosen])


def bundled_like():
    return teacher(classes=10, size=(1, 28, 28))
