"""Bits that say which test images are classified correctly, and the hash of these images."""

import os

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image

import spdfq
from spdfq.data import FashionMnist, ImageFolder
from spdfq.errors import DataError
from spdfq.evaluation.correctness import images_digest, packed, unpacked


@pytest.mark.parametrize("images", [1, 7, 8, 9, 500])
def test_bits_come_back_as_they_were(images):
    draws = torch.Generator().manual_seed(images)
    logits = torch.randn(images, 3, generator=draws)
    labels = torch.randint(0, 3, (images,), generator=draws)
    assert np.array_equal(unpacked(packed(logits, labels), images), (logits.argmax(1) == labels).numpy())


def test_two_thousand_images_take_336_characters():
    assert len(packed(torch.zeros(2000, 2), torch.zeros(2000, dtype=torch.int64))) == 336


@pytest.mark.parametrize(("text", "said"), [("%", "not Base64"), ("AAAA", "3 bytes, which is not 8 bits")])
def test_damaged_bits_are_one_line(text, said):
    with pytest.raises(DataError, match=said):
        unpacked(text, 8)


def test_an_evaluation_has_the_bits_of_both_models_and_the_hash_of_its_images():
    teacher = spdfq.load_teacher("bundled:vit_fmnist")
    dataset = FashionMnist(limit=30)
    found = spdfq.evaluate(teacher.module, teacher, dataset)
    hits = unpacked(found["correct"]["fp"], 30)
    assert 100 * hits.mean() == pytest.approx(found["fp"]["top1"])
    assert found["correct"]["quantized"] == found["correct"]["fp"]
    others = [evolve(dataset, limit=29), evolve(dataset, subset_seed=1), evolve(dataset, skip=1)]
    assert found["test_images"] not in [spdfq.evaluate(teacher.module, teacher, o)["test_images"] for o in others]
    assert spdfq.evaluate(teacher.module, teacher, dataset, batch=7) == found


def test_a_copied_folder_has_the_same_hash_and_another_image_does_not(tmp_path):
    labels = torch.tensor([0, 1])
    digests = {}
    for name, size in (("one", 8), ("copy", 8), ("other", 64)):
        for label in "01":
            (tmp_path / name / label).mkdir(parents=True)
            path = tmp_path / name / label / "a.png"
            Image.new("L", (size, size)).save(path)
            os.utime(path, (len(name), 1))
        digests[name] = images_digest(ImageFolder(root=str(tmp_path / name)), labels, ())
    assert digests["one"] == digests["copy"] != digests["other"]
    damaged = images_digest(ImageFolder(root=str(tmp_path / "one")), labels[:1], ("1/a.png (a reason)",))
    again = images_digest(ImageFolder(root=str(tmp_path / "one")), labels[:1], ("1/a.png (another)",))
    assert damaged == again != digests["one"]
