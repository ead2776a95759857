"""Recorded attention against unfused references."""

import pytest
import torch
import torch.nn.functional as F
from support.attention import BOTH, LARGE, NAMES, images_for
from support.backends import images as colour_images
from support.backends import quantized, teacher
from support.networks import ARCHITECTURES, build
from torch import nn

from spdfq.attention import (
    ATTENTION_OUTPUTS,
    CLASS_ATTENTION,
    QUERIES_AND_KEYS,
    AttentionRecord,
    operations,
    prefix_tokens,
    record_attention,
)
from spdfq.errors import ModelError

EVERYTHING = BOTH | {QUERIES_AND_KEYS}
PREFIX = {"vit": 1, "deit_distilled": 2, "dinov2_registers": 5, "beit": 1, "eva02": 1, "swin": 0}
GRIDS = {name: [(4, 4)] * 2 for name in ARCHITECTURES} | {"swin": [(4, 4)] * 4}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def unfused(model, images):
    """Softmax outputs and inputs of the projections, read by hooks from timm's explicit path."""
    probabilities, merged, hooks = [], [], []
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if name.endswith("attn.attn_drop"):
            hooks.append(module.register_forward_hook(lambda m, inputs, _: probabilities.append(inputs[0])))
        if name.endswith("attn.proj"):
            hooks.append(module.register_forward_hook(lambda m, inputs, _: merged.append(inputs[0])))
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return probabilities, merged, logits


def expected_rows(name, probabilities):
    if name == "swin":
        return [p.sum(-2) / p.shape[-2] for p in probabilities]
    return [p[:, :, 0, PREFIX[name] :] for p in probabilities]


def largest_gap(found, expected):
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))


# recorded values


@every_architecture
@pytest.mark.parametrize("fused_before", [True, False])
@torch.no_grad()
def test_recorded_rows_are_those_of_the_unfused_softmax(name, fused_before):
    model = build(name)
    images = images_for(model)
    probabilities, _, logits = unfused(model, images)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_before
    with record_attention(model) as record:
        recorded_logits = model(images)
    rows = expected_rows(name, probabilities)
    assert largest_gap(record.class_attention, rows) < 1e-5
    assert min(float(row.std()) for row in rows) > 1e-3, "a uniform reference would prove nothing"
    assert largest_gap([recorded_logits], [logits]) < 1e-4
    assert (record.names, record.grids, record.prefix) == (NAMES[name], GRIDS[name], PREFIX[name])
    assert record.attention_outputs == []


@every_architecture
@torch.no_grad()
def test_recorded_outputs_are_what_enters_the_projection(name):
    model = build(name)
    images = images_for(model)
    _, merged, _ = unfused(model, images)
    with record_attention(model, {ATTENTION_OUTPUTS}) as record:
        model(images)
    assert largest_gap([output.transpose(1, 2).flatten(2) for output in record.attention_outputs], merged) < 1e-4
    assert record.class_attention == []
    assert record.grids == GRIDS[name]


@every_architecture
@torch.no_grad()
def test_recorded_queries_and_keys_are_what_the_softmax_is_taken_of(name):
    model = build(name)
    images = images_for(model, 2)
    probabilities, _, _ = unfused(model, images)
    with record_attention(model, {QUERIES_AND_KEYS}) as record:
        model(images)
    assert len(record.queries) == len(record.keys) == len(probabilities)
    for query, key, expected in zip(record.queries, record.keys, probabilities, strict=True):
        scores = query.shape[-1] ** -0.5 * query @ key.mT
        assert scores.shape == expected.shape
        # log p = score + bias - a number of each row, and the bias is the same in both images
        first, second = (expected.log() - scores).chunk(2)
        gap = torch.where(expected.chunk(2)[0] > 1e-20, first - second, torch.nan)  # masked ones are rounded to little
        assert float((gap - gap.nanmean(-1, keepdim=True)).abs().nan_to_num().max()) < 1e-4
        assert float(scores.std()) > 0.01


@torch.no_grad()
def test_a_quantized_models_attention_is_recorded_as_it_is_multiplied():
    student = quantized("vit", count=2)
    expected = student(colour_images(2))
    with record_attention(student, {CLASS_ATTENTION, QUERIES_AND_KEYS}, rows=1) as record:
        logits = student(colour_images(2))
    assert torch.equal(logits, expected)
    assert record.names == ["network.blocks.0.attn", "network.blocks.1.attn"]
    assert (record.grids, record.prefix) == (GRIDS["vit"], 1)
    for block, (query, key, row) in enumerate(zip(record.queries, record.keys, record.class_attention, strict=True)):
        quantizer = student.quantizers[f"blocks.{block}.attn.query"]
        assert query.shape == (1, 2, 17, 16)
        assert torch.equal(quantizer(query), query), "already on the grid of its quantizer"
        scores = query[:, :, :1] @ key.mT / 4  # the square root of 16 channels
        assert largest_gap([scores.softmax(-1)[:, :, 0, 1:]], [row]) < 1e-6
    assert not torch.equal(student.quantizers["blocks.0.attn.query"](query * 1.01), query * 1.01)


