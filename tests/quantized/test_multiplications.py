"""The multiplications that the dispatcher sees, and the share of them that stays in float."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import back_end, images, network, quantized, teacher_of
from support.commands import spdfq
from support.multihead import multihead_network
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from spdfq.backends.quantize import check_quantization
from spdfq.errors import ModelError
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantized.multiplications import Multiplications, float_share
from spdfq.quantized.visiting import count_multiplications

TOKENS, WIDTH = 17, 32  # of the tiny ViT: 16 patches of 8x8 pixels and a class token; 2 heads, 2 blocks, MLP ratio 4


@torch.library.custom_op("spdfq_tests::attention", mutates_args=())
def opaque_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def custom_attention(query, key, value):
    return opaque_attention(query, key, value)


def aten_attention(query, key, value):
    folded = [tensor.flatten(0, 1) for tensor in (query, key, value)]
    scores = torch.ops.aten.bmm(folded[0], folded[1].mT) * query.shape[-1] ** -0.5
    return torch.ops.aten.bmm.default(scores.softmax(-1), folded[2]).unflatten(0, query.shape[:2])


def vecdot_attention(query, key, value):
    scores = torch.linalg.vecdot(query[..., :, None, :], key[..., None, :, :]) * query.shape[-1] ** -0.5
    return torch.linalg.vecdot(scores.softmax(-1)[..., None, :], value.mT[..., None, :, :])


def hidden_attention(query, key, value):
    with torch._C.DisableTorchFunction():
        return F.scaled_dot_product_attention(query, key, value)


def _scripted(query, key, value):
    return torch.matmul((torch.matmul(query, key.transpose(-1, -2)) * 0.25).softmax(-1), value)


def sums_of_products(query, key, value):
    scores = (query[..., :, None, :] * key[..., None, :, :]).sum(-1) * query.shape[-1] ** -0.5
    return (scores.softmax(-1)[..., :, :, None] * value[..., None, :, :]).sum(-2)


ATTENTION = {
    "aten": aten_attention,
    "vecdot": vecdot_attention,
    "hidden": hidden_attention,
    "flex": flex_attention,
    "sums": sums_of_products,
}


class Attention(nn.Module):
    """The attention of timm's ViT, with another function in place of scaled_dot_product_attention."""

    def __init__(self, old, function):
        super().__init__()
        self.qkv, self.proj, self.function = old.qkv, old.proj, function

    def forward(self, x, **_):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.function(query, key, value).transpose(1, 2).flatten(2))


def vit_with(function):
    module = network("vit")
    for block in module.blocks:
        block.attn = Attention(block.attn, function)
    return module


def test_the_count_of_a_vit_is_the_count_by_hand():
    block = TOKENS * WIDTH * WIDTH * (3 + 1 + 4 + 4) + 2 * TOKENS * TOKENS * WIDTH
    expected = 16 * (3 * 8 * 8) * WIDTH + 2 * block + WIDTH * 10
    products = count_multiplications(network("vit"), images(1))
    assert sum(product.count for product in products) == expected
    assert all(product.sites for product in products)
    assert quantized("vit").float_share().floating == 0


@pytest.mark.parametrize("name", ["torchvision", "clip", "encoder", "cross"])
def test_every_product_of_multi_head_attention_belongs_to_sites(name):
    assert all(product.sites for product in count_multiplications(multihead_network(name), images(1)))


@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention_that_no_site_accounts_for_is_counted_and_named(name):
    attention = 2 * 2 * TOKENS * TOKENS * WIDTH  # two products in each of two blocks
    model = quantized(teacher_of(vit_with(ATTENTION[name])))
    share = model.float_share()
    assert share.floating == attention
    assert share.percent == pytest.approx(100 * attention / share.total)
    assert sum(share.unseen.values()) == pytest.approx(share.percent)
    assert {site.rpartition(".")[0] for site in share.unseen} == {"blocks.0.attn", "blocks.1.attn"}
    listed = {row["name"] for row in model.site_table()["float"]}
    assert listed >= share.unseen.keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_function_is_counted_and_named():
    scripted = torch.jit.script(_scripted)
    share = quantized(teacher_of(vit_with(lambda *operands: scripted(*operands)))).float_share()
    assert share.floating == 2 * 2 * TOKENS * TOKENS * WIDTH
    assert {name.rpartition(".")[0] for name in share.unseen} == {"blocks.0.attn", "blocks.1.attn"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_model_that_cannot_be_copied_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"VisionTransformer: cannot be copied .* remove the attribute"):
        quantized(teacher_of(vit_with(torch.jit.script(_scripted))))


