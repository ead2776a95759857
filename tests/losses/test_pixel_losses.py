"""The three total variations, frequencies, and teacher against student, against numbers computed by hand."""

import math

import attrs
import pytest
import torch
from support.backends import images as colour_images
from support.backends import quantized
from support.losses import exactly, random
from support.networks import build
from torch.autograd import gradcheck

from spdfq.attention import QUERIES_AND_KEYS, AttentionRecord, record_attention
from spdfq.errors import SpdfqError
from spdfq.losses import (
    FrequencyConsistencyLoss,
    LossInputs,
    MaskedAttentionAlignmentLoss,
    TeacherStudentDiscrepancyLoss,
    TotalVariationLoss,
)
from spdfq.losses.functional import (
    frequency_consistency,
    frequency_split,
    masked_attention_distance,
    teacher_student_discrepancy,
    total_variation,
)
from spdfq.losses.teacher_student import attention_rows
from spdfq.runtime import Draws

# total variation


def test_diagonals_weigh_what_they_are_told_to():
    image = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    # across: 1, 2; down: 2, 3; along the main diagonal: 4; along the other: 1 - 2
    assert total_variation(image, diagonal=0.25).item() == exactly(5**0.5 + 13**0.5 + 0.25 * (4 + 1))
    assert TotalVariationLoss(diagonal=0.25)(LossInputs(images=image)).item() == exactly(
        total_variation(image, 0.25).item()
    )


def test_the_mean_of_squares_does_not_depend_on_the_number_of_images():
    image = torch.tensor([[0.0, 1.0], [3.0, 5.0]]).view(1, 1, 2, 2)
    # across: 1 and 4, down: 9 and 16, the diagonals 25 and 4
    assert total_variation(image, 0.25, "mean_square").item() == exactly(2.5 + 12.5 + 0.25 * (25 + 4))
    loss = TotalVariationLoss(form="mean_square", diagonal=0.25)
    assert loss(LossInputs(images=image.repeat(4, 1, 1, 1))).item() == exactly(2.5 + 12.5 + 0.25 * (25 + 4))
    assert gradcheck(
        lambda x: total_variation(x, form="mean_square"), random(2, 1, 4, 3, dtype=torch.float64).requires_grad_()
    )


@pytest.mark.parametrize("other", [{"target": (1.0, 2.0)}, {"for_group": (2, 1, 17, 17)}])
def test_what_is_meant_for_norms_is_refused_beside_a_mean_of_squares(other):
    with pytest.raises(ValueError, match="are meant for form = 'norm'; leave them out"):
        TotalVariationLoss(form="mean_square", **other)
    with pytest.raises(SpdfqError, match="form must be one of 'norm', 'mean_square', got 'sum'"):
        total_variation(torch.zeros(1, 1, 2, 2), form="sum")


def test_total_variation_with_light_diagonals_has_the_right_gradient():
    images = random(2, 1, 4, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: total_variation(x, diagonal=0.5**0.5), images)


def test_the_target_is_that_of_the_paper_for_its_own_group_and_scaled_for_others():
    loss = TotalVariationLoss(target=(2500.0, 2500.0))
    published, smaller = torch.zeros(32, 3, 224, 224), torch.zeros(8, 1, 28, 28)
    scaled = 2500 * math.sqrt(8 * 28**2 / (32 * 3 * 224**2))
    assert loss(LossInputs(images=published, draws=Draws())).item() == exactly(2500)
    assert loss(LossInputs(images=smaller, draws=Draws())).item() == exactly(scaled)


def test_a_group_whose_pixels_are_repeated_is_as_far_from_its_target_in_proportion():
    images, loss = random(2, 3, 8, 8), TotalVariationLoss(target=(5000.0, 5000.0))
    once, fourfold = (loss(LossInputs(images=images.repeat(n, 1, 1, 1), draws=Draws())).item() for n in (1, 4))
    assert fourfold == exactly(2 * once)


def test_the_public_codes_target_knows_nothing_of_the_size():
    loss = TotalVariationLoss(target=(2500.0, 2500.0), faithful=True)
    assert loss(LossInputs(images=torch.zeros(1, 1, 4, 4), draws=Draws())).item() == exactly(2500)


