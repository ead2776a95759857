"""Families of timm and their quirks, tiny: the checks of tools/support_matrix.py, and what is refused by name."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support.backends import RUNTIME, bits, images, network, quantized, teacher_of
from torch import nn

from spdfq.attention import record_attention
from spdfq.errors import ModelError
from spdfq.quantized import QuantizedModel
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantized.visiting import find_sites
from spdfq.recipe import load_recipe
from spdfq.synth import loop
from spdfq.synth.group import Group
from spdfq.teacher import Teacher

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PYRAMID = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
# what a member is built with, and how many attentions are recorded (None: refused)
OWN = {
    "deit3": ("deit3_small_patch16_224", TINY, 2),
    "dinov2": ("vit_small_patch14_dinov2", TINY, 2),
    "siglip": ("vit_base_patch16_siglip_224", TINY, 2),
    "average_pooling": ("vit_base_patch16_siglip_gap_224", TINY, 2),
    "eva_separate": ("eva02_base_patch14_224", {**TINY, "qkv_fused": False}, 2),
    "swiglu": ("vit_giant_patch14_reg4_dinov2", TINY, 2),
    "pvt_v2": ("pvt_v2_b0", PYRAMID, 4),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, None),
}
SHARED = {"vit": 2, "deit_distilled": 2, "dinov2_registers": 2, "beit": 2, "eva02": 2, "swin": 4}
SHARED |= {"cait": None, "swinv2": 4}
EVERY = {**{name: made[2] for name, made in OWN.items()}, **SHARED}


def build(name):
    """The same weights each time, larger than at initialisation."""
    if name in SHARED:
        return network(name)
    entrypoint, arguments, _ = OWN[name]
    return perturbed(entrypoint, **arguments)


def perturbed(entrypoint, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(entrypoint, num_classes=10, **arguments).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def step(teacher, source):
    small = [f"synthesis.{key}" for key in ("images=2", "group=2", "iterations=1", "sampler={type='whole_image'}")]
    recipe = {"extends": ["models/vit_fmnist", f"images/{source}", "backends/blockwise"]}
    with teacher.frozen():
        group = Group(load_recipe(recipe, small).synthesis, teacher, RUNTIME, 0, 2)
        loop.step([group], 0)
    return dict(zip(group.columns, group.state.curve[0].tolist(), strict=True))


def record(model, *size):
    with torch.no_grad(), record_attention(model) as found:
        model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_the_product_mode_alone_leaves_the_logits(name):
    module = build(name)
    sites, leftovers = find_sites(module, images(1))
    with torch.no_grad():
        plain, found = module(images(2)), QuantizedModel(module, sites, {}, leftovers)(images(2))
    assert plain.std() > 1e-3
    assert leftovers == {}
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_eight_bits_come_close_and_reload_to_the_bit(name, tmp_path):
    teacher = teacher_of(build(name))
    model = quantized(teacher, *bits(8), "quantization.softmax={type='uniform', bits=8}", count=2)
    with torch.no_grad():
        plain, found = teacher.module(images(2)), model(images(2))
    assert 0 < (found - plain).norm() / plain.norm() < 0.2
    save_quantized(model, tmp_path, teacher)
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(load_quantized(tmp_path, other)(images(2)), found)


@pytest.mark.parametrize("name", EVERY)
def test_attention_is_recorded_whole_or_refused_by_name(name):
    module = build(name)
    if EVERY[name] is None:
        with pytest.raises(ModelError, match=r"^blocks\.0\.attn: .* leave out the losses that"):
            record(module, 32, 32)
        return
    found = record(module, 32, 32)
    assert len(found.names) == EVERY[name]
    for grid, row in zip(found.grids, found.class_attention, strict=True):
        assert grid[0] * grid[1] == row.shape[-1]
        assert row.isfinite().all()
        assert (row.sum(-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("name", EVERY)
def test_one_synthesis_step_has_a_finite_gradient(name):
    teacher = teacher_of(build(name))
    if name == "pvt_v2":  # at 32 pixels there is a single key, which gets all attention
        teacher.input_size = (3, 64, 64)
    losses = step(teacher, "cross_entropy" if EVERY[name] is None else "spdfq")
    assert all(torch.tensor(value).isfinite() for value in losses.values())
    assert losses["gradient"] > 0
    assert EVERY[name] is None or losses["attention_prior"] > 0


# quirks


def test_cait_is_not_recorded_in_part():
    """Its talking heads mix the softmax before the product; only the class-attention blocks could be recorded."""
    message = r"^blocks\.0\.attn: computes a softmax of its own, not over the keys of a known window or patch grid"
    with pytest.raises(ModelError, match=message):
        record(build("cait"), 32, 32)


def test_pooled_keys_have_the_pooled_grid():
    found = record(build("pvt_v2"), 64, 64)
    # strides 4, 8, 16 and 32, keys pooled by 8, 4, 2 and 1: every stage sees 2x2 keys
    assert found.grids == [(2, 2)] * 4
    assert [row.shape[-1] for row in found.class_attention] == [4] * 4
    assert all(torch.allclose(row.sum(-1), torch.ones(())) for row in found.class_attention)


def test_the_grid_of_pooled_keys_has_the_proportions_of_the_image():
    # 4 and 16 keys are square numbers, but of images four times as high as wide
    assert record(build("pvt_v2"), 128, 32).grids == [(4, 1)] * 4
    assert record(build("pvt_v2"), 256, 64).grids == [(8, 2)] * 4


class Latents(nn.Module):
    """Twelve queries over sixteen keys that are no image grid's."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Identity())

    def forward(self, pixels):
        x = self.part(pixels).flatten(1)[:, : 28 * 4].unflatten(1, (1, 28, 4))
        return F.scaled_dot_product_attention(x[:, :, :12], x[:, :, 12:], x[:, :, 12:])