def test_a_custom_operator_cannot_be_counted_and_is_named():
    teacher = teacher_of(vit_with(custom_attention))
    model = quantized(teacher)
    names = [f"blocks.{block}.attn.spdfq_tests.attention" for block in range(2)]
    assert model.float_share().unseen == dict.fromkeys(names)
    assert check_quantization(teacher, back_end()) == [
        f"quantization: {', '.join(names)}: an operator that cannot be looked into; whatever it multiplies stays in "
        "float, so the model may not be W4A4 throughout"
    ]


def test_a_recurrent_layer_is_counted():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(96, 16, batch_first=True), nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.lstm(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])

    share = quantized(teacher_of(Recurrent().eval())).float_share()
    assert share.floating == 32 * 4 * 16 * (96 + 16)
    assert {name.partition(".")[0] for name in share.unseen} == {"lstm"}


def test_hidden_fast_paths_are_counted():
    """Under DisableTorchFunction a module takes its native path, one operator for the whole layer."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = multihead_network("encoder")

        def forward(self, x):
            with torch._C.DisableTorchFunction():
                return self.inner(x)

    seen = count_multiplications(multihead_network("encoder"), images(1))
    hidden = count_multiplications(Hidden().eval().requires_grad_(False), images(1))
    assert not any(product.sites for product in hidden)
    assert sum(product.count for product in hidden) == sum(product.count for product in seen)


def test_an_operand_in_float_makes_the_product_float():
    total = quantized("vit").float_share().total
    patches = 16 * (3 * 8 * 8) * WIDTH
    kept = quantized("vit", "quantization.overrides=[{sites=['patch_embed.*'], bits=0}]").float_share()
    assert (kept.floating, kept.unseen) == (patches, {})
    assert quantized("vit", "quantization.placement='weights_only'").float_share().floating == total
    softmax = 2 * TOKENS * TOKENS * WIDTH
    assert quantized("vit", "quantization.placement='psaq'").float_share().floating == softmax


def test_the_share_is_in_the_site_table_and_survives_the_checkpoint(tmp_path):
    teacher = teacher_of(vit_with(aten_attention))
    model = quantized(teacher)
    share = model.float_share()
    assert model.site_table()["multiplications"] == {
        "total": share.total,
        "float": share.floating,
        "percent_in_float": round(share.percent, 4),
    }
    save_quantized(model, tmp_path, teacher)
    assert load_quantized(tmp_path, vit_with(aten_attention)).float_share() == share


def test_more_than_one_percent_is_a_warning_that_names_the_largest():
    section = back_end()
    (warning,) = check_quantization(teacher_of(vit_with(hidden_attention)), section)
    assert warning.startswith("quantization: 6.")
    assert "% of the multiplications cannot be quantized and stay in float, so the model is not W4A4" in warning
    assert "blocks.0.attn._scaled_dot_product_flash_attention_for_cpu 3." in warning
    assert check_quantization(teacher_of(network("vit")), section) == []


def test_the_share_of_an_empty_list_is_zero_and_unknown_counts_have_no_percent():
    assert float_share([], lambda _: True).percent == 0
    products = [Multiplications("a", "mm", ("x", "y"), 90), Multiplications("b", "mm", (), 10)]
    share = float_share([*products, Multiplications("c", "op", (), None)], lambda site: site == "x")
    assert (share.total, share.floating, share.unseen) == (100, 100, {"b": 10.0, "c": None})
    assert float_share(products, lambda _: False).percent == 10


def test_the_command_shows_the_share(tmp_path):
    recipe = tmp_path / "hybrid.toml"
    recipe.write_text(
        'extends = ["images/spdfq", "backends/repq", "models/vit_fmnist"]\n'
        "[model]\nname = 'vit_tiny_r_s16_p8_224'\nnum_classes = 10\npretrained = false\nimg_size = 64\n"
        "[quantization]\noverrides = []\n"
    )
    lines = spdfq("check", str(recipe)).output.splitlines()
    assert lines[-1] == "ok"
    assert "of the multiplications have an operand in float" in lines[-2]
    assert any("patch_embed.backbone.conv.conv2d" in line for line in lines if line.startswith("warning: "))


def test_inference_mode_does_not_change_the_count():
    module, example = vit_with(aten_attention), images(1)
    expected = count_multiplications(module, example)
    with torch.inference_mode():
        assert count_multiplications(module, example) == expected
