"""Losses of attention's heads and entropy against numbers computed by hand, and the chunks that bound memory."""

import math

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import exactly, pictures, random, recorded
from support.memory import Largest
from torch.autograd import gradcheck

from spdfq.attention import QUERIES_AND_KEYS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses import (
    AttentionEntropyLoss,
    AttentionPriorLoss,
    HeadSimilarityLoss,
    LossInputs,
    PatchSimilarityEntropyLoss,
    chunks,
)
from spdfq.losses.functional import attention_entropy, head_similarity, head_ssim

C1, C2 = 0.01**2, 0.03**2
few = settings(deadline=None, max_examples=25)


# chunks


@few
@given(elements=st.integers(0, 10**6))
def test_chunks_keep_to_the_limit_and_have_at_least_one_row(elements):
    length = chunks.chunk_length(elements, torch.device("cpu"))
    assert length == 1 or length * elements <= 2**18 < (length + 1) * elements or not elements


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
    inputs = attrs.evolve(inputs, iterations=9)
    loss = AttentionEntropyLoss(rows=4)
    values = [loss(attrs.evolve(inputs, iteration=iteration)).item() for iteration in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert abs(values[0] + entropy_of_all_rows(inputs.attention, 1)) > 1e-3


def test_used_without_a_run_each_block_gets_its_own_prior_maps_and_the_same_when_asked_again():
    inputs = recorded("vit", pictures(), AttentionPriorLoss.needs)
    loss = AttentionPriorLoss()
    first, second = (loss.maps(inputs, block) for block in (0, 1))
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    again = recorded("vit", pictures(), AttentionPriorLoss.needs)
    assert torch.equal(loss.maps(again, 1), second)
