"""RepQ's transform: what it changes in a model, and that the float model computes the same."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import EXPLICIT, FUSED, RUNTIME, back_end, images, network, quantized, teacher, teacher_of
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from spdfq.backends import Calibration, RepQ, quantize
from spdfq.backends.transforms.norms import norm_groups
from spdfq.backends.transforms.repq import reparameterise
from spdfq.backends.wiring import wiring
from spdfq.errors import NonFiniteError, SpdfqError
from spdfq.quantized import place
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantizers import Log2Quantizer, MinMaxObserver, UniformQuantizer
from spdfq.recipe import load_recipe
from spdfq.teacher import Teacher

MINMAX = "observer='minmax', weight_observer='minmax'"
CALIBRATED = f"{{type='calibrate', {MINMAX}}}"
REPQ = f"quantization.steps=[{CALIBRATED}, {{type='repq', {MINMAX}}}]"
SPLIT = f"quantization.steps=[{CALIBRATED}, {{type='repq', part='channels', {MINMAX}}}]"
FLOAT_WEIGHTS = "quantization.overrides=[{sites=['*.weight'], bits=0}]"
OTHERS = ["*.weight", "*.query", "*.key", "*.value", "*.softmax", "*.proj.input", "*.fc2.input", "head.input"]
NORMS_ALONE = f"quantization.overrides=[{{sites={OTHERS}, bits=0}}]"
BOTH_NORMS = [f"blocks.{block}.norm{norm}" for block in (0, 1) for norm in (1, 2)]
MADE = "the bias of blocks.{}.attn.qkv is computed in the forward pass and cannot be changed"
ONE_TOKEN = "its layers take one token of an image, too little for a range of each channel"


class Body(nn.Module):
    """Tokens of dimension 8, a body, a head."""

    def __init__(self, body):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch, self.body, self.head = nn.Conv2d(3, 8, 8, 8), body(), nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(self.body(self.patch(pixels).flatten(2).mT).mean(1))


class Normed(nn.Module):
    """A LayerNorm, what is done to its output, and a linear layer."""

    def __init__(self, between=lambda x: x, bias=True, affine=True):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8, elementwise_affine=affine), nn.Linear(8, 8, bias=bias)
        self.between = between

    def forward(self, x):
        return self.linear(self.between(self.norm(x)))


def norms_of(body):
    network = Body(body).eval()
    return wiring(network, images(1)).norms


def skipped(body, *overrides):
    """What a model's notes say of the LayerNorm of its body."""
    model = quantized(teacher_of(Body(body).eval()), REPQ, *overrides)
    return [note.removeprefix("repq: body.norm does not change: ") for note in model.notes]


