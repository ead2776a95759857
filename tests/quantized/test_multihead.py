"""Models whose attention is `nn.MultiheadAttention`: all their products are quantized, calibrated and reconstructed."""

import pytest
import torch
from support.backends import images, quantized, teacher_of
from support.multihead import BLOCKS, multihead_network
from torch import nn

from spdfq.attention import record_attention
from spdfq.backends.blocks import block_calls, block_names
from spdfq.backends.propagation import Propagation
from spdfq.backends.wiring import wiring
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantized.visiting import find_sites, unchanged, visit_sites

NETWORKS = list(BLOCKS)
ATTENTION = {
    "torchvision": "encoder.layers.encoder_layer_0.self_attention",
    "clip": "resblocks.0.attn",
    "encoder": "encoder.layers.0.self_attn",
    "cross": "layers.0",
}
STEPS = {
    "minmax": [],
    "repq": ['"repq"'],
    "ridge": ['"ridge"'],
    "blockwise": ['{type="blockwise", iterations=3}'],
    "fisher": ['{type="adaround", iterations=3, fisher=true, drop=0.5}'],
    "output": ['{type="calibrate", judged_by="output"}'],
}


def quantized_network(name, *steps):
    listed = ", ".join(['"calibrate"', *steps])
    return quantized(teacher_of(multihead_network(name)), f"quantization.steps=[{listed}]")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_is_a_site_and_visiting_changes_nothing(name):
    module = multihead_network(name)
    sites, leftovers = find_sites(module, images(1))
    assert leftovers == {}
    attention = ATTENTION[name]
    leaves = {site.removeprefix(f"{attention}.") for site in sites if site.startswith(f"{attention}.")}
    inputs = {f"in_proj_input_rows{row}" for row in (0, 32, 64)} if name == "cross" else {"in_proj_input"}
    operands = {"in_proj_weight", "query", "key", "value", "softmax", "out_proj.input", "out_proj.weight"}
    assert leaves >= operands | inputs
    with torch.no_grad(), visit_sites(module, unchanged):
        torch.testing.assert_close(module(images()), multihead_network(name)(images()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", list(STEPS))
@pytest.mark.parametrize("name", NETWORKS)
def test_every_back_end_runs_and_the_checkpoint_gives_the_same_logits(name, steps, tmp_path):
    chosen = teacher_of(multihead_network(name))
    model = quantized_network(name, *STEPS[steps])
    logits = model(images())
    assert logits.isfinite().all()
    save_quantized(model, tmp_path, chosen)
    assert torch.equal(load_quantized(tmp_path, multihead_network(name))(images()), logits)


@pytest.mark.parametrize("name", ["torchvision", "clip", "encoder"])
def test_blocks_are_found_and_images_pass_through_them_alone(name):
    model, module = quantized_network(name), multihead_network(name)
    names = block_names(model)
    assert names == BLOCKS[name]
    calls = block_calls(module, names, images(1))
    assert [list(call.streams.values()) for call in calls] == [[1 if name == "clip" else 0]] * 2
    through = Propagation(module, images(5), 2)
    seen = []
    handle = module.get_submodule(names[1]).register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        module(images(5))
    handle.remove()
    for call in calls:
        hidden = through.through(call, through.inputs_of(call))
    expected = seen[0].transpose(0, 1) if name == "clip" else seen[0]
    torch.testing.assert_close(hidden[0], expected, atol=2e-5, rtol=1e-4)


def test_a_norm_before_the_attention_feeds_the_packed_projection():
    found = wiring(multihead_network("clip"), images(1))
    assert found.norms["resblocks.0.ln_1.weight"].layers == ["resblocks.0.attn.in_proj_weight"]
    projection = found.linears["resblocks.0.attn.in_proj_weight"]
    assert projection.bias(multihead_network("clip")) == "resblocks.0.attn.in_proj_bias"


def test_rows_of_a_weight_are_quantized_with_the_whole_weights_ranges():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 3072, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            x = x.flatten(1)
            return nn.functional.linear(x, self.weight[:10]) + nn.functional.linear(x.abs(), self.weight[10:])

    module = Halves()
    sites, leftovers = find_sites(module, images(1))
    assert (list(sites), leftovers) == (["input_rows0", "weight", "input_rows10"], {})
    model = quantized(teacher_of(module))
    used = model.quantizers["weight"](module.weight)
    first, second = (model.quantizers[f"input_rows{row}"] for row in (0, 10))
    pixels = images().flatten(1)
    expected = first(pixels) @ used[:10].T + second(pixels.abs()) @ used[10:].T
    torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-5)


def test_other_views_of_a_weight_are_listed_as_float():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3072, 10))

        def forward(self, x):
            return nn.functional.linear(x.flatten(1), self.weight.T)

    assert find_sites(Transposed(), images(1)) == ({}, {"linear": "linear"})


def test_returned_attention_weights_are_the_quantized_ones():
    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(96, 2, batch_first=True)

        def forward(self, x):
            tokens = x.flatten(2).mT.unflatten(1, (-1, 32)).flatten(2)
            return self.attention(tokens, tokens, tokens, average_attn_weights=False)[1].flatten(1)[:, :10]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = quantized(teacher_of(Weighed().eval()))
    probabilities = model(images())
    softmax = model.quantizers["attention.softmax"]
    assert torch.equal(softmax(probabilities), probabilities)


def test_the_attention_of_a_quantized_model_is_recorded():
    model = quantized_network("torchvision")
    with record_attention(model) as record:
        logits = model(images())
    assert torch.equal(logits, model(images()))
    assert [row.shape for row in record.class_attention] == [(5, 2, 16)] * 2


def test_a_block_with_tokens_first_gets_a_contiguous_tensor_as_in_the_network():
    module = multihead_network("clip")
    seen = []
    module.resblocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    model = quantized(teacher_of(module), 'quantization.steps=["calibrate"]')
    call = block_calls(model.network, block_names(model), images(1))[0]
    seen.clear()
    hidden = torch.randn(5, 17, 32)
    assert call.run(model.network, (hidden,))[0].shape == hidden.shape
    assert seen == [True]


def test_operands_that_are_given_by_name_are_sites_too():
    class Named(nn.Module):
        def forward(self, x):
            tokens = x.flatten(2)
            weights = torch.softmax(input=torch.matmul(input=tokens, other=tokens.mT), dim=-1)
            return torch.matmul(input=weights, other=tokens).flatten(1)[:, :10]

    sites, leftovers = find_sites(Named(), images(1), frozenset({"scores"}))
    assert leftovers == {}
    assert set(sites) == {"product0_left", "product0_right", "scores", "product1_left", "product1_right"}
    assert sites["product1_left"].kind == "softmax"
