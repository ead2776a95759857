"""Attention that a model computes itself, without `scaled_dot_product_attention`: recorded or refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.backends import network
from torch import nn

from spdfq.attention import ATTENTION_OUTPUTS, CLASS_ATTENTION, record_attention
from spdfq.errors import ModelError

BOTH = frozenset({CLASS_ATTENTION, ATTENTION_OUTPUTS})
TOKENS, DIM, HEADS = 16, 8, 2


def images(count=2, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Attention written in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv, self.proj, self.drop = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Dropout(0.5)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.how == "tapped":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = getattr(self, self.how)(q * (DIM // HEADS) ** -0.5 @ k.mT, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def explicit(self, scores, v):
        return self.drop(scores.softmax(dim=-1)) @ v

    def functional(self, scores, v):
        return torch.matmul(F.softmax(scores, 3), v)

    def mixed(self, scores, v):  # as ConViT's gate: no softmax is what is multiplied
        return (0.5 * scores.softmax(-1) + 0.5 * (2 * scores).softmax(-1)) @ v

    def over_queries(self, scores, v):
        return scores.softmax(-2) @ v

    def unnormalised(self, scores, v):
        return scores.relu() @ v


class Model(nn.Module):
    """A class token and 4x4 patches, two blocks."""

    def __init__(self, *ways):
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 8, 8)
        self.patch_embed = SimpleNamespace(grid_size=(4, 4))
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Attention(how) for how in ways)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block(x)
        return x[:, 0]


def model(*ways):
    """The same weights for all ways, with attention that is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Model(*ways).eval()
        with torch.no_grad():
            for block in made.blocks:
                block.qkv.weight.mul_(4)
    return made


def recorded(made, needs=BOTH, pixels=None, **options):
    with record_attention(made, needs, **options) as record:
        made(images() if pixels is None else pixels)
    return record


@pytest.mark.parametrize("way", ["explicit", "functional"])
def test_what_a_model_computes_by_itself_is_recorded_as_if_it_were_intercepted(way):
    tapped, own = recorded(model("tapped", "tapped")), recorded(model(way, way))
    assert (own.names, own.grids, own.prefix) == (["blocks.0", "blocks.1"], [(4, 4)] * 2, 1)
    for name in ("class_attention", "attention_outputs"):
        for ours, theirs in zip(getattr(own, name), getattr(tapped, name), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert tapped.class_attention[0].std() > 0.02


def test_both_ways_in_one_model_are_recorded_in_the_order_they_run():
    mixed, tapped = recorded(model("explicit", "tapped", "explicit")), recorded(model(*["tapped"] * 3))
    assert mixed.names == ["blocks.0", "blocks.1", "blocks.2"]
    for ours, theirs in zip(mixed.class_attention, tapped.class_attention, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_an_own_row_is_that_of_the_intercepted_one():
    gradients = []
    for way in ("tapped", "explicit"):
        pixels = images().requires_grad_()
        row = recorded(model(way, way), {CLASS_ATTENTION}, pixels).class_attention[1]
        gradients += torch.autograd.grad((row * torch.arange(TOKENS)).sum(), pixels)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)
    assert gradients[0].abs().max() > 1e-3


def test_only_what_is_asked_for_is_kept_and_only_of_the_first_images():
    rows = recorded(model("explicit"), {CLASS_ATTENTION}, rows=1)
    assert rows.attention_outputs == []
    assert rows.class_attention[0].shape == (1, HEADS, TOKENS)
    outputs = recorded(model("explicit"), {ATTENTION_OUTPUTS}, rows=1)
    assert outputs.class_attention == []
    assert outputs.attention_outputs[0].shape == (1, HEADS, TOKENS + 1, DIM // HEADS)


@torch.no_grad()
def test_swin_v2_is_recorded_window_by_window():
    swin, softmaxes, merged, hooks = network("swinv2"), [], [], []
    for name, module in swin.named_modules():
        if name.endswith("attn.attn_drop"):
            hooks.append(module.register_forward_hook(lambda m, inputs, _: softmaxes.append(inputs[0])))
        if name.endswith("attn.proj"):
            hooks.append(module.register_forward_hook(lambda m, inputs, _: merged.append(inputs[0])))
    logits = swin(images())
    for hook in hooks:
        hook.remove()
    with record_attention(swin, BOTH) as record:
        assert torch.equal(swin(images()), logits)
    assert record.names == [f"layers.{layer}.blocks.{block}.attn" for layer in (0, 1) for block in (0, 1)]
    assert record.grids == [(4, 4)] * 4
    assert [bool((p == 0).any()) for p in softmaxes] == [False, True, False, False]  # shifted windows, masked
    for row, softmax in zip(record.class_attention, softmaxes, strict=True):
        torch.testing.assert_close(row, softmax.sum(-2) / 16)
    for output, entered in zip(record.attention_outputs, merged, strict=True):
        assert torch.equal(output.transpose(1, 2).flatten(2), entered)


# refusals

SOFTMAX = "computes a softmax of its own, not over the keys of a known window or patch grid; it cannot be recorded"


def refused(made, pixels=None):
    with pytest.raises(ModelError) as caught:
        recorded(made, {CLASS_ATTENTION}, pixels)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("leave out the losses that need it")
    return str(caught.value)


@pytest.mark.parametrize("way", ["mixed", "over_queries"])
def test_a_softmax_that_is_not_attention_over_keys_is_refused_with_its_module(way):
    assert refused(model("explicit", way)).startswith(f"blocks.1: {SOFTMAX}")


def test_own_attention_over_tokens_without_a_stated_grid_is_refused():
    made = model("explicit")
    del made.patch_embed
    assert refused(made).startswith(f"blocks.0: {SOFTMAX}")
    made.patch_embed = SimpleNamespace(grid_size=(2, 4))
    assert refused(made).startswith(f"blocks.0: {SOFTMAX}")


def test_products_without_a_softmax_are_refused_with_their_module():
    message = "blocks.0: no attention went through scaled_dot_product_attention or a softmax over tokens; "
    assert refused(model("unnormalised", "unnormalised")).startswith(message)


def test_volo_is_refused_for_its_outlook_attention_and_not_for_the_token_layout_after_it():
    from timm.models.volo import VOLO

    volo = VOLO(
        layers=(1, 1, 1, 1),
        img_size=32,
        embed_dims=(16, 32, 32, 32),
        num_heads=(2, 2, 2, 2),
        stem_hidden_dim=8,
    ).eval()
    assert refused(volo).startswith(f"network.0.0.attn: {SOFTMAX}")


def test_an_unmatched_softmax_of_one_pass_does_not_affect_the_next():
    made = model("explicit")
    with record_attention(made) as record:
        made.blocks[0].how = "mixed"
        with pytest.raises(ModelError, match="softmax of its own"):
            made(images())
        made.blocks[0].how = "explicit"
        made(images())
        assert record.names == ["blocks.0"]
