"""Every shipped back-end: whether its weights have zero in the middle, and channels for which that matters."""

import pytest
import torch
from support.backends import RUNTIME, images, network, teacher_of
from torch import nn

from spdfq.backends import quantize
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.recipe import load_recipe

SYMMETRIC = ["minmax", "ptf"]
ASYMMETRIC = ["repq", "ridge", "blockwise", "adaround", "three_stage", "distill", "adalog", "plus"]
PROJECTION = "blocks.0.attn.proj.weight"
POSITIVE, NEGATIVE, ZERO, ONE_VALUE, TINY = range(5)


def one_sided():
    """Layers whose first channels are above zero, below zero, zero, the same number, and too small for a scale."""
    module = network("vit", depth=1)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                weight = layer.weight
                weight[POSITIVE], weight[NEGATIVE] = weight[POSITIVE].abs() + 0.01, -weight[NEGATIVE].abs() - 0.01
                weight[ZERO], weight[ONE_VALUE], weight[TINY] = 0.0, -0.3, 1e-41
    return module


def quantized_by(part, module):
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", f"backends/{part}"]}
    table = load_recipe(recipe, ["quantization.weights.bits=3"]).to_dict()
    table["quantization"]["overrides"] = [{"sites": ["*.fc1.weight"], "bits": 8}]
    for step in table["quantization"]["steps"]:
        step |= {"iterations": 2, "lr": 1e-3} if "iterations" in step else {}
    spec = load_recipe(table).quantization
    return quantize(teacher_of(module), images(3), spec, RUNTIME)


@pytest.mark.parametrize("part", [*SYMMETRIC, *ASYMMETRIC])
def test_one_sided_zero_and_constant_channels_go_through_every_back_end(tmp_path, part):
    module = one_sided()
    model = quantized_by(part, module)
    assert {model.quantizers[name].symmetric for name in model.weight_names()} == {part in SYMMETRIC}
    assert {model.quantizers[name].bits for name in model.weight_names()} == {3, 8}
    with torch.no_grad():
        found, expected = model(images(3)), module(images(3))
        assert (found - expected).norm() < 0.5 * expected.norm()
    save_quantized(model, tmp_path, teacher_of(module))
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path, network("vit", depth=1))(images(3)), found)
    if part in ("ridge", "adaround", "plus"):  # these store the values that the quantizer gives
        for name in model.weight_names("blocks"):
            assert torch.equal(model.quantizers[name](model.weight(name)), model.weight(name))


def test_all_codes_of_a_one_sided_channel_are_on_its_side():
    model = quantized_by("repq", one_sided())
    weight, quantizer = model.weight(PROJECTION), model.quantizers[PROJECTION]
    values, zero_points = quantizer(weight), quantizer.zero_point.tolist()
    assert zero_points[:3] == [0, 7, 0]
    assert 0 < zero_points[TINY + 1] < 7
    assert (values[POSITIVE] >= 0).all()
    assert (values[NEGATIVE] <= 0).all()
    assert len(values[POSITIVE].unique()) > 5
    assert not values[ZERO].any()
    torch.testing.assert_close(values[ONE_VALUE], weight[ONE_VALUE])
    assert not values[TINY].any()
    assert quantizer.scale[[ZERO, TINY]].tolist() == [1.0, 1.0]