def test_the_loss_is_the_distance_from_the_target_on_either_side():
    smooth, rough = torch.zeros(1, 1, 4, 4), 100 * random(1, 1, 4, 4)
    loss = TotalVariationLoss(target=(7.0, 7.0), faithful=True)
    assert loss(LossInputs(images=smooth, draws=Draws())).item() == exactly(7)
    assert loss(LossInputs(images=rough, draws=Draws())).item() == exactly(total_variation(rough).item() - 7)


def test_a_target_is_drawn_once_for_a_group_from_its_range():
    loss = TotalVariationLoss(target=(2500.0, 3000.0), faithful=True)
    groups = [LossInputs(images=torch.zeros(1, 1, 4, 4), draws=Draws(seed)) for seed in range(20)]
    drawn = [loss(inputs).item() for inputs in groups]
    assert drawn == [loss(inputs).item() for inputs in groups]
    assert all(2500 <= value <= 3000 for value in drawn)
    assert len(set(drawn)) == 20
    assert min(drawn) < 2650 < 2850 < max(drawn)


def test_the_variation_is_that_of_the_augmented_images_or_of_the_originals():
    images, originals = random(1, 3, 5, 5), random(1, 3, 5, 5, seed=1)
    inputs = LossInputs(images=images, originals=originals)
    assert TotalVariationLoss()(inputs) == total_variation(images)
    assert TotalVariationLoss(augmented=False)(inputs) == total_variation(originals)
    assert TotalVariationLoss(augmented=False)(LossInputs(images=images)) == total_variation(images)


@pytest.mark.parametrize("wrong", [{"target": (3.0, 2.0)}, {"target": (-1.0, 2.0)}, {"diagonal": -1.0}])
def test_total_variation_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"at least 0|must be >= 0"):
        TotalVariationLoss(**wrong)


# frequencies


def wave(down, right, side=16):
    """A cosine of so many cycles along each axis."""
    steps = torch.arange(side) / side
    return (2 * math.pi * (down * steps.unsqueeze(-1) + right * steps)).cos().view(1, 1, side, side)


@pytest.mark.parametrize(
    ("down", "right", "radius", "low"),
    # on 16 pixels the highest frequency is 8 cycles: 2 of them are a quarter
    [(0, 2, 0.25, True), (0, 2, 0.24, False), (2, 2, 0.3, False), (2, 2, 0.36, True), (0, 0, 0.01, True)],
)
def test_a_wave_is_low_within_the_radius_and_high_beyond(down, right, radius, low):
    image = wave(down, right)
    parts = frequency_split(image, radius)
    kept, other = parts if low else parts[::-1]
    assert torch.allclose(kept, image, atol=1e-5)
    assert other.abs().max() < 1e-5


def test_low_and_high_frequencies_add_up_to_the_images():
    images = random(2, 3, 9, 12)
    low, high = frequency_split(images, 0.4)
    assert torch.allclose(low + high, images, atol=1e-6)
    assert min(low.std(), high.std()) > 0.1
    assert torch.allclose(low.mean((-2, -1)), images.mean((-2, -1)), atol=1e-6)


def test_the_frequency_split_has_the_right_gradient():
    images = random(1, 1, 5, 6, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: frequency_split(x, 0.5), images)


def test_frequency_consistency_is_a_divergence_worked_out_by_hand():
    high = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # 1/4, 3/4 and 1/2, 1/2
    low = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    expected = 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)
    assert frequency_consistency(high, low).item() == exactly(expected / 2)
    assert frequency_consistency(low, low).item() == 0


def test_frequency_consistency_has_the_right_gradient():
    high, low = (random(2, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2))
    assert gradcheck(frequency_consistency, (high, low))


def classifier(views):
    return torch.stack([views.flatten(1).mean(1), views.flatten(1).std(1), views[:, 0, 0, 0]], -1)


def test_the_frequency_loss_compares_views_of_the_augmented_images_at_the_radius_of_the_stage():
    images = random(2, 1, 16, 16)
    inputs = LossInputs(images=images, forward=classifier, iterations=10)
    loss = FrequencyConsistencyLoss(radii=(0.1, 0.5))
    for iteration, radius in ((0, 0.1), (4, 0.1), (5, 0.5), (9, 0.5)):
        low, high = map(classifier, frequency_split(images, radius))
        found = loss(attrs.evolve(inputs, iteration=iteration))
        assert found.item() == exactly(frequency_consistency(high, low).item())
    assert loss(inputs) != loss(attrs.evolve(inputs, iteration=9))