def test_the_outputs_of_a_quantized_models_attention_are_refused_by_name():
    student = quantized("vit", count=2)
    with (
        record_attention(student, {ATTENTION_OUTPUTS}),
        pytest.raises(ModelError, match=r"network\.blocks\.0\.attn: the attention outputs of a quantized model"),
    ):
        student(colour_images(2))


def test_the_swin_reference_has_shifted_windows_with_masked_tokens():
    model = build("swin")
    probabilities, _, _ = unfused(model, images_for(model))
    assert [bool((p == 0).any()) for p in probabilities] == [False, True, False, False]


@every_architecture
def test_the_gradient_of_recorded_rows_is_that_of_the_reference(name):
    model = build(name)
    images = images_for(model).requires_grad_()

    def gradient(rows):
        loss = sum((row * torch.linspace(-1, 1, row.shape[-1])).sum() for row in rows)
        return torch.autograd.grad(loss, images)[0]

    expected = gradient(expected_rows(name, unfused(model, images)[0]))
    with record_attention(model) as record:
        model(images)
    found = gradient(record.class_attention)
    assert float(expected.abs().max()) > 1e-4
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@every_architecture
@torch.no_grad()
def test_only_the_first_images_are_recorded_when_rows_are_given(name):
    model = build(name)
    images = images_for(model, 5)
    with record_attention(model, EVERYTHING, rows=2) as record:
        model(images)
        some = [*record.class_attention, *record.attention_outputs, *record.queries, *record.keys]
    with record_attention(model, EVERYTHING) as record:
        model(images[:2])
    alone = [*record.class_attention, *record.attention_outputs, *record.queries, *record.keys]
    assert largest_gap(some, alone) < 1e-5


