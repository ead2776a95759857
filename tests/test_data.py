"""Labelled images as a model wants them, and what is measured on them."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from spdfq.data import FashionMnist, ImageFolder
from spdfq.errors import DataError, NonFiniteError
from spdfq.evaluate import accuracy, agreement, logits_over
from spdfq.models import Teacher
from spdfq.recipe import Evaluation
from spdfq.registry import datasets
from spdfq.runtime import Runtime


class Means(nn.Module):
    """Logits are the channel means, repeated for every class; in training mode they would be doubled."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        means = images.mean((1, 2, 3), keepdim=False)[:, None] * (2 if self.training else 1)
        return self.scale * means * torch.arange(1.0, self.classes + 1)


def teacher(classes=2, size=(3, 8, 8), **options):
    channels = size[0]
    described = {"mean": (0.5,) * channels, "std": (0.25,) * channels, "num_classes": classes, "input_size": size}
    return Teacher(Means(classes), **(described | options))


@pytest.fixture
def folder(tmp_path):
    """``folder({"cat": {"a.png": (mode, colour)}})`` writes 8×8 images of one colour and gives the dataset."""

    def write(classes, size=(8, 8)):
        for name, images in classes.items():
            (tmp_path / name).mkdir()
            for file, (mode, colour) in images.items():
                path = tmp_path / name / file
                path.parent.mkdir(exist_ok=True)
                Image.new(mode, size, colour).save(path)
        return ImageFolder(root=str(tmp_path))

    return write


GREY, RED = ("L", 51), ("RGB", (255, 0, 0))  # 51 / 255 = 0.2


# image folders


def test_labels_count_the_subfolders_in_alphabetical_order_and_the_last_partial_batch_is_given(folder):
    dataset = folder(
        {"dog": {"1.png": RED, "2.jpg": RED}, "cat": {"1.png": GREY, "x/2.PNG": GREY}, "elk": {"1.bmp": RED}}
    )
    batches = list(dataset.batches(teacher(3), 2))
    assert (len(dataset), dataset.classes) == (5, 3)
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 2]


def test_an_empty_subfolder_keeps_its_place_among_the_labels(folder):
    dataset = folder({"a": {"1.png": RED}, "b": {}, "c": {"1.png": RED}})
    (batch,) = dataset.batches(teacher(3), 10)
    assert (dataset.classes, batch[1].tolist()) == (3, [0, 2])


def test_files_that_are_no_images_are_left_out(folder, tmp_path):
    dataset = folder({"a": {"1.png": RED}})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "list.csv").write_text("x")
    assert (len(dataset), dataset.classes) == (1, 1)


def test_grey_images_fill_three_channels_and_colours_become_grey_for_one(folder):
    dataset = folder({"a": {"1.png": GREY}, "b": {"1.png": RED}})
    ((images, _),) = dataset.batches(teacher(), 2)
    # (0.2 - 0.5) / 0.25 = -1.2; red: (1 - 0.5) / 0.25 = 2 and (0 - 0.5) / 0.25 = -2
    assert images[:, :, 0, 0].tolist() == [pytest.approx([-1.2] * 3), pytest.approx([2, -2, -2])]
    ((images, _),) = dataset.batches(teacher(size=(1, 8, 8)), 2)
    # ITU-R 601: 0.299 of red, 76 of 255
    assert images[:, 0, 0, 0].tolist() == pytest.approx([-1.2, (76 / 255 - 0.5) / 0.25])


def test_images_with_a_palette_or_transparency_are_read_as_colours(folder):
    dataset = folder({"a": {"1.png": ("RGBA", (255, 0, 0, 7)), "2.gif": ("P", 0)}})
    ((images, _),) = dataset.batches(teacher(1 + 1), 2)
    assert images[0, :, 0, 0].tolist() == pytest.approx([2, -2, -2])


