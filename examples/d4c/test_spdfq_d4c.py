"""The numbers of D4C's contrast, and one short run of the recipe."""

import math
from pathlib import Path

import pytest
import torch
from spdfq_d4c import ForegroundContrastLoss, MeanSquaredVariationLoss, foreground_contrast, outside

import spdfq
from spdfq.losses import LossInputs
from spdfq.runtime import Draws

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("background", "others"),
    [
        ([0.0, 4.0], 2 * math.exp(-2)),  # class 1 and the background are opposite to class 0: cosine -1 instead of 1
        ([4.0, 0.0], 1 + math.exp(-2)),  # the background is as close to class 0 as the foreground
        ([4.0, 4.0], math.exp(-1) + math.exp(-2)),  # the background has no direction: cosine 0
    ],
)
def test_the_contrast_is_small_if_the_background_differs_from_the_foreground(background, others):
    value = foreground_contrast(torch.tensor([[3.0, 1.0]]), torch.tensor([background]), torch.tensor([0]), 1.0)
    assert value.item() == pytest.approx(math.log(1 + others), abs=1e-6)


def test_backgrounds_of_all_images_are_negatives():
    foreground = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    value = foreground_contrast(foreground, torch.zeros(2, 2), torch.tensor([0, 1]), 1.0)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-2) + 2 * math.exp(-1)), abs=1e-6)


def test_boxes_cover_the_share_of_the_image_that_the_loss_names():
    loss = ForegroundContrastLoss(area=(0.4, 0.7))
    plan = loss.boxes(200, (40, 80), torch.Generator().manual_seed(0))
    top, left, height, width = plan.boxes.unbind(dim=1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 40).all()
    assert (left + width <= 80).all()
    share = height * width / (40 * 80)
    assert 0.38 < share.min() < 0.44
    assert 0.66 < share.max() < 0.72
    kept = outside(plan, torch.ones(200, 3, 40, 80)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(kept, 1 - share)


def test_the_teacher_sees_the_box_alone_and_the_image_without_it():
    seen = []

    def forward(views):
        seen.append(views.detach())
        return views.mean(dim=(2, 3))

    images = torch.full((2, 3, 8, 8), 5.0, requires_grad=True)
    labels = torch.tensor([[True, False, False], [False, False, True]])
    inputs = LossInputs(images=images, originals=images, labels=labels, forward=forward, draws=Draws(seed=0))
    ForegroundContrastLoss(noise=0.0)(inputs).backward()
    foreground, background = seen[0].split(2)
    assert (foreground == 5).all()
    assert set(background.unique().tolist()) == {0.0, 5.0}
    assert images.grad.isfinite().all()


def test_the_variation_of_a_ramp_is_its_squared_slope():
    ramp = 3 * torch.arange(4.0).expand(1, 1, 4, 4)
    value = MeanSquaredVariationLoss()(LossInputs(images=ramp, originals=ramp))
    assert value.item() == 9


@pytest.mark.parametrize("area", [(0.7, 0.4), (0.0, 0.5), (0.5, 1.0)])
def test_an_impossible_area_is_refused(area):
    with pytest.raises(spdfq.SpdfqError, match=r"area: expected 0 < smallest <= largest < 1"):
        ForegroundContrastLoss(area=area)


def test_the_recipe_runs(tmp_path):
    short = ["synthesis.images=4", "synthesis.iterations=2", 'quantization.steps=["calibrate"]']
    run = spdfq.run(HERE / "d4c.toml", out=tmp_path / "d4c", overrides=[*short, "evaluation.dataset.limit=50"])
    assert run.metrics["images"] == 50
    header = (tmp_path / "d4c/losses.csv").read_text().splitlines()[0]
    assert "foreground_contrast" in header
    assert "mean_squared_variation" in header
