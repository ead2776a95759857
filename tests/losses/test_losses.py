"""The losses against numbers computed by hand, and their classes on hand-made inputs."""

import math

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import exactly, random
from torch.autograd import gradcheck

from spdfq.attention import AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses import (
    AttentionPriorLoss,
    CrossEntropyLoss,
    Loss,
    LossInputs,
    PatchSimilarityEntropyLoss,
    SoftCrossEntropyLoss,
    TotalVariationLoss,
)
from spdfq.losses.functional import (
    attention_prior_loss,
    cross_entropy,
    patch_similarity_entropy,
    soft_cross_entropy,
    total_variation,
)
from spdfq.runtime import Draws
from spdfq.synth import Move

PATCH = 4
few = settings(deadline=None, max_examples=25)


# attention prior: the function


def test_attention_prior_loss_weighs_blocks_by_depth_and_sums_over_heads():
    prior = [torch.zeros(2, 3, 4)] * 4
    attention = [torch.full((2, 3, 4), value) for value in (9.0, 9.0, 1.0, 2.0)]
    # blocks 2 and 3 of 4 weigh 3/4 and 4/4; 3 heads each; mean squared distance 1 and 4
    assert attention_prior_loss(attention, prior, start=2).item() == exactly(3 / 4 * 3 * 1 + 4 / 4 * 3 * 4)


def test_attention_prior_loss_takes_the_mean_over_images_and_tokens_only():
    attention, prior = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    attention[0, 0, 0] = 2.0  # head 0: mean of 4, 0, 0, 0
    prior[1, 1, 1] = 4.0  # head 1: mean of 0, 0, 0, 16
    assert attention_prior_loss([attention], [prior], start=0).item() == exactly(1 + 4)


def test_attention_prior_loss_does_not_read_priors_before_start():
    attention = [torch.ones(1, 1, 2)] * 2
    unread = torch.full((7, 1), math.nan)
    assert attention_prior_loss(attention, [unread, torch.zeros(1, 1, 2)], start=1).item() == exactly(1.0)


def test_attention_prior_loss_has_the_right_gradient():
    attention = [random(2, 2, 5, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3)]
    prior = [random(2, 2, 5, seed=9 + seed, dtype=torch.float64) for seed in range(3)]
    assert gradcheck(lambda *rows: attention_prior_loss(list(rows), prior, 1), attention)


@pytest.mark.parametrize(
    ("prior", "start", "message"),
    [
        ([torch.zeros(1, 2, 3)], 0, "2 blocks of attention but 1 of priors"),
        ([torch.zeros(1, 2, 3)] * 2, 2, "block index of 0 to 1"),
        ([torch.zeros(1, 2, 3)] * 2, -1, "block index of 0 to 1"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)], 0, "attention of block 1 and its prior must both be"),
    ],
)
def test_attention_prior_loss_refuses_priors_that_do_not_fit(prior, start, message):
    with pytest.raises(SpdfqError, match=message):
        attention_prior_loss([torch.zeros(1, 2, 3)] * 2, prior, start)


# total variation


def test_total_variation_is_the_sum_of_four_norms():
    image = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    # across: 1, 2; down: 2, 3; along the main diagonal: 4; along the other: 1 - 2
    assert total_variation(image).item() == exactly(5**0.5 + 13**0.5 + 4 + 1)


def test_total_variation_is_one_norm_over_the_whole_group():
    image = random(1, 3, 6, 5)
    assert total_variation(image.repeat(4, 1, 1, 1)).item() == exactly(2 * total_variation(image).item())


def test_total_variation_of_a_flat_image_is_zero_with_a_finite_gradient():
    image = torch.ones(1, 1, 4, 4, requires_grad=True)
    value = total_variation(image)
    value.backward()
    assert value.item() == 0
    assert image.grad.abs().max() == 0


def test_total_variation_has_the_right_gradient():
    assert gradcheck(total_variation, random(2, 1, 4, 3, dtype=torch.float64).requires_grad_())


# label losses


def test_soft_cross_entropy_is_the_mean_of_what_is_worked_out_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    target = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    first = -(0.5 * math.log(1 / 4) + 0.5 * math.log(3 / 4))
    assert soft_cross_entropy(logits, target).item() == exactly((first + math.log(2)) / 2)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == exactly((math.log(4) + math.log(4 / 3)) / 2)


def test_cross_entropies_have_the_right_gradient():
    logits = random(3, 4, dtype=torch.float64).requires_grad_()
    target = random(3, 4, seed=1, dtype=torch.float64).softmax(-1)
    assert gradcheck(lambda x: soft_cross_entropy(x, target), logits)
    assert gradcheck(lambda x: cross_entropy(x, torch.tensor([0, 3, 1])), logits)


@pytest.mark.parametrize(
    "value",
    [
        lambda half: total_variation(half.view(1, 1, 6, 8)),
        lambda half: soft_cross_entropy(half, half.softmax(-1)),
        lambda half: cross_entropy(half, torch.zeros(6, dtype=torch.long)),
        lambda half: patch_similarity_entropy(half.view(2, 3, 8)),
    ],
    ids=["total_variation", "soft_cross_entropy", "cross_entropy", "patch_similarity_entropy"],
)
def test_half_precision_is_computed_in_float32(value):
    half = random(6, 8).bfloat16()
    assert value(half).dtype == torch.float32
    assert value(half).item() == exactly(value(half.float()).item())