def spread(chosen, seed=1):
    """LayerNorms with channels of very different size and place, as in trained transformers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in chosen.module.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.exp(torch.randn(module.weight.shape, generator=generator)))
                module.bias.copy_(3 * torch.randn(module.bias.shape, generator=generator))
    return chosen


@torch.no_grad()
def output(module, count=5, seed=0):
    return module(images(count, seed))


# which layers take the output of a LayerNorm


def test_a_vits_norms_feed_qkv_and_fc1():
    found = wiring(network("vit"), images(1)).norms
    assert {norm.name: norm.layers for norm in found.values()} == {
        "blocks.0.norm1": ["blocks.0.attn.qkv.weight"],
        "blocks.0.norm2": ["blocks.0.mlp.fc1.weight"],
        "blocks.1.norm1": ["blocks.1.attn.qkv.weight"],
        "blocks.1.norm2": ["blocks.1.mlp.fc1.weight"],
        "norm": ["head.weight"],
    }
    assert [norm.others for norm in found.values()] == [[]] * 5


def test_shifted_windows_are_looked_through_and_the_reduction_is_found():
    groups, notes = norm_groups(quantized("swin"), images(1))
    names = [f"layers.{stage}.blocks.{block}.norm{norm}" for stage in (0, 1) for block in (0, 1) for norm in (1, 2)]
    assert [group.name for group in groups] == [
        *names[:4],
        "layers.1.downsample.norm",
        *names[4:],
    ]
    assert groups[2].weights == ("layers.0.blocks.1.attn.qkv.weight",)  # its windows are shifted
    assert groups[4].biases == ("layers.1.downsample.reduction.bias",)
    assert notes == [
        "patch_embed.norm does not change: its output also goes to layer_norm, add",
        "norm does not change: its output also goes to mean",
    ]


def test_one_norm_may_feed_several_layers_that_see_parts_of_it():
    groups, _ = norm_groups(quantized("cait"), images(1))
    (group,) = (group for group in groups if group.name == "blocks_token_only.0.norm1")
    assert group.weights == tuple(f"blocks_token_only.0.attn.{leaf}.weight" for leaf in "qkv")
    assert group.observed == "blocks_token_only.0.attn.k.input"  # the query is the class token's alone


@pytest.mark.parametrize(
    ("between", "others"),
    [
        (lambda x: x.roll(1, 1).flip(1).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)[:, :9], []),
        (lambda x: x.transpose(1, 2).transpose(1, 2), []),
        (lambda x: F.pad(x, (0, 0, 0, 1)), ["pad"]),
        (lambda x: F.pad(x, (0, 0, 0, 0)), []),
        (lambda x: x.flip(-1), ["flip"]),
        (lambda x: x + x, ["add"]),
        (lambda x: F.gelu(x), ["gelu"]),
        (lambda x: torch.cat([x, 2 * x], 1), ["mul", "cat"]),
        (lambda x: F.scaled_dot_product_attention(x, x, x), ["scaled_dot_product_attention"]),
        (lambda x: torch.eye(16) @ x, ["matmul"]),
        (lambda x: F.linear(x.transpose(1, 2), torch.eye(16)).transpose(1, 2), ["linear over tokens"]),
    ],
    ids=[
        "moved",
        "transposed twice",
        "padded",
        "padded by nothing",
        "flipped",
        "added",
        "gelu",
        "joined",
        "attended",
        "multiplied",
        "mixed by a layer over tokens",
    ],
)
def test_what_moves_tokens_is_looked_through_and_what_changes_them_is_a_taker_of_its_own(between, others):
    norm = norms_of(lambda: Normed(between))["body.norm.weight"]
    assert norm.others == others
    assert norm.layers == ([] if others else ["body.linear.weight"])


@pytest.mark.parametrize("channels", [16, 32])
def test_a_norm_before_a_layer_over_tokens_is_left_however_many_there_are(channels):
    model = MlpMixer(img_size=32, patch_size=8, embed_dim=channels, num_blocks=2, num_classes=10).eval()
    found = {name: norm.others for name, norm in wiring(model, images(1)).norms.items()}
    assert (found["blocks.0.norm1.weight"], found["blocks.0.norm2.weight"]) == (["linear over tokens"], [])
    chosen = Teacher(model, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, 32, 32))
    reparameterised = quantize(chosen, images(2), back_end(REPQ), RUNTIME)
    with torch.no_grad():
        assert torch.allclose(reparameterised.network(images(2)), model(images(2)), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: Residual(), "its output also goes to add"),
        (lambda: Normed(lambda x: x[:, 0:1]), ONE_TOKEN),
        (lambda: Shared(), "body.linear also takes other inputs"),
    ],
    ids=["residual", "one token", "shared layer"],
)
def test_a_norm_that_cannot_be_rescaled_is_left_and_named(body, reason):
    assert skipped(body) == [reason]


class Residual(Normed):
    def forward(self, x):
        x = self.norm(x)
        return x + self.linear(x)


class Shared(Normed):
    def forward(self, x):
        return self.linear(self.linear(self.norm(x)))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("[{sites=['body.linear.input'], bits=0}]", "the inputs of its layers are not quantized"),
        ("[{sites=['body.linear.weight'], bits=0}]", None),
    ],
)
def test_it_depends_on_what_is_quantized(override, reason):
    assert skipped(Normed, f"quantization.overrides={override}") == ([reason] if reason else [])


def test_a_norm_without_parameters_and_a_quantizer_without_a_scale_of_its_kind_are_left():
    assert skipped(lambda: Normed(affine=False)) == ["repq: no output of a LayerNorm goes to linear layers only"]
    model = place(teacher_of(Body(Normed).eval()), back_end())
    model.replace_quantizer("body.linear.input", Log2Quantizer())
    (note,) = norm_groups(model, images(1))[1]
    assert note == "body.norm does not change: its output has no uniform quantizer"


def test_biases_made_on_the_way_are_named():
    model = quantized("beit", REPQ)
    assert model.notes == [
        f"repq: blocks.0.norm1 does not change: {MADE.format(0)}",
        f"repq: blocks.1.norm1 does not change: {MADE.format(1)}",
        f"repq: fc_norm does not change: {ONE_TOKEN}",
    ]


def test_notes_are_in_the_site_table():
    assert quantized("vit", REPQ).site_table()["notes"] == [f"repq: norm does not change: {ONE_TOKEN}"]
    assert "notes" not in quantized("vit").site_table()


# what changes in the model


@pytest.mark.parametrize("name", [*FUSED, *EXPLICIT])
def test_in_float_nothing_changes(name):
    chosen = spread(teacher(name))
    model = quantized(chosen, REPQ)
    before, after = output(chosen.module, 7, seed=5), output(model.network, 7, seed=5)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    changed = [
        norm
        for norm in BOTH_NORMS
        if name == "vit" and not torch.equal(_part(model.network, norm).bias, _part(chosen.module, norm).bias)
    ]
    assert changed == (BOTH_NORMS if name == "vit" else [])


def _part(network, name):
    return network.get_submodule(name)


@pytest.mark.parametrize("name", ["vit", "swin", "cait"])
def test_folded_it_is_the_model_that_was_quantized_per_channel(name):
    chosen = spread(teacher(name))
    split, folded = (quantized(chosen, steps, FLOAT_WEIGHTS) for steps in (SPLIT, REPQ))
    axes = {model.quantizers[group.inputs[0]].channel_axis for model in (split,) for group in _groups(model)}
    assert axes == {-1}
    assert all(folded.quantizers[site].channel_axis is None for group in _groups(split) for site in group.inputs)
    difference = (output(split, 7, seed=5) - output(folded, 7, seed=5)).norm()
    error = (output(split, 7, seed=5) - output(chosen.module, 7, seed=5)).norm()
    assert difference < 1e-4 * error


def _groups(model):
    return norm_groups(model, images(1))[0]


def test_the_fold_is_the_papers_formula():
    scale, zero_point = torch.tensor([0.5, 1.0, 1.5]), torch.tensor([3, 8, 9], dtype=torch.uint8)
    found = reparameterise(scale, zero_point)
    # mean scale 1, mean zero point 20/3 -> 7; r = s, b = z's' - z s / r = 7 - z
    assert (found.scale.item(), found.zero_point.item()) == (1.0, 7.0)
    assert found.factor.tolist() == [0.5, 1.0, 1.5]
    assert found.offset.tolist() == [4.0, -1.0, -2.0]


def test_the_codes_of_each_channel_stay_what_they_were():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.3, 1, 2, 5, 9.0])
    channels = UniformQuantizer(bits=4, granularity="channel", axis=-1)
    channels.observe(x)
    channels.freeze(MinMaxObserver())
    found = reparameterise(channels.scale, channels.zero_point)
    whole = UniformQuantizer(bits=4)
    whole.restore({"scale": found.scale.float(), "zero_point": found.zero_point.to(torch.uint8)})
    moved = (x.double() / found.factor - found.offset).float()
    # code - z is the same before clamping; after it wherever both grids reach
    ours, theirs = whole.codes(moved).long(), channels.codes(x).long()
    assert torch.equal(ours, theirs)


def test_each_channels_range_starts_and_ends_where_its_values_do():
    chosen = spread(teacher("vit"))
    model = quantized(chosen, SPLIT)
    seen = {}
    with model.visiting(lambda name, _, tensor: seen.setdefault(name, tensor)), torch.no_grad():
        model.network(images())
    values, quantizer = seen["blocks.1.mlp.fc1.input"], model.quantizers["blocks.1.mlp.fc1.input"]
    low, high = values.flatten(0, 1).aminmax(dim=0)
    torch.testing.assert_close(quantizer.scale, (high - low) / 15)
    assert (low < 0).all()
    assert (high > 0).all()
    assert values.flatten(0, 1).median(dim=0).values.abs().max() < 1e-5


def test_a_dead_channel_stays_exact_and_does_not_move_the_scale():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.blocks[0].norm2.weight[3] = 0.0
        chosen.module.blocks[0].norm2.bias[3] = 2.7
    model = quantized(chosen, REPQ)
    torch.testing.assert_close(output(model.network), output(chosen.module), atol=1e-5, rtol=1e-5)
    norm, quantizer = model.network.blocks[0].norm2, model.quantizers["blocks.0.mlp.fc1.input"]
    value = norm.bias[3] + 0 * norm.weight[3]
    assert quantizer(value).item() == pytest.approx(value.item(), abs=1e-6)
    others = quantized("vit", REPQ).quantizers["blocks.0.mlp.fc1.input"].scale
    assert 0.7 < quantizer.scale / others < 1.4


def test_the_layers_of_one_norm_share_one_range():
    model = quantized(spread(teacher("cait")), REPQ)
    first, *rest = (model.quantizers[f"blocks_token_only.1.attn.{leaf}.input"] for leaf in "qkv")
    for other in rest:
        assert torch.equal(other.scale, first.scale)
        assert torch.equal(other.zero_point, first.zero_point)
        assert other is not first


def test_the_ranges_of_changed_weights_are_chosen_anew_and_of_no_others():
    chosen = spread(teacher("vit"))
    before, after = quantized(chosen), quantized(chosen, REPQ)
    changed = {
        name
        for name in before.weight_names()
        if not torch.equal(before.quantizers[name].scale, after.quantizers[name].scale)
    }
    assert changed == {f"blocks.{b}.{layer}.weight" for b in (0, 1) for layer in ("attn.qkv", "mlp.fc1")}
    for name in changed:
        low, high = after.weight(name).aminmax(dim=1)
        torch.testing.assert_close(after.quantizers[name].scale, (high - low) / 15)


def test_channels_of_different_size_lose_less():
    chosen = spread(teacher("vit"))
    whole, split = (
        (output(quantized(chosen, *steps, NORMS_ALONE)) - output(chosen.module)).norm() for steps in ([], [REPQ])
    )
    assert split < 0.6 * whole


def test_both_parts_with_a_step_between_are_both_at_once():
    chosen = spread(teacher("vit"))
    parts = f"quantization.steps=[{CALIBRATED}, {{type='repq', part='channels', {MINMAX}}}, "
    parts += f"{{type='repq', part='fold', {MINMAX}}}]"
    assert torch.equal(output(quantized(chosen, parts)), output(quantized(chosen, REPQ)))


def test_nothing_to_fold_is_an_error():
    chosen = teacher("vit")
    spec = back_end(f"quantization.steps=[{CALIBRATED}, {{type='repq', part='fold'}}]")
    with pytest.raises(SpdfqError, match=r"repq: nothing to fold; put .*part = 'channels'.* before it"):
        quantize(chosen, images(), spec, RUNTIME)


def test_images_that_are_not_finite_are_refused_with_the_norms_name():
    model, given = quantized("vit"), images()
    given[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"repq: blocks.0.norm1: its output is not finite"):
        RepQ().run(model, Calibration(teacher=teacher("vit"), images=given, runtime=RUNTIME))


def test_a_running_average_of_ranges_is_one_of_the_batches_it_saw():
    chosen = spread(teacher("vit"))
    scales = []
    for observer in ("'minmax'", "{type='running_minmax', momentum=0.5}"):
        step = f"{{type='repq', part='channels', batch=1, observer={observer}}}"
        model = quantized(chosen, f"quantization.steps=[{CALIBRATED}, {step}]")
        scales.append(model.quantizers["blocks.0.attn.qkv.input"].scale)
    assert bool((scales[1] < scales[0]).all())


def test_the_size_of_batches_does_not_matter():
    chosen = spread(teacher("swin"))
    first, second = quantized(chosen), quantized(chosen)
    for model, batch in ((first, 2), (second, 32)):
        RepQ(batch=batch).run(model, Calibration(teacher=chosen, images=images(5), runtime=RUNTIME))
    assert torch.equal(output(first), output(second))


def test_an_added_bias_is_saved_and_comes_back(tmp_path):
    chosen = spread(teacher("swin"))
    model = quantized(chosen, REPQ)
    assert model.biases == ["layers.1.downsample.reduction.bias"]
    rows = {row["name"]: row for row in model.site_table()["float"]}
    assert rows["layers.1.downsample.reduction.bias"]["parameters"] == 32
    save_quantized(model, tmp_path, chosen)
    again = load_quantized(tmp_path, network("swin"))
    assert torch.equal(output(again), output(model))
    assert chosen.module.layers[1].downsample.reduction.bias is None


def test_the_shipped_part_is_calibration_and_then_this():
    spec = load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/repq"]}).quantization
    assert [type(step).__name__ for step in spec.steps] == ["Calibrate", "RepQ"]