def test_the_frequency_loss_needs_a_forward_pass():
    with pytest.raises(SpdfqError, match=r"frequency_consistency: got no forward; give the teacher's forward pass"):
        FrequencyConsistencyLoss()(LossInputs(images=random(1, 1, 8, 8)))


@pytest.mark.parametrize("radii", [(), (0.0,), (0.2, 1.5)])
def test_frequency_consistency_refuses_radii_out_of_range(radii):
    with pytest.raises(ValueError, match=r"above 0 and below 1\.41"):
        FrequencyConsistencyLoss(radii=radii)


# teacher against student


def test_the_discrepancy_is_the_mean_absolute_difference():
    teacher, student = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [6.0, 3.0]])
    assert teacher_student_discrepancy(teacher, student).item() == (0 + 2 + 3 + 1) / 4
    logits = torch.cat([teacher, random(3, 2)])  # the crops come after the images
    inputs = LossInputs(images=torch.zeros(2, 1, 4, 4), logits=logits, student_logits=student)
    assert TeacherStudentDiscrepancyLoss()(inputs).item() == -1.5


def test_the_distances_have_the_right_gradient():
    rows = [random(2, 5, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2)]
    mask = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.float64)
    assert gradcheck(teacher_student_discrepancy, rows)
    assert gradcheck(lambda t, s: masked_attention_distance(t, s, mask), rows)


def test_the_masked_distance_is_the_mean_over_the_mask_of_the_group():
    teacher, student = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert masked_attention_distance(teacher, student, mask).item() == (1 + 5 + 6) / 3
    assert masked_attention_distance(teacher, student, 0 * mask).item() == 0


@pytest.mark.parametrize(("name", "has_class", "skipped"), [("dinov2_registers", True, 5), ("swin", False, 0)])
@torch.no_grad()
def test_attention_rows_are_raw_scores_of_the_class_query_or_of_all_queries(name, has_class, skipped):
    model = build(name)
    with record_attention(model, {QUERIES_AND_KEYS}) as record:
        model(colour_images(2))
    assert record.has_class == has_class
    for query, key, row in zip(record.queries, record.keys, attention_rows(record), strict=True):
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key).mean(1)
        expected = scores[:, 0, skipped:] if has_class else scores.mean(1)
        assert torch.allclose(row, expected, atol=1e-5)
        assert row.std() > 1e-3


def record_of(rows):
    """A record of one head whose class rows are these, ``[blocks, B, K]``."""
    keys = [torch.cat([torch.zeros(len(block), 1), block], 1).view(len(block), 1, -1, 1) for block in rows]
    return AttentionRecord(queries=[torch.ones_like(key) for key in keys], keys=keys, prefix=1, has_class=True)


def alignment_inputs(teacher, student, images=1, **extra):
    record, other = record_of(teacher), record_of(student)
    pixels = torch.zeros(images, 1, 4, 4)
    return LossInputs(images=pixels, attention=record, student_attention=other, draws=Draws(), **extra)


def test_one_mask_of_the_largest_scores_over_all_blocks_serves_every_block():
    teacher = torch.tensor([[[9.0, 0.0, 5.0, 1.0]], [[1.0, 0.0, 6.0, 8.0]]])  # means 5, 0, 5.5, 4.5
    student = torch.zeros(2, 1, 4)
    loss = MaskedAttentionAlignmentLoss(share=(0.5, 0.5), dropped=0.0)
    # the first and the third patch: (9 + 5)/2 in one block, (1 + 6)/2 in the other
    assert loss(alignment_inputs(teacher, student)).item() == exactly((7 + 3.5) / 2)


def test_windows_have_masks_of_their_own():
    teacher = torch.tensor([[[9.0, 0.0, 5.0, 1.0], [0.0, 2.0, 1.0, 4.0]], [[1.0, 0.0, 6.0, 8.0], [3.0, 1.0, 1.0, 1.0]]])
    loss = MaskedAttentionAlignmentLoss(share=(0.25, 0.25), dropped=0.0)
    found = loss(alignment_inputs(teacher, torch.zeros(2, 2, 4), images=1))  # one image of two windows
    assert found.item() == exactly(((9 + 4) / 2 + (8 + 3) / 2) / 2)