def test_a_square_number_of_keys_is_no_grid_where_the_queries_have_none():
    with pytest.raises(ModelError, match=r"^Latents: attends over 16 keys, not over a square token grid"):
        record(Latents(), 32, 32)


def test_registers_and_both_tokens_of_a_distilled_deit_are_left_out_of_the_rows():
    for name, prefix in (("dinov2_registers", 5), ("deit_distilled", 2)):
        found = record(build(name), 32, 32)
        assert found.prefix == prefix
        assert [row.shape for row in found.class_attention] == [(2, 2, 16)] * 2


def test_both_heads_of_a_distilled_deit_are_quantized():
    sites, _ = find_sites(build("deit_distilled"), images(1))
    assert {"head.weight", "head.input", "head_dist.weight", "head_dist.input"} <= set(sites)


def test_an_attention_pooling_head_is_quantized_but_no_block():
    module = build("siglip")
    sites, _ = find_sites(module, images(1))
    assert {"attn_pool.q.weight", "attn_pool.kv.weight", "attn_pool.query", "attn_pool.softmax"} <= set(sites)
    assert record(module, 32, 32).names == ["blocks.0.attn", "blocks.1.attn"]


def test_layer_scale_stays_in_float_and_is_listed():
    model = quantized(teacher_of(build("dinov2")), *bits(8), count=1)
    rows = {row["name"]: (row["what"], row["parameters"]) for row in model.site_table()["float"]}
    assert {rows[f"blocks.{block}.ls{part}.gamma"] for block in (0, 1) for part in (1, 2)} == {
        ("parameter of LayerScale", 32)
    }


def test_separate_projections_have_a_site_each():
    sites, _ = find_sites(build("eva_separate"), images(1))
    assert {f"blocks.0.attn.{part}_proj.weight" for part in "qkv"} <= set(sites)
    assert {"blocks.0.mlp.fc1_g.weight", "blocks.0.mlp.fc1_x.weight"} <= set(sites)


def test_rotary_embeddings_come_before_the_quantizers_of_query_and_key():
    module = build("eva02")
    seen = {}
    sites, leftovers = find_sites(module, images(1))
    model = QuantizedModel(module, sites, {}, leftovers)
    with torch.no_grad(), model.visiting(lambda name, kind, x: seen.setdefault(name, x)):
        model.network(images(1))
    projected = seen["blocks.0.attn.qkv.input"] @ module.blocks[0].attn.qkv.weight.T
    plain = projected[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2) if projected.shape[-1] == 96 else None
    assert plain is not None
    assert torch.allclose(seen["blocks.0.attn.key"][:, :, 0], plain[:, :, 0], atol=1e-5)  # the class token
    assert not torch.allclose(seen["blocks.0.attn.key"][:, :, 2:], plain[:, :, 2:], atol=1e-2)


@pytest.mark.parametrize("entrypoint", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_an_input_that_is_not_square_keeps_its_grid(entrypoint):
    if entrypoint.startswith("vit"):
        module, grids = perturbed(entrypoint, **{**TINY, "img_size": (32, 64)}), [(4, 8)] * 2
    else:
        options = {"window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "patch_size": 4}
        module, grids = perturbed(entrypoint, img_size=(32, 64), **options), [(4, 4)] * 4
    teacher = Teacher(module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, 32, 64))
    assert record(module, 32, 64).grids == grids
    assert step(teacher, "spdfq")["gradient"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_loaded_into_float32(dtype, tmp_path):
    from safetensors.torch import save_file

    from spdfq.recipe import ModelSpec
    from spdfq.teacher import load_teacher

    source = load_teacher(ModelSpec(name="bundled:vit_fmnist"))
    half = {name: tensor.to(dtype) for name, tensor in source.module.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    spec = ModelSpec(name="bundled:vit_fmnist", checkpoint=str(tmp_path / "half.safetensors"))
    loaded = load_teacher(spec).module.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in half.items())


def test_the_page_of_models_lists_the_members_that_are_measured():
    root = Path(__file__).parents[2]
    members = re.findall(
        r'_(?:plain|sized|any)\("(.+?)", "(\w+)"', (root / "tools/families.py").read_text(encoding="utf-8")
    )
    members += re.findall(r'Family\(\s*"(.+?)", "([\w/-]+)"', (root / "tools/families.py").read_text(encoding="utf-8"))
    rows = re.findall(
        r"^\| ([^|]+) \| `([\w/-]+)` \|", (root / "docs/models.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) >= 30
    assert sorted(rows) == sorted(members), "run: python tools/support_matrix.py"


def test_every_module_of_timm_with_attention_has_a_member_that_is_measured():
    root, folder = Path(__file__).parents[2], Path(timm.models.__file__).parent
    source = (root / "tools/families.py").read_text(encoding="utf-8")
    names = re.findall(r'"([a-z0-9_]+)"', source)
    measured = {timm.models.model_entrypoint(name).__module__ for name in names if timm.is_model(name)}
    attends = re.compile(r"class \w*(?:Attention|Attn)|scaled_dot_product_attention|softmax\(|EvaBlock|AttentionPool")
    found = {path.stem for path in folder.glob("[a-z]*.py") if attends.search(path.read_text(encoding="utf-8"))}
    missing = {stem for stem in found if timm.list_models(module=stem)} - {name.rpartition(".")[2] for name in measured}
    assert missing == set()
