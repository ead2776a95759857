"""Transforms that change quantizers and biases: power-of-two factors and the folded shift of logarithms."""

import pytest
import torch
from support.backends import RUNTIME, back_end, images, network, quantized, teacher, teacher_of
from torch import nn

from spdfq.backends import AdaLog, Calibration, PowerOfTwoFactors, quantize
from spdfq.errors import ModelError, SpdfqError
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantizers import AdaptiveLogQuantizer, MinMaxObserver, PowerOfTwoFactorQuantizer, UniformQuantizer
from spdfq.recipe import load_recipe

SHIFT = 0.16997
GELU = f"quantization.gelu={{type='adaptive_log', bits=4, shift={SHIFT}}}"
PSAQ = "quantization.placement='psaq'"
BEHIND = [f"blocks.{block}.mlp.fc2" for block in (0, 1)]


def run(step, model, chosen):
    step.run(model, Calibration(teacher=chosen, images=images(), runtime=RUNTIME))
    return model


@torch.no_grad()
def output(model):
    return model(images(3, seed=1))


# the folded shift


def test_a_folded_shift_changes_no_output():
    chosen = teacher("vit")
    model = quantized(chosen, GELU)
    before = output(model)
    run(AdaLog(), model, chosen)
    torch.testing.assert_close(output(model), before, atol=1e-4, rtol=1e-5)
    assert not model.notes
    for name in BEHIND:
        quantizer, layer = model.quantizers[f"{name}.input"], model.network.get_submodule(name)
        # the smallest GELU output is lifted to zero, and the codes stand for powers alone
        assert quantizer(torch.tensor([-SHIFT])).item() == 0.0
        taken = SHIFT * model.quantizers[f"{name}.weight"](layer.weight).sum(1)
        torch.testing.assert_close(layer.bias, chosen.module.get_submodule(name).bias - taken)


def test_it_folds_once_and_only_what_is_shifted():
    chosen = teacher("vit")
    model = run(AdaLog(), quantized(chosen, GELU, "quantization.softmax={type='adaptive_log', bits=4}"), chosen)
    folded = {n for n, q in model.quantizers.items() if isinstance(q, AdaptiveLogQuantizer) and q.folded}
    assert folded == {f"{name}.input" for name in BEHIND}
    before = output(model)
    assert torch.equal(output(run(AdaLog(), model, chosen)), before)


def test_a_folded_model_comes_back_from_its_checkpoint(tmp_path):
    chosen = teacher("vit")
    model = run(AdaLog(), quantized(chosen, GELU), chosen)
    save_quantized(model, tmp_path, chosen)
    again = load_quantized(tmp_path, network("vit"))
    assert again.quantizers["blocks.0.mlp.fc2.input"].folded
    assert torch.equal(output(again), output(model))


def test_a_shift_that_no_bias_can_take_up_is_named():
    chosen = teacher("vit")
    chosen.module.blocks[0].mlp.fc2 = _Made(chosen.module.blocks[0].mlp.fc2)
    model = quantized(chosen, GELU)
    before = output(model)
    run(AdaLog(), model, chosen)
    assert model.notes == ["adalog: blocks.0.mlp.fc2.input keeps its shift: no bias that follows can be changed"]
    torch.testing.assert_close(output(model), before, atol=1e-4, rtol=1e-5)


class _Made(nn.Module):
    """A linear layer whose bias is computed in the forward pass."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.part = layer.weight, nn.Parameter(layer.bias.detach() / 2)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, 2 * self.part)


# power-of-two factors


def test_every_residual_sum_gets_factors_and_nothing_else():
    chosen = teacher("vit")
    model, before = quantized(chosen, PSAQ), quantized(chosen, PSAQ)
    run(PowerOfTwoFactors(), model, chosen)
    changed = {name for name, q in model.quantizers.items() if type(q) is not type(before.quantizers[name])}
    assert changed == {name for name, site in model.sites.items() if site.kind == "residual"}
    assert len(changed) == 4
    assert {type(model.quantizers[name]) for name in changed} == {PowerOfTwoFactorQuantizer}
    assert {model.quantizers[name].bits for name in changed} == {4}


def test_the_factors_are_those_of_the_float_sums():
    chosen = teacher("vit")
    model = run(PowerOfTwoFactors(), quantized(chosen, PSAQ), chosen)
    seen = {}
    with model.visiting(lambda name, _, tensor: seen.setdefault(name, tensor)), torch.no_grad():
        model.network(images())
    expected = PowerOfTwoFactorQuantizer(bits=4)
    (name, *_) = (name for name, site in model.sites.items() if site.kind == "residual")
    expected.observe(seen[name])
    expected.freeze(MinMaxObserver())
    for key, tensor in model.quantizers[name].tensors().items():
        assert torch.equal(tensor, expected.tensors()[key])


def test_without_residual_sums_there_is_nothing_to_do():
    spec = back_end("quantization.steps=['calibrate', 'ptf']")
    with pytest.raises(SpdfqError, match=r"ptf: no residual sum is quantized; set quantization.placement = 'psaq'"):
        quantize(teacher("vit"), images(), spec, RUNTIME)


class Maps(nn.Module):
    """A sum of maps, then a sum of tokens that a LayerNorm takes."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.norm = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, maps):
        tokens = (maps + self.conv(maps)).flatten(2).transpose(1, 2)
        return self.norm(tokens + self.fc(tokens)).mean(1)


def test_maps_that_no_layer_norm_takes_are_left_as_they_are_and_noted():
    module = nn.Sequential(nn.Conv2d(3, 8, (4, 6), (4, 6)), Maps(), nn.Linear(8, 10))
    model = quantize(
        teacher_of(module.eval()), images(), back_end(PSAQ, "quantization.steps=['calibrate', 'ptf']"), RUNTIME
    )
    sums = {
        model.sites[name].shape: quantizer
        for name, quantizer in model.quantizers.items()
        if name.startswith("1.residual")
    }
    assert {shape: type(quantizer) for shape, quantizer in sums.items()} == {
        (1, 8, 8, 5): UniformQuantizer,
        (1, 40, 8): PowerOfTwoFactorQuantizer,
    }
    assert model.notes[-1] == "ptf: 1.residual does not change: its channels are not on the last axis"


def test_a_site_that_images_never_reach_is_named():
    chosen = teacher("vit")
    model = quantized(chosen, PSAQ)
    model.network.blocks[1].forward = lambda x: x
    with pytest.raises(ModelError, match=r"blocks.1.residual took part in no forward pass"):
        run(PowerOfTwoFactors(), model, chosen)


@pytest.mark.parametrize(
    ("name", "steps"), [("ptf", ["Calibrate", "PowerOfTwoFactors"]), ("adalog", ["Calibrate", "AdaLog"])]
)
def test_the_shipped_parts(name, steps):
    spec = load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", f"backends/{name}"]}).quantization
    assert [type(step).__name__ for step in spec.steps] == steps
