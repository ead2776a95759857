"""Placements, the points between products that they quantize, and every quantizer at the sites that it fits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.backends import (
    CALIBRATE,
    EXPLICIT,
    FUSED,
    NO_OVERRIDES,
    RUNTIME,
    back_end,
    bits,
    images,
    network,
    quantized,
    teacher,
    teacher_of,
)
from support.registered import made
from torch import nn

from spdfq.backends import quantize
from spdfq.quantized import QuantizedModel, place
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantized.sites import OPERANDS, POINTS
from spdfq.quantized.visiting import find_sites, unchanged, visit_sites
from spdfq.quantizers import UniformQuantizer
from spdfq.recipe import load_recipe
from spdfq.registry import placements, registry

EVERY = [*FUSED, *EXPLICIT]
PSAQ = "quantization.placement='psaq'"


def tensors(kinds, sites):
    return [site.name for site in sites.values() if site.kind in kinds]


class Head(nn.Module):
    """A body between a patch embedding and a head; 32x32 images in four tokens of dimension 8."""

    def __init__(self, body):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch, self.body, self.head = nn.Conv2d(3, 8, 16, 16), body(), nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(self.body(self.patch(pixels).flatten(2).mT).mean(1))


def body_sites(body):
    sites, _ = find_sites(Head(body), images(1), POINTS)
    return [site.name.removeprefix("body.") for site in sites.values() if site.name.startswith("body.")]


# what each placement quantizes


def test_a_placement_is_a_table_of_kinds():
    tables = {name: made("placement", name).kinds for name in placements.names()}
    assert tables["matmul_inputs"] == set(OPERANDS)
    assert tables["weights_only"] == {"weight"}
    assert tables["psaq"] == (set(OPERANDS) | POINTS) - {"softmax"}
    assert all(kinds <= set(OPERANDS) | POINTS for kinds in tables.values())


def test_psaq_on_a_vit_of_one_block_quantizes_these_sites():
    model = place(teacher("vit", depth=1), back_end(PSAQ))
    assert list(model.quantizers) == [
        *("patch_embed.proj.input", "patch_embed.proj.weight"),
        *("blocks.0.norm1.layer_norm", "blocks.0.attn.qkv.weight"),
        *("blocks.0.attn.query", "blocks.0.attn.key", "blocks.0.attn.value", "blocks.0.attn.scores"),
        *("blocks.0.attn.proj.input", "blocks.0.attn.proj.weight", "blocks.0.branch", "blocks.0.residual"),
        *("blocks.0.norm2.layer_norm", "blocks.0.mlp.fc1.weight"),
        *("blocks.0.mlp.fc2.input", "blocks.0.mlp.fc2.weight", "blocks.0.branch1", "blocks.0.residual1"),
        *("norm.layer_norm", "head.weight", "logits"),
    ]
    table = model.site_table()
    assert {row["kind"] for row in table["quantized"] if row["name"] == "blocks.0.residual"} == {"residual"}
    left = {row["name"]: row["what"] for row in table["float"]}
    assert left["blocks.0.attn.softmax"] == "softmax of a product, left in float"


def test_a_point_that_an_override_leaves_out_is_listed_as_float():
    model = place(teacher("vit"), back_end(PSAQ, "quantization.overrides=[{sites=['*.residual*'], bits=0}]"))
    left = {row["name"]: row["what"] for row in model.site_table()["float"]}
    assert left["blocks.1.residual1"] == "residual, left in float"


@pytest.mark.parametrize("name", EVERY)
def test_psaq_works_at_every_site_whatever_the_batch(name):
    model = quantized(name, PSAQ, *bits(8), count=3)
    used = set()
    for site, quantizer in model.quantizers.items():
        quantizer.register_forward_hook(lambda *_, site=site: used.add(site))
    with torch.no_grad():
        error = (model(images(4)) - network(name)(images(4))).norm() / network(name)(images(4)).norm()
    assert used == set(model.quantizers)
    assert error < 0.3
    blocks = {site.rpartition(".residual")[0] for site in used if site.endswith(".residual")}
    assert len(blocks) >= 2
    assert {f"{block}.residual1" for block in blocks} <= used


@pytest.mark.parametrize("name", EVERY)
def test_watching_every_point_changes_no_logit(name):
    module = network(name)
    with torch.no_grad():
        expected = module(images())
        with visit_sites(module, unchanged, points=POINTS):
            found = module(images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_weights_only_leaves_every_activation_alone():
    chosen = teacher("vit")
    model = quantized(chosen, "quantization.placement='weights_only'")
    assert {model.sites[name].kind for name in model.quantizers} == {"weight"}
    expected = copy.deepcopy(chosen.module)
    with torch.no_grad():
        for name in model.weight_names():
            expected.get_parameter(name).copy_(model.quantizers[name](model.weight(name)))
        torch.testing.assert_close(model(images()), expected(images()), atol=1e-5, rtol=0)


def test_the_label_of_a_run_says_32_bits_where_activations_stay_in_float():
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"]}
    weights_only = load_recipe(recipe, ["quantization.placement='weights_only'"]).quantization
    assert weights_only.label == "W4A32"
    assert load_recipe(recipe, [PSAQ]).quantization.label == "W4A4"


# points


def test_the_quantized_forward_at_the_points_is_the_closed_form():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    plain = Head(Block).eval()
    override = "quantization.overrides=[{sites=['body.*'], bits=3}, {sites=['patch.*', 'head.*', 'logits'], bits=0}]"
    model = quantized(teacher_of(plain), PSAQ, override)
    assert set(model.quantizers) == {
        f"body.{leaf}" for leaf in ("norm.layer_norm", "linear.weight", "branch", "residual")
    }

    def rounded(x, low, high):
        step = (high - low) / 7
        zero = (-low / step).round()
        return ((x / step).round() + zero).clamp(0, 7).sub(zero) * step

    with torch.no_grad():
        x, block = plain.patch(images()).flatten(2).mT, plain.body
        ranges = [tensor.aminmax() for tensor in (block.norm(x), block.linear(block.norm(x)), block(x))]
        low, high = block.linear.weight.aminmax(dim=1, keepdim=True)
        assert (high < 0).any()  # a channel of one sign: its range is extended to zero
        weight = rounded(block.linear.weight, low.clamp(max=0), high.clamp(min=0))
        branch = rounded(rounded(block.norm(x), *ranges[0]) @ weight.T + block.linear.bias, *ranges[1])
        expected = plain.head(rounded(x + branch, *ranges[2]).mean(1))
        torch.testing.assert_close(model(images()), expected)


def test_sums_that_are_no_residual_ones_are_left_alone():
    # rotary embeddings add two turned halves, and the position is added to what no argument is
    for name in ("eva02", "vit"):
        sites, _ = find_sites(network(name), images(1), POINTS)
        residual = [f"blocks.{block}.{leaf}" for block in range(2) for leaf in ("residual", "residual1")]
        assert tensors({"residual"}, sites) == residual


def test_a_sum_with_a_skip_is_seen_in_each_of_its_forms():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.ones(1, 4, 8))

        def forward(self, x):
            x = torch.add(x, F.relu(x))  # a function
            y = x.reshape(-1, 2, 2, 8)
            y = 0.5 * y.flatten(1, 2) + x  # the skip comes second
            y += F.relu(y)  # in place
            x = y.view(-1, 4, 8) + self.position  # reshaped in between, and of one image
            return (x.mean(1, keepdim=True) + 1 + x.relu() * 2).relu()  # no skip in either

    leaves = [*("branch", "residual", "branch1", "residual1", "branch2", "residual2", "branch3", "residual3")]
    assert body_sites(Sums) == leaves
    chosen = teacher_of(Head(Sums).eval())
    model = quantized(chosen, PSAQ, *bits(8))
    with torch.no_grad():
        error = (model(images()) - chosen.module(images())).abs().max() / chosen.module(images()).abs().max()
    assert 0 < error < 0.05


def test_a_tensor_that_a_point_saw_is_not_visited_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.post, self.linear = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            moved = torch.roll(self.norm(x), 1, 1).reshape(-1, 8)
            x = x + self.post(self.linear(moved).view(-1, 4, 8))  # the branch is a LayerNorm's output
            return self.linear(x[:, 1:3])  # a part of a residual sum

    assert body_sites(Twice) == ["norm.layer_norm", "linear.weight", "post.layer_norm", "residual"]


def test_scores_are_seen_before_masks():
    model = quantized("swin", PSAQ)
    seen = {}
    quantizer = model.quantizers["layers.0.blocks.1.attn.scores"]
    quantizer.register_forward_hook(lambda _, given, __: seen.update(scores=given[0]))
    model(images(1))
    assert seen["scores"].dtype == torch.float32
    assert seen["scores"].abs().max() < 90  # the mask between windows is -100


def test_points_work_when_a_block_is_called_alone():
    chosen = teacher("swin")
    steps = "quantization.steps=['calibrate', {type='blockwise', iterations=2}]"
    model = copy.deepcopy(quantize(chosen, images(), back_end(PSAQ, steps), RUNTIME))  # has no quantized weights yet
    block, used = model.network.layers[1].blocks[0], set()
    for site, quantizer in model.quantizers.items():
        quantizer.register_forward_hook(lambda *_, site=site: used.add(site))
    with torch.no_grad(), model.quantizing():
        block(torch.randn(1, 4, 4, 32, generator=torch.Generator().manual_seed(0)))
    assert used == {name for name in model.quantizers if name.startswith("layers.1.blocks.0.")}
    assert len(tensors({"residual", "branch"}, {name: model.sites[name] for name in used})) == 4


def test_no_hook_remains_when_the_network_raises():
    module = Head(nn.Identity)
    with pytest.raises(RuntimeError), visit_sites(module, unchanged, points=POINTS):
        module(torch.zeros(1, 5, 32, 32))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_a_checkpoint_with_points_reloads_bit_for_bit(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen, PSAQ)
    save_quantized(model, tmp_path, chosen)
    again = load_quantized(tmp_path, network("vit"))
    assert torch.equal(again(images()), model(images()))
    assert again.site_table() == model.site_table()


# every registered quantizer at the sites that it fits, and its checkpoint


STANDING = [
    *(("softmax", f"{{type='{name}', bits=5}}") for name in registry("quantizer").names()),
    *(
        (slot, f"{{type='{name}', bits=5}}")
        for slot in ("weights", "activations", "gelu")
        for name in registry("quantizer").names()
        if registry("quantizer").get(name)().signed
    ),
    ("gelu", "{type='twin_uniform', bits=5, split='sign'}"),
    ("gelu", "{type='adaptive_log', bits=5, shift=0.17}"),
    ("weights", "{type='dual_uniform', bits=5, granularity='channel', symmetric=true}"),
]


@pytest.mark.parametrize(("slot", "table"), STANDING)
def test_every_quantizer_reloads_to_the_bit_from_a_checkpoint(slot, table, tmp_path):
    chosen = teacher("vit", depth=1)
    model = quantized(chosen, f"quantization.{slot}={table}", count=2)
    save_quantized(model, tmp_path, chosen)
    again = load_quantized(tmp_path, network("vit", depth=1))
    assert torch.equal(again(images(3)), model(images(3)))


# judging ranges by the output


def test_ranges_judged_by_the_output_leave_a_smaller_output_error():
    chosen = teacher("vit")
    grid = "{type='grid_mse', steps=12}"
    spec = f"[{{type='calibrate', observer={grid}, weight_observer={grid}, judged_by='%s', judged_images=8}}]"
    sites = ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.input", "blocks.1.attn.key", "blocks.1.attn.softmax"]
    found = {how: quantized(chosen, f"quantization.steps={spec % how}", *bits(3)) for how in ("values", "output")}
    assert all(quantizer.frozen for model in found.values() for quantizer in model.quantizers.values())
    errors = {how: [output_error(chosen.module, model, site) for site in sites] for how, model in found.items()}
    assert all(ours <= theirs * 1.0001 for ours, theirs in zip(errors["output"], errors["values"], strict=True))
    assert errors["output"] != errors["values"]


def output_error(module, model, site):
    """The mean squared error of the product that one site goes into, with only that site quantized."""
    seen = {}

    def on_product(name, product):
        if name == site:
            seen["error"] = product.error(model.quantizers[site](product.operand), None)

    with torch.no_grad(), visit_sites(module, unchanged, on_product=on_product):
        module(images())
    return float(seen["error"])


def test_what_goes_into_no_product_is_judged_by_its_values():
    grid = "{type='grid_mse', steps=3}"
    steps = f"quantization.steps=[{{type='calibrate', observer={grid}, weight_observer={grid}, judged_by='output'}}]"
    by_output, by_values = quantized("vit", PSAQ, steps), quantized("vit", PSAQ, steps.replace("output", "values"))
    for name, quantizer in by_output.quantizers.items():
        if by_output.sites[name].kind in POINTS:
            assert torch.equal(quantizer.scale, by_values.quantizers[name].scale), name


def test_the_average_of_batches_takes_the_batches_of_the_pass():
    chosen = teacher("vit")
    steps = f"{CALIBRATE.removesuffix('}]')}, batch=2}}]".replace("'minmax', w", "'running_minmax', w")
    model = quantized(chosen, steps, count=4)
    (low, high), (next_low, next_high) = (part.aminmax() for part in images(4).split(2))
    expected = (0.9 * high + 0.1 * next_high - 0.9 * low - 0.1 * next_low) / 15
    torch.testing.assert_close(model.quantizers["patch_embed.proj.input"].scale, expected)


@pytest.mark.parametrize("part", ["backends/minmax", "backends/adalog"])
def test_the_shipped_back_ends_quantize_a_vit(part):
    extends = ["models/vit_fmnist", "images/gaussian_noise", part]
    chosen = teacher("vit", depth=1)
    spec = load_recipe({"extends": extends}, [NO_OVERRIDES]).quantization
    model = quantize(chosen, images(3), spec, RUNTIME)
    with torch.no_grad():
        plain = chosen.module(images(3))
        assert (model(images(3)) - plain).norm() / plain.norm() < 0.6
    assert isinstance(model.quantizers["blocks.0.attn.qkv.weight"], UniformQuantizer)
    assert isinstance(model, QuantizedModel)
