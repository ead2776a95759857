"""Where quantizers are placed, how they are calibrated, and that nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.backends import (
    EXPLICIT,
    FUSED,
    RUNTIME,
    back_end,
    bits,
    images,
    network,
    quantized,
    teacher,
    teacher_of,
)
from support.products import Small
from torch import nn

from spdfq.backends import quantize
from spdfq.quantized import QuantizedModel
from spdfq.quantized.visiting import find_sites

EVERY = [*FUSED, *EXPLICIT]
QUERY_KEY_VALUE_SOFTMAX = ["query", "key", "softmax", "value"]


class Unusual(nn.Module):
    """Products that have no quantizer: by a bare parameter, of three operands, and by a computed weight."""

    def __init__(self):
        super().__init__()
        self.mix, self.linear = nn.Parameter(torch.eye(8)), nn.Linear(8, 8)

    def forward(self, x):
        y = x @ self.mix
        z = torch.einsum("bni,ij,bmj->bnm", y, self.mix, y)
        return F.linear(torch.einsum("bnm,bmi->bni", z, y), self.linear.weight * 2)


class Tied(nn.Module):
    """One layer used twice, and a layer that shares another's weight."""

    def __init__(self):
        super().__init__()
        self.twice, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.twice(self.twice(x))))


def modules_of(model, *classes):
    return {name for name, module in model.named_modules() if isinstance(module, classes)}


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]


def flags_of(model):
    return [(module.training, getattr(module, "fused_attn", None)) for module in model.modules()]


def modes_active():
    return torch._C._len_torch_function_stack()


# placement


@pytest.mark.parametrize("name", EVERY)
def test_without_quantizers_the_logits_are_the_plain_networks(name):
    module = network(name)
    sites, leftovers = find_sites(module, images(1))
    with torch.no_grad():
        expected, found = module(images()), QuantizedModel(module, sites, {}, leftovers)(images())
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not leftovers


def test_the_sites_of_a_vit_of_one_block_are_these():
    sites, leftovers = find_sites(network("vit", depth=1), images(1))
    assert [(site.name, site.kind, site.shape) for site in sites.values()] == [
        ("patch_embed.proj.input", "input", (1, 3, 32, 32)),
        ("patch_embed.proj.weight", "weight", (32, 3, 8, 8)),
        ("blocks.0.attn.qkv.input", "input", (1, 17, 32)),
        ("blocks.0.attn.qkv.weight", "weight", (96, 32)),
        ("blocks.0.attn.query", "query", (1, 2, 17, 16)),
        ("blocks.0.attn.key", "key", (1, 2, 17, 16)),
        ("blocks.0.attn.value", "value", (1, 2, 17, 16)),
        ("blocks.0.attn.softmax", "softmax", (1, 2, 17, 17)),
        ("blocks.0.attn.proj.input", "input", (1, 17, 32)),
        ("blocks.0.attn.proj.weight", "weight", (32, 32)),
        ("blocks.0.mlp.fc1.input", "input", (1, 17, 32)),
        ("blocks.0.mlp.fc1.weight", "weight", (128, 32)),
        ("blocks.0.mlp.fc2.input", "input", (1, 17, 128)),
        ("blocks.0.mlp.fc2.weight", "weight", (32, 128)),
        ("head.input", "input", (1, 32)),
        ("head.weight", "weight", (10, 32)),
    ]
    assert leftovers == {}


@pytest.mark.parametrize("name", EVERY)
def test_every_linear_and_convolution_has_an_input_and_a_weight_site(name):
    module = network(name)
    sites, _ = find_sites(module, images(1))
    for layer in modules_of(module, nn.Linear, nn.Conv2d):
        assert sites[f"{layer}.weight"].shape == tuple(module.get_submodule(layer).weight.shape)
        assert sites[f"{layer}.weight"].kind == "weight"
        assert sites[f"{layer}.input"].kind == "input"


@pytest.mark.parametrize("name", FUSED)
def test_every_attention_has_its_four_operands(name):
    module = network(name)
    sites, _ = find_sites(module, images(1))
    attentions = {layer.removesuffix(".qkv") for layer in modules_of(module, nn.Linear) if layer.endswith(".qkv")}
    attentions = attentions or {f"blocks.{index}.attn" for index in range(2)}
    assert len(attentions) >= 2
    for attention in attentions:
        assert [sites[f"{attention}.{kind}"].kind for kind in QUERY_KEY_VALUE_SOFTMAX] == QUERY_KEY_VALUE_SOFTMAX