class Masked(nn.Module):
    """A class token, four patch tokens, and a different mask for each image."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        keep = tokens.new_ones(len(tokens), 1, 5, 5, dtype=torch.bool)
        for image in range(len(tokens)):
            keep[image, 0, 0, 1 + image] = False
        return F.scaled_dot_product_attention(tokens, tokens, tokens, keep)


@pytest.mark.parametrize("rows", [None, 2])
def test_a_mask_of_each_image_goes_with_its_row(rows):
    model, tokens = Masked(), torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    with record_attention(model, rows=rows) as record:
        model(tokens)
    (row,) = record.class_attention
    assert row.shape == (rows or 3, 2, 4)
    assert (row == 0).nonzero()[:, [0, 2]].tolist() == [[image, image] for image in range(len(row)) for _ in range(2)]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("learnable", [False, True])
def test_without_a_class_token_the_other_images_are_computed_as_the_reference_says(name, learnable):
    model = build(name, **LARGE[name]).requires_grad_(learnable)
    images = images_for(model, 5).requires_grad_()

    def results(probabilities, merged, logits):
        rows = [p[: len(p) // 5 * 2].mean(-2) for p in probabilities]
        loss = logits.square().sum() + sum((row * torch.linspace(-1, 1, row.shape[-1])).sum() for row in rows)
        outputs = [output[: len(output) // 5 * 2] for output in merged]
        return [logits, *rows, *outputs], torch.autograd.grad(loss, images)[0]

    probabilities, merged, logits = unfused(model, images)
    assert (name == "swin") == any(bool((p == 0).any()) for p in probabilities), "a mask of each window"
    expected, gradient = results(probabilities, merged, logits)
    with record_attention(model, BOTH, rows=2) as record:
        logits = model(images)
    rows, outputs = record.class_attention, [x.transpose(1, 2).flatten(2) for x in record.attention_outputs]
    loss = logits.square().sum() + sum((row * torch.linspace(-1, 1, row.shape[-1])).sum() for row in rows)
    assert largest_gap([logits, *rows, *outputs], expected) < 1e-4
    (found,) = torch.autograd.grad(loss, images)
    assert float((found - gradient).abs().max() / gradient.abs().max()) < 1e-4


def test_all_images_may_share_their_keys():
    class Shared(nn.Module):
        def forward(self, tokens):
            return F.scaled_dot_product_attention(tokens, tokens[:1], tokens[:1])

    tokens = torch.randn(3, 2, 81, 4, generator=torch.Generator().manual_seed(0))
    model = Shared()
    with record_attention(model, rows=2) as record:
        output = model(tokens)
    probabilities = (tokens @ tokens[:1].mT / 2).softmax(-1)
    assert largest_gap([output], [probabilities @ tokens[:1]]) < 1e-5
    assert largest_gap(record.class_attention, [probabilities[:2].mean(-2)]) < 1e-5


def test_a_quantized_model_has_no_probabilities_computed_for_images_that_are_not_recorded(monkeypatch):
    student, sizes = quantized(teacher("vit", class_token=False, global_pool="avg"), count=3), []
    with record_attention(student) as record:
        student(colour_images(3))
        expected = [row[:1] for row in record.class_attention]
    scores = operations.attention_scores
    monkeypatch.setattr(
        operations, "attention_scores", lambda query, *rest: sizes.append(len(query)) or scores(query, *rest)
    )
    with record_attention(student, rows=1) as record:
        student(colour_images(3))
    assert largest_gap(record.class_attention, expected) < 1e-6
    assert sizes == [1, 3] * 2, "what is recorded, and what is multiplied by the values"


@torch.no_grad()
def test_each_call_replaces_the_record():
    model = build("vit")
    with record_attention(model, EVERYTHING) as record:
        model(images_for(model, seed=1))
        model(images_for(model, seed=2))
        second = [*record.class_attention]
    assert {len(x) for x in (record.names, record.attention_outputs, record.queries, record.keys)} == {2}
    with record_attention(model) as record:
        model(x=images_for(model, seed=2))
    assert largest_gap(second, record.class_attention) == 0


@torch.no_grad()
def test_the_model_inside_a_wrapper_is_found():
    class Normalised(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images * 2)

    model = build("dinov2_registers")
    images = images_for(model)
    wrapper = Normalised(model)
    with record_attention(wrapper) as record:
        wrapper(images)
    with record_attention(model) as expected:
        model(images * 2)
    assert record.names == ["model.blocks.0.attn", "model.blocks.1.attn"]
    assert prefix_tokens(wrapper) == (5, True)
    assert largest_gap(record.class_attention, expected.class_attention) == 0


@torch.no_grad()
def test_without_a_class_token_register_tokens_are_left_out_on_both_sides():
    model = build("vit", class_token=False, reg_tokens=3, global_pool="avg")
    images = images_for(model)
    probabilities, _, _ = unfused(model, images)
    with record_attention(model) as record:
        model(images)
    assert prefix_tokens(model) == (3, False)
    assert largest_gap(record.class_attention, [p[:, :, 3:, 3:].mean(-2) for p in probabilities]) < 1e-5


@torch.no_grad()
def test_a_pooling_head_is_not_recorded():
    model = build("vit", class_token=False, global_pool="map")
    with record_attention(model, BOTH) as record:
        model(images_for(model))
    assert record.names == ["blocks.0.attn", "blocks.1.attn"]
    assert [row.shape for row in record.class_attention] == [(3, 2, 16)] * 2


@torch.no_grad()
def test_rows_stay_float32_under_autocast():
    model = build("vit")
    images = images_for(model)
    with record_attention(model, BOTH) as record, torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    assert {row.dtype for row in record.class_attention} == {torch.float32}
    assert {output.dtype for output in record.attention_outputs} == {torch.bfloat16}
    sums = torch.cat([row.sum(-1) for row in record.class_attention])
    assert bool((sums < 1).all())
    assert bool((sums > 0.5).all())


def test_a_nan_image_gives_nan_rows_and_not_an_error():
    model = build("vit")
    with record_attention(model) as record:
        model(torch.full((1, 3, 32, 32), float("nan")))
    assert record.class_attention[0].isnan().all()


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"enable_gqa": True}, {"scale": 0.1}, {"is_causal": True, "scale": 2.0}]
)
def test_every_option_of_a_intercepted_call_is_honoured(options):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Identity())

        def forward(self, x):
            x = self.part(x)
            key = x[:, :2] if "enable_gqa" in options else x
            return F.scaled_dot_product_attention(x, key, key + 1, **options)

    model, x = Caller(), torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    with record_attention(model, {ATTENTION_OUTPUTS}) as record:
        found = model(x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(record.attention_outputs[0], found)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_method_or_a_part_of_the_model_is_recorded_once_for_each_call(name):
    model = build(name)
    images = images_for(model)
    with record_attention(model) as record:
        model(images)
        whole = [row.clone() for row in record.class_attention]
        for call in (model.forward_features, model.forward_features, model, model.forward_features):
            call(images)
            assert record.names == NAMES[name]
            assert all(map(torch.equal, record.class_attention, whole))


def test_the_blocks_alone_are_recorded_once_for_each_call():
    model = build("vit")
    with record_attention(model) as record:
        for _ in range(2):
            model.blocks(torch.randn(3, 17, 32))
            assert record.names == NAMES["vit"]
        model.blocks[1](torch.randn(3, 17, 32))
        assert record.names == NAMES["vit"][1:]


def test_a_record_is_split_by_images_and_windows_stay_with_their_image():
    windows = torch.arange(6.0).reshape(6, 1, 1)  # two of each of three images
    record = AttentionRecord(names=["a", "b"], grids=[(1, 1)] * 2, prefix=1, has_class=True)
    record.class_attention, record.queries = [windows, windows[::2]], [windows]
    assert record.split([3]) == [record]
    first, second = record.split([1, 2])
    assert [entry.flatten().tolist() for entry in first.class_attention] == [[0, 1], [0]]
    assert [entry.flatten().tolist() for entry in second.class_attention] == [[2, 3, 4, 5], [2, 4]]
    assert second.queries[0].flatten().tolist() == [2, 3, 4, 5]
    assert (second.names, second.prefix, second.has_class, second.keys) == (["a", "b"], 1, True, [])
