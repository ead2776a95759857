"""Losses of attention and of its outputs against numbers worked out by hand, on whole images and on windows."""

import math

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from spdfq.attention import ATTENTION_OUTPUTS, QUERIES_AND_KEYS, AttentionRecord, record_attention
from spdfq.errors import SpdfqError
from spdfq.losses import (
    AttentionEntropyLoss,
    HeadSimilarityLoss,
    LossInputs,
    PatchContrastLoss,
    PatchSimilarityEntropyLoss,
    chunks,
)
from spdfq.losses.functional import (
    attention_entropy,
    head_similarity,
    head_ssim,
    patch_contrast,
    patch_similarity_entropy,
)
from spdfq.losses.patch_contrast import _neighbour_similarities
from spdfq.runtime import generator

C1, C2 = 0.01**2, 0.03**2
few = settings(deadline=None, max_examples=25)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exactly(x):
    return pytest.approx(x, rel=1e-5)


def recorded(name, images, needs):
    """What a tiny model shows; gradients to the images."""
    model = build(name).requires_grad_(False)
    with record_attention(model, needs) as record:
        logits = model(images)
    return LossInputs(images=images, logits=logits, attention=record)


def pictures(count=3, seed=0):
    return random(count, 3, 32, 32, seed=seed)


@pytest.fixture
def small_chunks(monkeypatch):
    """One query row at a time."""
    monkeypatch.setattr(chunks, "_ELEMENTS_CPU", 1)


# chunks


@few
@given(rows=st.integers(1, 40), elements=st.integers(0, 10**6))
def test_chunks_cover_every_row_once_and_keep_to_the_limit(rows, elements):
    found = list(chunks.row_chunks(rows, elements, torch.device("cpu")))
    assert [row for chunk in found for row in range(rows)[chunk]] == list(range(rows))
    longest = max(len(range(rows)[chunk]) for chunk in found)
    assert longest == 1 or longest * elements <= 2**18


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator returned, in elements."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("loss", [HeadSimilarityLoss, PatchSimilarityEntropyLoss])
@pytest.mark.parametrize("limit", [2**11, 2**20])
def test_no_tensor_of_the_size_of_all_pairs_is_ever_there(loss, limit, monkeypatch):
    monkeypatch.setattr(chunks, "_ELEMENTS_CPU", limit)
    images, heads, tokens, dim = 2, 4, 64, 6
    given = [random(images, heads, tokens, dim, seed=seed).requires_grad_() for seed in range(3)]
    record = AttentionRecord(queries=given[:1], keys=given[1:2], attention_outputs=given[2:])
    with Largest() as largest:
        value = loss()(LossInputs(images=torch.zeros(images, 1, 8, 8), attention=record))
        torch.autograd.grad(value, given, allow_unused=True)
    pairs = images * tokens**2
    if limit < pairs:
        assert largest.numel <= max(2 * limit, given[0].numel()) < pairs
    else:
        assert largest.numel >= pairs, "the watcher must see them where they are allowed"


# patch similarity entropy


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
    with pytest.raises(SpdfqError, match=f"6 windows cannot be those of {images} images"):
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


# head similarity


def test_the_similarity_of_two_heads_is_worked_out_by_hand():
    scores = torch.tensor([[[[0.0, 2.0, 4.0, 2.0]], [[5.0, 7.0, 6.0, 7.0]]]])  # an image, two heads, one query
    # at 0..1: 0, 1/2, 1, 1/2 and 0, 1, 1/2, 1
    # means 1/2 and 5/8; variances 1/8 and 11/64; covariance (0 + 1/2 + 1/2 + 1/2)/4 - 5/16 = 1/16
    ssim = (2 * 5 / 16 + C1) * (2 / 16 + C2) / ((1 / 4 + 25 / 64 + C1) * (1 / 8 + 11 / 64 + C2))
    found = head_ssim(scores)
    assert found.shape == (1, 1, 2, 2)
    assert found.flatten().tolist() == pytest.approx([1, ssim, ssim, 1], rel=1e-5)
    assert head_similarity(scores).item() == exactly(ssim**2)


def test_heads_that_look_alike_but_for_scale_and_offset_are_the_same():
    one = random(2, 1, 5, 9)
    assert head_similarity(torch.cat([one, 3 * one - 7, 0.1 * one], 1)).item() == exactly(1)


