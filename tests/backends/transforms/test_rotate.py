"""The step `rotate`: the network computes the same, its streams and heads are rotated, and what stays is reported."""

import pytest
import torch
import torchvision
from support.backends import FUSED, RUNTIME, back_end, images, quantized, teacher, teacher_of
from support.odd_networks import Encoder
from support.rotation import ROTATE, change, changed, notes, of_timm, perturbed, rotated
from torch import nn

from spdfq.backends import Rotate, quantize
from spdfq.backends.quantize import check_quantization
from spdfq.errors import ModelError, RecipeError, SpdfqError
from spdfq.quantized import place

# models that are rotated throughout

FULL = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean of tokens": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "norm after pooling": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "no bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "width without a Hadamard matrix": ("vit_tiny_patch16_224", {"embed_dim": 36}),
    "bias made of parameters": ("beit_base_patch16_224", {"init_values": 0.1}),
    "image of another size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "img_size": 64}),
}


@pytest.mark.parametrize(("name", "options"), FULL.values(), ids=FULL)
def test_a_plain_vit_is_rotated_throughout_and_computes_the_same(name, options):
    chosen = of_timm(name, **options)
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == []
    assert not any(isinstance(part, nn.LayerNorm) for part in model.network.modules())


def _torchvision():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


@pytest.mark.parametrize("build", [Encoder, _torchvision])
def test_torchs_own_attention_is_rotated(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = teacher_of(perturbed(build()))
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == []
    assert len(model.norms) == 5


def test_the_norms_have_no_parameters_and_the_same_names():
    chosen = teacher("vit")
    model = rotated(chosen)
    assert model.norms == {
        f"{name}": (32, 1e-6)
        for name in ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")
    }
    for name in model.norms:
        norm = model.network.get_submodule(name)
        assert isinstance(norm, nn.RMSNorm)
        assert list(norm.parameters()) == []


@torch.no_grad()
def test_the_stream_is_that_of_the_teacher_centred_and_turned():
    chosen = teacher("vit")
    model = rotated(chosen, heads=False)
    streams = []
    for module in (chosen.module, model.network):
        handle = module.blocks[0].register_forward_hook(lambda *args: streams.append(args[-1].flatten(0, 1)))
        module(images(3))
        handle.remove()
    ours, theirs = streams[1], streams[0] - streams[0].mean(-1, keepdim=True)
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, atol=1e-3, rtol=1e-4)
    assert (ours - theirs).abs().max() > 0.1


def test_an_outlier_channel_is_spread():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.pos_embed[..., 5] += 100.0
    seen = []
    for module in (chosen.module, rotated(chosen).network):
        handle = module.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            module(images(3))
        handle.remove()
    before, after = (x.abs().amax((0, 1)) / x.square().mean((0, 1)).sqrt().mean() for x in seen)
    assert before.max() > 5
    assert after.max() < 3


# models that are rotated in part


def test_swin_keeps_the_streams_under_patch_merging():
    chosen = teacher("swin")
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert {name.partition(".blocks")[0] for name in model.norms} == {"layers.1", "norm"}
    assert {f"layers.{i}.blocks.{j}.attn.qkv.weight" for i in (0, 1) for j in (0, 1)} <= changed(model, chosen)
    assert notes(model) == [
        "the stream of patch_embed.norm, layers.0.blocks.0.norm1: not rotated, the output of a norm is normalised "
        "again",
        "the stream of layers.0.blocks.0.norm2, layers.0.blocks.1.norm1, layers.0.blocks.1.norm2: not rotated, the "
        "output of a norm is added",
        "the stream of layers.1.downsample.norm: not rotated, it is no sum of layers and parameters alone",
    ]


def test_repq_still_finds_swins_norms_after_it():
    steps = "quantization.steps=[{type='rotate'}, {type='calibrate', observer='minmax', weight_observer='minmax'}, "
    model = quantized("swin", steps + "{type='repq', observer='minmax', weight_observer='minmax'}]")
    assert [note for note in model.notes if note.startswith("repq")] == [
        "repq: patch_embed.norm does not change: its output also goes to layer_norm, add",
    ]
    assert "layers.1.downsample.reduction.bias" in model.biases