def test_the_crop_is_the_models_own(folder, tmp_path):
    dataset = folder({"a": {"1.png": ("RGB", (0, 0, 0))}})
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (4, 0, 12, 8))
    image.save(tmp_path / "a" / "1.png")

    def white(**options):
        ((images, _),) = dataset.batches(teacher(**options), 1)
        return float((images > 0).float().mean())

    assert white() == 1.0, "the centre square is all white"
    assert 0.4 < white(crop_mode="squash") < 0.6, "the whole width, squashed, is half white"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_not_passed_over(folder, tmp_path, workers):
    folder({"a": {"1.png": RED, "2.png": RED}})
    data = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"image_folder: .*2\.png: not a readable image"):
        list(ImageFolder(root=str(tmp_path), workers=workers).batches(teacher(), 1))


def test_a_folder_that_is_missing_or_empty_is_one_clear_line(tmp_path):
    for use in (len, lambda dataset: dataset.classes, lambda dataset: list(dataset.batches(teacher(), 1))):
        with pytest.raises(DataError, match=r"none: no such folder; give root = 'path/to/val'"):
            use(ImageFolder(root=str(tmp_path / "none")))
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match="holds no images; expected a subfolder of images for each class"):
        len(ImageFolder(root=str(tmp_path)))


def test_the_fingerprint_follows_names_sizes_and_classes(folder, tmp_path):
    dataset = folder({"a": {"1.png": RED}, "b": {"1.png": RED}})
    known = {dataset.fingerprint(), ImageFolder(root=str(tmp_path), workers=1).fingerprint()}
    assert len(known) == 1
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    known.add(dataset.fingerprint())
    Image.new("L", (8, 8)).save(tmp_path / "a" / "2.png")
    known.add(dataset.fingerprint())
    assert len(known) == 3


# Fashion-MNIST


@pytest.mark.parametrize(("split", "count"), [("test", 2000), ("train", 256)])
def test_the_bundled_splits_have_ten_classes_in_equal_or_nearly_equal_parts(split, count):
    dataset = FashionMnist(split=split)
    batches = list(dataset.batches(teacher(10, (1, 28, 28)), 300))
    labels = torch.cat([labels for _, labels in batches])
    assert (len(dataset), dataset.classes, len(labels)) == (count, 10, count)
    assert len(batches[-1][1]) == count % 300
    assert labels.dtype == torch.int64
    assert int(labels.bincount().max() - labels.bincount().min()) <= 1


def test_the_two_splits_share_no_image():
    pixels = [FashionMnist(split=split)._load()[0].flatten(1) for split in ("test", "train")]
    assert not {row.numpy().tobytes() for row in pixels[0]} & {row.numpy().tobytes() for row in pixels[1]}
    assert FashionMnist().fingerprint() != FashionMnist(split="train").fingerprint()


def test_a_model_of_28_by_28_grey_pixels_sees_the_images_as_they_are():
    owner = teacher(10, (1, 28, 28))
    images, _ = next(FashionMnist().batches(owner, 5))
    stored = FashionMnist()._load()[0][:5]
    assert torch.equal((owner.denormalise(images) * 255).round().to(torch.uint8), stored)


def test_other_models_see_them_resized_and_repeated_over_the_channels():
    small, large = teacher(10, (1, 28, 28)), teacher(10, (3, 56, 56))
    images, labels = next(FashionMnist().batches(large, 5))
    reference, same = next(FashionMnist().batches(small, 5))
    assert images.shape == (5, 3, 56, 56)
    assert torch.equal(labels, same)
    assert torch.equal(images[:, 0], images[:, 2])
    resized = F.interpolate(reference, (56, 56), mode="bilinear", antialias=True)
    assert torch.allclose(images[:, :1], resized, atol=1e-5)


# what is measured


def test_accuracy_of_a_case_done_by_hand():
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 2], [3, 1, 0, 0, 0, 2], [0, 5, 4, 3, 2, 1], [0, 5, 4, 3, 2, 1]])
    labels = torch.tensor([0, 5, 1, 0])
    # first and third are right; the second is second best, the fourth the worst of six
    assert accuracy(logits, labels) == {"top1": 50.0, "top5": 75.0}
    assert accuracy(logits[:, :3], torch.tensor([0, 0, 2, 1])) == {"top1": 75.0}