def test_explicit_products_are_sites_and_softmax_outputs_are_known():
    swin, _ = find_sites(network("swinv2"), images(1))
    kinds = [swin[f"layers.0.blocks.1.attn.product{leaf}"].kind for leaf in ("0_left", "0_right", "1_left", "1_right")]
    assert kinds == ["product", "product", "softmax", "product"]
    cait, _ = find_sites(network("cait"), images(1))
    # talking heads mix the probabilities before the product, so they are none any more
    kinds = [cait[f"blocks.0.attn.product{leaf}"].kind for leaf in ("0_left", "0_right", "1_left", "1_right")]
    assert kinds == ["product", "product", "product", "product"]
    assert cait["blocks_token_only.1.attn.softmax"].kind == "softmax"


@pytest.mark.parametrize("name", EVERY)
def test_every_quantizer_works_in_a_forward_pass(name):
    model = quantized(name, *bits(8), count=2)
    used = set()
    for site, quantizer in model.quantizers.items():
        quantizer.register_forward_hook(lambda *_, site=site: used.add(site))
    with torch.no_grad():
        model(images(1))
    assert used == set(model.sites)


def test_a_module_without_children_that_multiplies_itself_is_quantized_under_its_name():
    model = quantized(teacher_of(Small()))
    used = set()
    for site, quantizer in model.quantizers.items():
        quantizer.register_forward_hook(lambda *_, site=site: used.add(site))
    model(images(1))
    own = {f"attention.{leaf}" for leaf in ("qkv", "qkv_input", "product0_left", "product0_right", "product1_left")}
    assert own | {"attention.product1_right"} == {name for name in used if name.startswith("attention.")}
    assert model.sites["attention.product1_left"].kind == "softmax"


def test_a_second_attention_of_one_module_has_sites_of_its_own():
    class Twice(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, x, x), 2 * x, x) @ x.mT @ x

    model = quantized(teacher_of(Small(Twice)))
    own = [name.removeprefix("body.") for name in model.quantizers if name.startswith("body.")]
    first, leaves = ["query", "key", "value", "softmax"], ["2_left", "2_right", "3_left", "3_right"]
    assert own == [*first, *(f"{kind}1" for kind in first), *(f"product{leaf}" for leaf in leaves)]
    ratio = model.quantizers["body.key1"].scale / model.quantizers["body.key"].scale
    torch.testing.assert_close(ratio, torch.tensor(2.0))


def test_every_leftover_product_is_listed_beside_every_parameter():
    model = quantized(teacher_of(Small(Unusual)))
    table = model.site_table()
    rows = {row["name"]: (row["what"], row["parameters"]) for row in table["float"]}
    assert rows == {
        "body.matmul": ("matmul, not quantized", 0),
        "body.einsum1": ("einsum, not quantized", 0),
        "body.linear2": ("linear, not quantized", 0),
        "body.mix": ("parameter of Unusual", 64),
        "body.linear.weight": ("parameter of Linear", 64),
        "body.linear.bias": ("parameter of Linear", 8),
        "patch.bias": ("parameter of Conv2d", 8),
        "head.bias": ("parameter of Linear", 10),
    }
    quantized_sites = {row["name"] for row in table["quantized"]}
    assert {"body.product0_left", "body.product0_right"} <= quantized_sites


@pytest.mark.parametrize("name", EVERY)
def test_the_site_table_lists_every_parameter_once_and_every_site(name):
    model = quantized(name, "quantization.overrides=[{sites=['*.weight', '*.fc1.input'], bits=0}]", count=1)
    table = model.site_table()
    listed = [row["name"] for row in table["quantized"] + table["float"]]
    assert len(listed) == len(set(listed))
    parameters = {name: parameter.numel() for name, parameter in model.network.named_parameters()}
    assert set(listed) == set(parameters) | set(model.sites)
    assert {row["name"]: row["parameters"] for row in table["float"] if row["name"] in parameters} == parameters


def test_a_row_of_the_site_table_says_how_a_site_is_quantized():
    model = quantized("vit", "quantization.overrides=[{sites=['head.*'], bits=8}]", count=1)
    rows = {row["name"]: row for row in model.site_table()["quantized"]}
    assert rows["head.weight"] == {
        **{"name": "head.weight", "kind": "weight", "quantizer": "uniform", "bits": 8},
        **{"granularity": "channel", "shape": [10, 32]},
    }
    assert rows["blocks.1.attn.softmax"] == {
        **{"name": "blocks.1.attn.softmax", "kind": "softmax", "quantizer": "log2", "bits": 4},
        **{"granularity": "tensor", "shape": [1, 2, 17, 17]},
    }