ROPE = (
    "queries and keys of blocks.0.attn, blocks.1.attn: not rotated, something (a rotary embedding, a norm) is between"
)
PARTLY = {
    "rotary embedding": ("vit_small_patch16_dinov3", {}, [f"{ROPE} a layer and the product"]),
    "norm of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}, [f"{ROPE} a layer and the product"]),
    "attention pooling": (
        "vit_base_patch16_siglip_224",
        {},
        ["the stream of attn_pool.norm: not rotated, head.weight takes it without a LayerNorm"],
    ),
    "norm before the blocks": (
        "vit_base_patch32_clip_224",
        {},
        [
            "the stream of norm_pre, blocks.0.norm1: not rotated, the output of a norm is normalised again",
            "the stream of blocks.0.norm2, blocks.1.norm1, blocks.1.norm2 and 1 more: not rotated, the output of a "
            "norm is added",
        ],
    ),
    "no head": (
        "vit_tiny_patch16_224",
        {"num_classes": 0},
        [
            "the stream of blocks.0.norm1, blocks.0.norm2, blocks.1.norm1 and 2 more: not rotated, it is what the "
            "network returns"
        ],
    ),
}


@pytest.mark.parametrize(("name", "options", "lines"), PARTLY.values(), ids=PARTLY)
def test_what_a_model_does_not_allow_stays_and_is_noted(name, options, lines):
    chosen = of_timm(name, **options)
    model = rotated(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == lines
    assert changed(model, chosen)


def test_swin_v2_computes_its_own_attention_and_normalises_afterwards():
    chosen = teacher("swinv2")
    model = rotated(chosen)
    assert changed(model, chosen) == set()
    assert notes(model)[0] == (
        "products of layers.0.blocks.0.attn, layers.0.blocks.1.attn, layers.1.blocks.0.attn and 1 more: not rotated, "
        "not computed by scaled_dot_product_attention"
    )
    assert notes(model)[1].endswith("the output of a norm is added")


@pytest.mark.parametrize("name", FUSED)
def test_every_kind_of_model_computes_the_same(name):
    chosen = teacher(name)
    assert change(rotated(chosen), chosen) < 1e-5


def test_a_change_of_the_output_is_an_error(monkeypatch):
    monkeypatch.setattr("spdfq.backends.transforms.float_changes._TOLERANCE", 0.0)
    with pytest.raises(ModelError, match=r"rotate: the float output changed by .* leave the step out"):
        rotated(teacher("vit"))


# options, order, notes


def test_the_seed_decides_and_options_switch_parts_off():
    chosen = teacher("vit")
    first, again, other = (rotated(chosen, seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    heads, stream = rotated(chosen, stream=False), rotated(chosen, heads=False)
    assert heads.norms == {}
    assert changed(heads, chosen) == {
        f"blocks.{b}.attn.{leaf}" for b in (0, 1) for leaf in ("qkv.weight", "qkv.bias", "proj.weight")
    }
    assert len(stream.norms) == 5
    assert changed(rotated(chosen, stream=False, heads=False), chosen) == set()


def test_it_must_come_before_ranges_are_chosen():
    steps = "quantization.steps=[{type='calibrate'}, {type='rotate'}]"
    spec = back_end(steps)
    with pytest.raises(SpdfqError, match=r"rotate: .* put it before 'calibrate'"):
        Rotate().check(place(teacher("vit"), spec), spec.steps[:1])
    with pytest.raises(SpdfqError, match=r"rotate: .* put it before 'calibrate'"):
        quantize(teacher("vit"), images(2), spec, RUNTIME)
    with pytest.raises(RecipeError, match=r"quantization.steps.1: rotate: .* put it before 'calibrate'"):
        check_quantization(teacher("vit"), spec)


def test_the_teacher_does_not_change():
    chosen = teacher("vit")
    before = chosen.fingerprint()
    quantized(chosen, ROTATE)
    assert chosen.fingerprint() == before
