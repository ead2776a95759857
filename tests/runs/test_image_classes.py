"""The classes and the real images that a run keeps for its report, and its explanations."""

import json

import numpy as np
import torch
from PIL import Image
from support.runs import IMAGES

from spdfq.recipe import load_recipe
from spdfq.runs.explained import explained
from spdfq.runs.image_classes import _places


def test_a_run_keeps_the_class_that_the_teacher_predicts(finished):
    found = json.loads((finished.folder / "image_classes.json").read_text())
    assert len(found) == IMAGES
    assert all(0 <= each["class"] < 10 and 10 <= each["percent"] <= 100 and each["drawn"] for each in found)


def test_the_real_images_are_test_images_of_these_classes(finished, photos):
    found = json.loads((finished.folder / "image_classes.json").read_text())
    sheet = np.array(Image.open(finished.folder / "real.png"))
    for index, each in enumerate(found):
        photo = np.array(Image.open(photos / str(each["class"]) / "0.png"))
        tile = sheet[:112:4, index * 115 : index * 115 + 112 : 4]  # magnified four times
        assert np.abs(tile[..., 0].astype(int) - photo).max() <= 1
        assert np.all(tile[..., 1] == 255)


def test_repeated_classes_get_other_images_as_far_as_there_are():
    labels = torch.tensor([3, 5, 3, 5, 5])
    assert _places([3, 3, 3, 5, 7], labels) == [0, 2, 0, 1, None]


def test_components_and_keys_of_a_recipe_are_explained(recipe):
    found = explained(load_recipe({**recipe, "controls": {"mine": {"type": "gaussian_noise"}}}))
    assert found["names"]["blockwise"].startswith("Step: ")
    assert found["names"]["mine"] == found["names"]["gaussian_noise"]
    assert found["names"]["mine"].startswith("Source: Standard normal noise")
    assert found["keys"]["quantization.steps.1.iterations"]
    assert found["keys"]["synthesis.type"].startswith("Source: ")
    assert not any("``" in text for text in found["keys"].values())


def test_the_page_of_a_run_explains_its_steps(finished):
    page = (finished.folder / "report.html").read_text()
    assert explained(finished.recipe) == json.loads((finished.folder / "explained.json").read_text())
    assert f'title="{explained(finished.recipe)["names"]["blockwise"]}'[:40] in page
    assert page.count('class="cell') == len(json.loads((finished.folder / "site_noise.json").read_text())["sites"])