# patch similarity entropy


def direct_patch_similarity_entropy(features):
    """The formula of PSAQ-ViT with everything broadcast: `[B, 10, N * N]`."""
    similarity = F.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=-1).flatten(1)
    points = torch.linspace(similarity.min().item(), similarity.max().item(), 10, dtype=features.dtype)
    kernels = torch.distributions.Normal(similarity.unsqueeze(1), 0.01).log_prob(points.view(1, -1, 1)).exp()
    p = kernels.mean(-1) + 1e-4
    integrand = -p * p.log()
    widths = points[1:] - points[:-1]
    return ((integrand[:, 1:] + integrand[:, :-1]) / 2 * widths).sum(-1).mean()


def test_patch_similarity_entropy_of_two_orthogonal_patches_is_worked_out_by_hand():
    features = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])  # similarities 1, 0, 0, 1: half the density at each end
    ends = 0.5 / (0.01 * math.sqrt(2 * math.pi)) + 1e-4
    between = 1e-4
    expected = (-ends * math.log(ends) - 8 * between * math.log(between)) / 9
    assert patch_similarity_entropy(features).item() == exactly(expected)


@pytest.mark.parametrize("shape", [(3, 9, 4), (1, 2, 3), (2, 16, 8)])
def test_patch_similarity_entropy_equals_the_direct_formulation(shape):
    features = random(*shape, dtype=torch.float64)
    expected = direct_patch_similarity_entropy(features).item()
    assert patch_similarity_entropy(features).item() == pytest.approx(expected, rel=1e-9)


def test_patch_similarity_entropy_has_the_right_gradient_within_a_fixed_range():
    # two opposite patches fix the range at -1..1, which is taken as given
    opposite = torch.ones(1, 8, 3, dtype=torch.float64) * torch.tensor([1, -1] * 4).view(1, 8, 1)
    features = random(1, 8, 3, dtype=torch.float64).requires_grad_()

    def entropy(x):
        return patch_similarity_entropy(torch.cat([opposite, x]))

    assert torch.autograd.grad(entropy(features), features)[0].norm() > 0.01
    assert gradcheck(entropy, features)


def test_patch_similarity_entropy_of_equal_patches_is_finite():
    features = torch.ones(2, 4, 3, requires_grad=True)
    value = patch_similarity_entropy(features)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-4)
    assert features.grad.isfinite().all()


# the classes


def label_inputs(logits, **extra):
    """Two images, the first with one crop, the second with three."""
    weights = torch.tensor([1, 1, 1, 1 / 3, 1 / 3, 1 / 3]) / 2
    return LossInputs(images=torch.zeros(2, 1, 4, 4), logits=logits, view_weights=weights, **extra)


def test_a_label_loss_is_the_whole_image_plus_the_mean_over_its_crops():
    logits = random(6, 4)
    target = random(6, 4, seed=1).softmax(-1)
    view = [soft_cross_entropy(logits[i : i + 1], target[i : i + 1]).item() for i in range(6)]
    expected = ((view[0] + view[2]) + (view[1] + (view[3] + view[4] + view[5]) / 3)) / 2
    assert SoftCrossEntropyLoss()(label_inputs(logits, targets=target)).item() == exactly(expected)


def test_cross_entropy_shares_a_label_of_several_classes_evenly():
    logits = random(6, 4)
    labels = torch.eye(4, dtype=torch.bool)[[0, 1, 0, 1, 2, 3]]
    labels[1] = torch.tensor([False, True, True, True])
    shared = torch.tensor([[1.0, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], *torch.eye(4)[[0, 1, 2, 3]].tolist()])
    expected = SoftCrossEntropyLoss()(label_inputs(logits, targets=shared)).item()
    assert CrossEntropyLoss()(label_inputs(logits, labels=labels)).item() == exactly(expected)


def test_total_variation_loss_sees_the_whole_images():
    images = random(2, 3, 5, 5)
    assert TotalVariationLoss()(LossInputs(images=images)).item() == exactly(total_variation(images).item())


def test_patch_similarity_entropy_loss_merges_heads_drops_the_prefix_and_sums_over_blocks():
    outputs = [random(2, 3, 7, 4, seed=seed) for seed in range(2)]
    record = AttentionRecord(attention_outputs=outputs, prefix=2)
    merged = [sum(block[:, head, 2:] for head in range(3)) / 3 for block in outputs]
    expected = -sum(patch_similarity_entropy(features).item() for features in merged)
    loss = PatchSimilarityEntropyLoss()(LossInputs(images=torch.zeros(2, 1, 4, 4), attention=record))
    assert loss.item() == exactly(expected)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_must_be_a_finite_number_of_at_least_zero(weight):
    with pytest.raises(ValueError, match=r"TotalVariationLoss\.weight: .*(at least 0|expected a number)"):
        TotalVariationLoss(weight=weight)