def test_agreement_of_a_case_done_by_hand():
    assert (
        agreement(torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]), torch.tensor([[2.0, 1], [2, 1], [1, 2], [3, 0]]))
        == 75.0
    )


def evaluated(model, owner, dataset, batch=3):
    return logits_over(model, owner, Evaluation(dataset=dataset, batch=batch), Runtime(), "fp")


def test_every_image_is_evaluated_once_in_evaluation_mode(folder):
    dataset = folder({"a": {f"{i}.png": GREY for i in range(4)}, "b": {f"{i}.png": RED for i in range(4)}})
    owner = teacher()
    owner.module.train()
    moved = []

    class Steps:
        def __init__(self, label, total):
            assert (label, total) == ("fp", 8)

        def __enter__(self):
            return moved.append

        def __exit__(self, *_):
            pass

    logits, labels = logits_over(
        owner.module, owner, Evaluation(dataset=dataset, batch=3), Runtime(progress=Steps), "fp"
    )
    # grey: every channel (0.2 - 0.5) / 0.25; red: (2 - 2 - 2) / 3
    assert logits.tolist() == [pytest.approx([-1.2, -2.4], abs=1e-6)] * 4 + [pytest.approx([-2 / 3, -4 / 3])] * 4
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert not logits.requires_grad
    assert owner.module.training
    assert moved == [3, 3, 2]


@pytest.mark.parametrize("classes", [1 + 1, 4])
def test_a_dataset_of_more_or_fewer_classes_than_the_model_is_refused(folder, classes):
    dataset = folder({name: {"1.png": RED} for name in "abc"})
    with pytest.raises(
        DataError, match=f"^evaluation.dataset: has 3 classes, Means knows {classes}; labels are positions"
    ):
        evaluated(Means(classes), teacher(classes), dataset)
    with pytest.raises(DataError, match="has 10 classes, Means knows 2"):
        evaluated(Means(2), teacher(2), FashionMnist())


def test_logits_that_are_not_finite_are_refused(folder):
    dataset = folder({"a": {"1.png": RED}, "b": {"1.png": RED}})
    owner = teacher()
    owner.module.scale.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="fp: the logits of 2 of 2 images are NaN or infinite"):
        evaluated(owner.module, owner, dataset)


@pytest.mark.parametrize("name", datasets.names())
def test_every_dataset_has_what_evaluation_and_the_store_ask_for(name):
    kind = datasets.get(name)
    assert {"__len__", "classes", "batches", "fingerprint"} <= set(dir(kind))


# subsets and chosen images


def test_chosen_images_come_in_the_order_asked_for():
    everything = torch.cat([images for images, _ in FashionMnist().batches(bundled_like(), 500)])
    images, labels = next(FashionMnist().batches(bundled_like(), 10, [1999, 3, 700]))
    assert torch.equal(images, everything[[1999, 3, 700]])
    assert len(labels) == 3


def test_a_limit_draws_a_subset_by_its_seed_and_keeps_the_order():
    dataset = FashionMnist(limit=50)
    chosen = dataset.chosen(2000)
    assert len(dataset) == len(set(chosen)) == 50
    assert chosen == sorted(chosen) == FashionMnist(limit=50).chosen(2000)
    assert chosen != FashionMnist(limit=50, subset_seed=1).chosen(2000)
    assert FashionMnist(limit=3000).chosen(2000) == list(range(2000))
    limited = torch.cat([labels for _, labels in dataset.batches(bundled_like(), 20)])
    full = torch.cat([labels for _, labels in FashionMnist().batches(bundled_like(), 500)])
    assert torch.equal(limited, full[chosen])


def test_a_folder_is_limited_and_chosen_from_alike(folder):
    full = folder({"cat": {"a.png": GREY, "b.png": RED}, "dog": {"c.png": RED}})
    assert len(ImageFolder(root=full.root, limit=2)) == 2
    _, labels = next(full.batches(teacher(), 3, [2, 0]))
    assert labels.tolist() == [1, 0]


def bundled_like():
    return teacher(classes=10, size=(1, 28, 28))
