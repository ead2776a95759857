"""Losses of the similarity of patches against numbers computed by hand, on whole images and on windows."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.losses import exactly, pictures, random, recorded
from torch.autograd import gradcheck

from spdfq.attention import ATTENTION_OUTPUTS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses import LossInputs, PatchContrastLoss, PatchSimilarityEntropyLoss, chunks
from spdfq.losses.functional import patch_contrast, patch_similarity_entropy
from spdfq.losses.patch_contrast import _neighbour_similarities

# patch similarity entropy


@pytest.fixture
def small_chunks(monkeypatch):
    """One query row at a time."""
    monkeypatch.setattr(chunks, "_ELEMENTS_CPU", 1)


def direct_entropy(similarity, low, high):
    """Of one image's similarities, everything broadcast."""
    points = torch.linspace(low, high, 10, dtype=similarity.dtype)
    kernels = torch.distributions.Normal(similarity.flatten(), 0.01).log_prob(points.unsqueeze(-1)).exp()
    p = kernels.mean(-1) + 1e-4
    return torch.trapezoid(-p * p.log(), points)


def test_windows_give_the_density_of_the_pairs_inside_each_of_an_images_windows():
    features = random(6, 5, 4, dtype=torch.float64)  # 2 images of 3 windows of 5 tokens
    similarity = F.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=-1)
    ends = similarity.min().item(), similarity.max().item()
    by_hand = sum(direct_entropy(image, *ends) for image in similarity.view(2, 3, 5, 5)) / 2
    assert patch_similarity_entropy(features, images=2).item() == pytest.approx(by_hand.item(), rel=1e-9)
    assert abs(patch_similarity_entropy(features, images=2) - patch_similarity_entropy(features)) > 1e-3


def test_windows_of_one_image_may_come_in_any_order_but_not_move_to_another_image():
    features = random(6, 5, 4, dtype=torch.float64)
    value = patch_similarity_entropy(features, images=2)
    assert patch_similarity_entropy(features[[2, 0, 1, 3, 5, 4]], images=2).item() == exactly(value.item())
    assert abs(patch_similarity_entropy(features[[3, 1, 2, 0, 4, 5]], images=2) - value) > 1e-6


@pytest.mark.parametrize("images", [0, 4, 7])
def test_windows_that_are_no_multiple_of_the_images_are_refused(images):
    with pytest.raises(SpdfqError, match=f"6 windows cannot belong to {images} images"):
        patch_similarity_entropy(random(6, 5, 4), images)


def test_the_entropy_and_its_gradient_are_the_same_in_chunks(small_chunks):
    features = random(4, 9, 3, dtype=torch.float64).requires_grad_()
    chunked = patch_similarity_entropy(features, images=2)
    (gradient,) = torch.autograd.grad(chunked, features)
    chunks._ELEMENTS_CPU = 10**6
    whole = patch_similarity_entropy(features, images=2)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient, torch.autograd.grad(whole, features)[0], rtol=1e-9)


def test_the_entropy_of_windows_in_chunks_has_the_right_gradient(small_chunks):
    opposite = torch.ones(2, 4, 3, dtype=torch.float64) * torch.tensor([1, -1] * 2).view(1, 4, 1)
    features = random(2, 4, 3, dtype=torch.float64).requires_grad_()

    def entropy(x):  # the opposite tokens fix the range at -1..1, which is taken as given
        return patch_similarity_entropy(torch.cat([opposite, x]), images=2)

    assert torch.autograd.grad(entropy(features), features)[0].norm() > 0.01
    assert gradcheck(entropy, features)