def test_shared_modules_and_shared_weights_have_one_quantizer():
    model = quantized(teacher_of(Small(Tied)))
    own = [name for name in model.quantizers if name.startswith("body.")]
    assert own == ["body.twice.input", "body.twice.weight", "body.first.input", "body.first.weight"]
    calls = []
    model.quantizers["body.first.weight"].register_forward_hook(lambda *_: calls.append(1))
    model(images(1))
    assert len(calls) == 1  # for both layers
    assert model.network.body.second.weight is model.network.body.first.weight


def test_the_quantized_forward_is_the_closed_form():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    model = quantized(teacher_of(module), "quantization.weights={type='uniform', bits=4, symmetric=true}")
    x, weight = images(), module[1].weight.detach()
    step = weight.abs().max() / 7
    input_step = (x.max() - x.min()) / 15
    zero = (-x.min() / input_step).round()
    rounded = ((x.flatten(1) / input_step).round() + zero).clamp(0, 15).sub(zero) * input_step
    expected = rounded @ ((weight / step).round().clamp(-8, 7) * step).T + module[1].bias
    torch.testing.assert_close(model(x), expected)


def test_masked_attention_stays_zero():
    model = quantized("swin")
    seen = {}
    quantizer = model.quantizers["layers.0.blocks.1.attn.softmax"]
    quantizer.register_forward_hook(lambda _, given, got: seen.update(before=given[0], after=got))
    model(images(1))
    masked = seen["before"] < 1e-30
    assert masked.any()
    assert (seen["after"][masked] == 0).all()
    assert (seen["after"][~masked] > 0).any()


def test_more_bits_come_closer_to_the_teacher():
    chosen, uniform = teacher("vit"), "quantization.softmax={type='uniform', bits=4}"
    with torch.no_grad():
        plain = chosen.module(images())
        error = {n: (quantized(chosen, uniform, *bits(n))(images()) - plain).norm() / plain.norm() for n in (2, 4, 8)}
    assert error[8] < 0.05 < error[4] < error[2]


# the teacher, and hooks that must be gone


@pytest.mark.parametrize("name", ["vit", "swin", "cait"])
def test_the_teacher_is_untouched(name):
    chosen = teacher(name, drop_path_rate=0.3)
    chosen.module.train()
    chosen.module.norm.eval()
    state = {key: value.clone() for key, value in chosen.module.state_dict().items()}
    names, hooks, flags = list(chosen.module.state_dict()), hooks_of(chosen.module), flags_of(chosen.module)
    quantize(chosen, images(), back_end("quantization.steps=['calibrate',{type='blockwise', iterations=3}]"), RUNTIME)
    assert list(chosen.module.state_dict()) == names
    assert all(torch.equal(value, state[key]) for key, value in chosen.module.state_dict().items())
    assert (hooks_of(chosen.module), flags_of(chosen.module)) == (hooks, flags)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in chosen.module.parameters())


def test_no_hook_remains_after_a_forward_pass_and_after_one_that_raised():
    model = quantized("swin")
    hooks, flags, modes = hooks_of(model), flags_of(model), modes_active()
    expected = model(images())
    assert (hooks_of(model), flags_of(model), modes_active()) == (hooks, flags, modes)

    def fail(*_):
        raise RuntimeError("as planned")

    handle = model.network.layers[1].blocks[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="as planned"):
        model(images())
    handle.remove()
    with pytest.raises(AssertionError):
        model(torch.zeros(1, 3, 20, 20))
    assert (hooks_of(model), flags_of(model), modes_active()) == (hooks, flags, modes)
    assert torch.equal(model(images()), expected)


def test_a_deep_copy_works_and_is_its_own():
    model = quantized("vit")
    copied = copy.deepcopy(model)
    assert torch.equal(copied(images()), model(images()))
    before = model(images())
    with torch.no_grad():
        copied.quantizers["head.weight"].scale.mul_(3)
    assert not torch.equal(copied(images()), before)
    assert torch.equal(model(images()), before)


def test_training_mode_and_another_dtype_do_not_change_the_ranges_or_turn_on_stochastic_depth():
    model = quantized(teacher("vit", drop_path_rate=0.9))
    expected = model(images())
    assert not any(module.training for module in [model, *model.network.modules()] if module not in ranges(model))
    assert torch.equal(model.train()(images()), expected)
    assert not model.training
    scales = {name: quantizer.scale.clone() for name, quantizer in model.quantizers.items()}
    half = model.to(torch.bfloat16)
    assert half(images().bfloat16()).dtype == torch.bfloat16
    assert all(torch.equal(quantizer.scale, scales[name]) for name, quantizer in half.quantizers.items())
    assert half.to(torch.float32)(images()).isfinite().all()


def ranges(model):
    return set(model.quantizers.values())