def test_the_similarity_is_the_mean_over_pairs_of_two_heads_queries_and_images():
    scores = random(2, 3, 5, 9, dtype=torch.float64)
    pairs = [
        head_similarity(scores[i : i + 1, [a, b], q : q + 1]).item()
        for i in range(2)
        for q in range(5)
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert head_similarity(scores).item() == exactly(sum(pairs) / 30)


def test_the_similarity_equals_a_broadcast_of_all_pairs_of_maps():
    scores = random(2, 3, 4, 6, dtype=torch.float64)
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    maps = ((scores - low) / (high - low)).transpose(1, 2)
    a, b = maps.unsqueeze(2), maps.unsqueeze(3)
    covariance = (a * b).mean(-1) - a.mean(-1) * b.mean(-1)
    expected = (2 * a.mean(-1) * b.mean(-1) + C1) * (2 * covariance + C2)
    expected /= a.mean(-1) ** 2 + b.mean(-1) ** 2 + C1
    expected /= a.var(-1, correction=0) + b.var(-1, correction=0) + C2
    assert torch.allclose(head_ssim(scores), expected, rtol=1e-9)


def test_head_similarity_has_the_right_gradient():
    assert gradcheck(head_similarity, random(2, 3, 2, 5, dtype=torch.float64).requires_grad_())


def test_flat_maps_are_alike_with_a_finite_gradient():
    scores = torch.ones(1, 2, 3, 4, requires_grad=True)
    value = head_similarity(scores)
    value.backward()
    assert value.item() == exactly(1)
    assert scores.grad.isfinite().all()


def test_one_head_is_refused():
    with pytest.raises(SpdfqError, match="needs at least 2 heads, got 1"):
        head_similarity(random(1, 1, 3, 4))


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "swin"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_head_loss_takes_patch_queries_and_keys_of_each_image_or_window(name, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(chunks, "_ELEMENTS_CPU", 1)
    inputs = recorded(name, pictures(2).requires_grad_(), {QUERIES_AND_KEYS})
    record = inputs.attention
    skipped = {"vit": 1, "deit_distilled": 2, "swin": 0}[name]
    blocks = []
    for query, key in zip(record.queries, record.keys, strict=True):
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key)[:, :, skipped:, skipped:]
        blocks.append(1 - head_similarity(scores))
    expected, found = sum(blocks) / len(blocks), HeadSimilarityLoss()(inputs)
    assert found.item() == exactly(expected.item())
    gradients = [torch.autograd.grad(value, inputs.images, retain_graph=True)[0] for value in (found, expected)]
    assert gradients[1].abs().max() > 1e-6
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-9)


def test_the_head_loss_gives_its_gradient_twice():
    inputs = recorded("vit", pictures(2).requires_grad_(), {QUERIES_AND_KEYS})
    value = HeadSimilarityLoss()(inputs)  # weight = "auto" asks for it before the step does
    first, second = (torch.autograd.grad(value, inputs.images, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_blocks_of_one_head_are_left_out_and_a_model_of_such_is_refused():
    two, one = random(1, 2, 4, 3), random(1, 1, 4, 3)
    both = AttentionRecord(queries=[one, two], keys=[one, two])
    alone = AttentionRecord(queries=[two], keys=[two])
    images = torch.zeros(1, 1, 4, 4)
    values = [HeadSimilarityLoss()(LossInputs(images=images, attention=record)).item() for record in (both, alone)]
    assert values[0] == values[1] > 0
    with pytest.raises(SpdfqError, match="no attention of this model has two heads or more"):
        HeadSimilarityLoss()(LossInputs(images=images, attention=AttentionRecord(queries=[one], keys=[one])))


def test_the_public_codes_count_takes_each_head_with_itself():
    """(1/H^2) sum over all pairs, of which H are one: each block's loss times (H - 1)/H."""
    two, four = random(1, 2, 4, 3), random(1, 4, 4, 3)
    inputs = LossInputs(
        images=torch.zeros(1, 1, 4, 4), attention=AttentionRecord(queries=[two, four], keys=[two, four])
    )
    every = [1 - head_ssim(x @ x.mT).square().mean().item() for x in (two, four)]
    assert HeadSimilarityLoss(faithful=True)(inputs).item() == pytest.approx(sum(every) / 2, rel=1e-5)


# attention entropy


def test_the_attention_entropy_of_two_orthogonal_rows_is_worked_out_by_hand():
    rows = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]])  # similarities 1, 0, 0, 1: variance 1/4
    expected = 0.5 * math.log(2 * math.pi * math.e / 4)
    assert attention_entropy(rows).item() == exactly(expected)
    assert attention_entropy(torch.cat([rows, rows])).item() == exactly(expected)


def test_the_attention_entropy_of_equal_rows_is_low_with_a_finite_gradient():
    rows = torch.ones(1, 4, 3, requires_grad=True)
    value = attention_entropy(rows)
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 1e-8), rel=1e-3)
    assert rows.grad.isfinite().all()


def test_attention_entropy_has_the_right_gradient():
    assert gradcheck(attention_entropy, random(2, 4, 5, dtype=torch.float64).requires_grad_())


def entropy_of_all_rows(record, first):
    blocks = []
    for query, key in zip(record.queries, record.keys, strict=True):
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key).mean(1)
        blocks.append(attention_entropy(scores[:, first:, first:]))
    return sum(blocks).item() / len(blocks)


@pytest.mark.parametrize(("name", "skipped"), [("vit", 1), ("dinov2_registers", 5), ("swin", 0)])
def test_the_entropy_loss_takes_the_head_means_of_patch_rows(name, skipped):
    inputs = recorded(name, pictures(2), {QUERIES_AND_KEYS})
    expected = -entropy_of_all_rows(inputs.attention, skipped)  # 16 tokens: fewer than the 64 rows
    assert AttentionEntropyLoss()(inputs).item() == pytest.approx(expected, rel=1e-4)


def test_the_entropy_loss_draws_rows_anew_in_each_iteration():
    inputs = recorded("vit", pictures(2), {QUERIES_AND_KEYS})
    inputs = attrs.evolve(inputs, generator=lambda *purpose: generator(0, *purpose), iterations=9)
    loss = AttentionEntropyLoss(rows=4)
    values = [loss(attrs.evolve(inputs, iteration=iteration)).item() for iteration in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert abs(values[0] + entropy_of_all_rows(inputs.attention, 1)) > 1e-3


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