def test_the_entropy_of_swin_drops_no_token_unless_the_public_code_is_to_be_followed():
    inputs = recorded("swin", pictures(2), {ATTENTION_OUTPUTS})
    outputs = inputs.attention.attention_outputs
    assert {len(block) // 2 for block in outputs} == {4, 1}, "windows of both sizes are wanted"

    def by_hand(first):
        return -sum(patch_similarity_entropy(block.mean(1)[:, first:], 2).item() for block in outputs)

    assert PatchSimilarityEntropyLoss()(inputs).item() == exactly(by_hand(0))
    assert PatchSimilarityEntropyLoss(faithful=True)(inputs).item() == exactly(by_hand(1))
    assert abs(by_hand(0) - by_hand(1)) > 1e-3


def test_where_there_is_a_class_token_both_ways_drop_it():
    inputs = recorded("vit", pictures(2), {ATTENTION_OUTPUTS})
    assert PatchSimilarityEntropyLoss(faithful=True)(inputs) == PatchSimilarityEntropyLoss()(inputs)


# patch contrast


def test_the_contrast_of_the_middle_of_nine_patches_is_worked_out_by_hand():
    angles = torch.tensor([10.0, 20.0, 30.0, 40.0, 0.0, 50.0, 60.0, 70.0, 80.0]).deg2rad()
    unit = torch.stack([angles.cos(), angles.sin()], -1).view(1, 3, 3, 2)
    near = [math.exp(math.cos(math.radians(degrees))) for degrees in (10, 20, 30, 40)]
    far = sum(math.exp(math.cos(math.radians(degrees))) for degrees in (50, 60, 70, 80))
    middle = sum(-math.log(s / (s + far)) for s in near) / 4

    def border(own, others):  # five neighbours, four of them positives
        cosines = sorted(math.cos(math.radians(own - other)) for other in others)
        return sum(-math.log(math.exp(s) / (math.exp(s) + math.exp(cosines[0]))) for s in cosines[1:]) / 4

    sides = border(20, (10, 30, 40, 0, 50)) + border(40, (10, 20, 0, 60, 70))
    sides += border(50, (20, 30, 0, 70, 80)) + border(70, (40, 0, 50, 60, 80))
    # the four corners have three neighbours, all of them positives
    found = patch_contrast(3 * unit.view(1, 9, 2), (3, 3), temperature=1.0)
    assert found.item() == exactly((middle + sides) / 9)


def test_neighbour_similarities_are_those_of_the_eight_neighbours_and_nothing_beyond_the_border():
    unit = F.normalize(random(2, 4, 5, 3), dim=-1)
    found = _neighbour_similarities(unit)
    for row in range(4):
        for column in range(5):
            around = [
                (unit[:, row, column] * unit[:, row + down, column + right]).sum(-1)
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                if (down or right) and 0 <= row + down < 4 and 0 <= column + right < 5
            ]
            there = found[:, row, column]
            expected = torch.stack(around, -1).sort().values
            assert torch.allclose(there.sort().values[:, 8 - len(around) :], expected, atol=1e-6)
            assert int(there.isinf().sum()) == 2 * (8 - len(around))


def test_patch_contrast_has_the_right_gradient():
    features = random(2, 12, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: patch_contrast(x, (3, 4)), features)


def test_patch_contrast_of_equal_patches_is_finite_with_a_finite_gradient():
    features = torch.ones(1, 16, 3, requires_grad=True)
    value = patch_contrast(features, (4, 4))
    value.backward()
    # 4 of 16 patches have eight neighbours, so four negatives; 8 have five, so one; the corners have none
    assert value.item() == exactly((4 * math.log(5) + 8 * math.log(2)) / 16)
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("grid", "message"), [((2, 5), "12 patches are not a grid of 2x5"), ((1, 12), "more than 4 neighbours")]
)
def test_patch_contrast_refuses_grids_that_do_not_fit(grid, message):
    with pytest.raises(SpdfqError, match=message):
        patch_contrast(random(1, 12, 3), grid)


@pytest.mark.parametrize(("name", "skipped"), [("vit", 1), ("swin", 0)])
def test_the_contrast_loss_keeps_inside_images_and_windows(name, skipped):
    inputs = recorded(name, pictures(2), {ATTENTION_OUTPUTS})
    blocks = [
        patch_contrast(image.transpose(0, 1).flatten(1)[skipped:].unsqueeze(0), (4, 4)).item()
        for outputs in inputs.attention.attention_outputs
        for image in outputs
    ]
    sizes = [len(outputs) for outputs in inputs.attention.attention_outputs]
    parts = torch.tensor(blocks).split(sizes)
    assert PatchContrastLoss()(inputs).item() == exactly(torch.stack([part.mean() for part in parts]).mean().item())


def test_the_contrast_loss_finds_the_query_grid_where_keys_are_pooled():
    outputs = random(2, 2, 64, 3)
    record = AttentionRecord(names=["a"], grids=[(4, 4)], attention_outputs=[outputs])
    expected = patch_contrast(outputs.transpose(1, 2).flatten(2), (8, 8))
    inputs = LossInputs(images=torch.zeros(2, 1, 8, 8), attention=record)
    assert PatchContrastLoss()(inputs).item() == exactly(expected.item())


@pytest.mark.parametrize("wrong", [{"positives": 0}, {"positives": 8}, {"temperature": 0.0}])
def test_patch_contrast_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be"):
        PatchContrastLoss(**wrong)