def test_a_loss_without_a_formula_says_so():
    with pytest.raises(TypeError, match="Loss does not define __call__"):
        Loss()(LossInputs(images=torch.zeros(1, 1, 4, 4)))


# attention prior: the class


def prior_inputs(blocks=4, images=2, heads=3, grid=(3, 4), windows=1, **extra):
    """Attention of a model whose class token keeps a fifth of the mass to itself."""
    tokens = grid[0] * grid[1]
    rows = [0.8 * random(images * windows, heads, tokens, seed=block).softmax(-1) for block in range(blocks)]
    record = AttentionRecord(names=[""] * blocks, grids=[grid] * blocks, class_attention=rows, prefix=1)
    pixels = torch.zeros(images, 1, grid[0] * PATCH, grid[1] * PATCH)
    return LossInputs(images=pixels, attention=record, draws=Draws(), **extra)


@pytest.mark.parametrize(("blocks", "start"), [("deep", 2), ("all", 0)])
def test_attention_prior_takes_the_deep_half_or_all_blocks(blocks, start):
    inputs, loss = prior_inputs(blocks=5), AttentionPriorLoss(blocks=blocks, scale="sum")
    maps = [loss.maps(inputs, block) for block in range(5)]
    expected = attention_prior_loss(inputs.attention.class_attention, maps, start).item()
    assert loss(inputs).item() == exactly(expected)
    assert expected > 0


def test_every_image_block_and_head_has_a_map_of_its_own():
    inputs, loss = prior_inputs(), AttentionPriorLoss()
    maps = torch.cat([loss.maps(inputs, block).flatten(0, 1) for block in range(4)])
    assert len(maps.unique(dim=0)) == len(maps) == 4 * 2 * 3


def test_maps_are_drawn_once_and_drawn_alike_after_a_resume():
    loss, inputs, resumed = AttentionPriorLoss(follow=False), prior_inputs(), prior_inputs()
    assert loss.maps(inputs, 1).data_ptr() == loss.maps(inputs, 1).data_ptr()
    assert torch.equal(loss.maps(inputs, 1), loss.maps(resumed, 1))


def test_two_attention_prior_losses_draw_maps_of_their_own():
    loss, inputs = AttentionPriorLoss(follow=False), prior_inputs()
    first, second = (loss.maps(inputs.scoped(name), 0) for name in ("near", "far"))
    assert (first - second).abs().amax(-1).min() > 0.01
    assert loss.maps(inputs.scoped("near"), 0).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("scale", ["mass", "sum", "max"])
def test_scale_sets_what_a_map_sums_to(scale):
    inputs, loss = prior_inputs(blocks=1), AttentionPriorLoss(blocks="all", scale=scale)
    maps = loss.maps(inputs, 0)
    (row,) = inputs.attention.class_attention
    target = {"mass": 0.8 * maps, "sum": maps, "max": maps / maps.amax(-1, keepdim=True)}[scale]
    assert loss(inputs).item() == exactly((row - target).square().mean((0, 2)).sum().item())


def test_the_mass_a_map_is_scaled_to_carries_no_gradient():
    inputs = prior_inputs(blocks=1)
    row = inputs.attention.class_attention[0].requires_grad_()
    loss = AttentionPriorLoss(blocks="all")
    (gradient,) = torch.autograd.grad(loss(inputs), row)
    expected = 2 * (row - 0.8 * loss.maps(inputs, 0)) / (2 * 12)
    assert torch.allclose(gradient, expected, atol=1e-7)


def moved_by(inputs, move):
    return attrs.evolve(inputs, follow=lambda maps: move.follow(maps, tuple(inputs.images.shape[-2:])))


@few
@given(flip=st.booleans(), down=st.integers(-20, 20), right=st.integers(-20, 20))
def test_maps_move_with_the_images(flip, down, right):
    loss, still = AttentionPriorLoss(), prior_inputs()
    maps = loss.maps(still, 0)
    pixels = maps.unflatten(-1, (3, 4)).repeat_interleave(PATCH, -2).repeat_interleave(PATCH, -1)
    move = Move(flip=flip, shift=(down, right))
    moved = move.apply(pixels).flatten(0, 1)
    expected = F.avg_pool2d(moved, PATCH).flatten(1).view_as(maps)
    assert torch.allclose(loss.maps(moved_by(still, move), 0), expected, atol=1e-6)


def test_maps_stay_where_follow_is_off_or_attention_is_windowed():
    for loss, windows in ((AttentionPriorLoss(follow=False), 1), (AttentionPriorLoss(), 4)):
        still = prior_inputs(windows=windows)
        moved = moved_by(still, Move(flip=True, shift=(PATCH, 0)))
        assert torch.equal(loss.maps(moved, 0), loss.maps(still, 0))


@pytest.mark.parametrize("wrong", [{"blocks": "shallow"}, {"scale": "mean"}])
def test_attention_prior_refuses_unknown_choices(wrong):
    with pytest.raises(ValueError, match="expected one of"):
        AttentionPriorLoss(**wrong)