def test_the_mask_shrinks_in_the_course_of_the_run_and_loses_some_at_random():
    rows = torch.arange(100.0).flip(0).expand(1, 1, -1).contiguous()
    loss = MaskedAttentionAlignmentLoss(share=(0.5, 0.1), dropped=0.3)
    inputs = alignment_inputs(rows, torch.zeros_like(rows), iterations=100)

    def mask(iteration):
        (found,) = loss._masks([rows[0]], attrs.evolve(inputs, iteration=iteration))
        return found[0].nonzero().flatten().tolist()

    assert len(mask(0)) == 35  # 70 % of 50
    assert set(mask(0)) < set(range(50))
    assert len(mask(50)) == 20  # 70 % of int(29.8)
    assert len(mask(99)) == 7
    assert set(mask(99)) < set(range(10))
    assert mask(0) == mask(0) != mask(1)


def test_the_mask_is_where_the_teacher_looks_and_not_where_the_student_does():
    rows = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    same = MaskedAttentionAlignmentLoss(share=(0.25, 0.25), dropped=0.0)
    assert same(alignment_inputs(rows, rows)).item() == 0
    turned = same(alignment_inputs(rows, rows.flip(-1)))
    assert turned.item() == 3  # at the teacher's first patch, not at the student's last


def test_a_quantized_student_agrees_better_at_eight_bits_than_at_three():
    module = build("vit").requires_grad_(False)
    values = {}
    for bits in (8, 3):
        student = quantized("vit", f"quantization.weights.bits={bits}", f"quantization.activations.bits={bits}")
        images = colour_images(2).requires_grad_()
        with record_attention(module, {QUERIES_AND_KEYS}) as record:
            logits = module(images)
        with record_attention(student, {QUERIES_AND_KEYS}) as other:
            student_logits = student(images)
        inputs = LossInputs(
            images=images,
            logits=logits,
            attention=record,
            student_logits=student_logits,
            student_attention=other,
            draws=Draws(),
        )
        for loss in (MaskedAttentionAlignmentLoss(), TeacherStudentDiscrepancyLoss()):
            value = loss(inputs)
            (gradient,) = torch.autograd.grad(value, images, retain_graph=True)
            assert gradient.flatten(1).norm(dim=1).min() > 0
            values[type(loss), bits] = abs(value.item())
    for loss in (MaskedAttentionAlignmentLoss, TeacherStudentDiscrepancyLoss):
        assert 0 < values[loss, 8] < values[loss, 3]


@pytest.mark.parametrize("wrong", [{"share": (0.1, 0.5)}, {"share": (1.1, 0.5)}, {"share": (0.5, 0.0)}])
def test_shares_must_be_in_order(wrong):
    with pytest.raises(ValueError, match="the second at most the first"):
        MaskedAttentionAlignmentLoss(**wrong)


def test_a_weight_for_another_group_pulls_as_hard_on_each_pixel():
    # the gradient of a 2-norm at a pixel falls with the square root of the number of pixels
    def pull(side, count, **options):
        images = torch.arange(side * side).remainder(2).float().view(1, 1, side, side).repeat(count, 1, 1, 1)
        images.requires_grad_()
        TotalVariationLoss(**options)(LossInputs(images=images)).backward()
        return images.grad[0, 0, 4, 4].abs().item()

    group = {"for_group": (2, 1, 17, 17)}
    assert pull(17, 2, **group) == exactly(pull(17, 2))
    assert pull(65, 8) < pull(17, 2) / 6
    assert pull(65, 2, **group) == pytest.approx(pull(17, 2), rel=0.05)  # the border differs
    # beside a mean over the group, whose gradient at one image falls with their number
    assert pull(17, 8, **group) * 8 == pytest.approx(pull(17, 2) * 2)


def test_a_group_without_pixels_is_refused():
    with pytest.raises(ValueError, match="four whole numbers from 1 up"):
        TotalVariationLoss(for_group=(32, 0, 224, 224))
