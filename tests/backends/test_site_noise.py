"""The noise, the histogram and the levels of every quantized site."""

import math

import pytest
import torch
from support.backends import EXPLICIT, FUSED, RUNTIME, back_end, images, teacher

from spdfq.backends import quantize
from spdfq.backends.site_noise import BINS, site_noise
from spdfq.errors import SpdfqError
from spdfq.quantized.place import place

GIVEN = images(5)
RIDGE = "quantization.steps=[{type='calibrate'}, {type='ridge', penalty=1.0}]"


def quantized(name, *overrides):
    return quantize(teacher(name), GIVEN, back_end(*overrides), RUNTIME)


def at(found, site):
    return next(each for each in found["sites"] if each["site"] == site)


@pytest.mark.parametrize("name", [*FUSED, *EXPLICIT])
def test_every_site_counts_all_its_values(name):
    model = quantized(name)
    found = site_noise(model, GIVEN, RUNTIME)
    assert found["images"] == 5
    assert [each["site"] for each in found["sites"]] == list(model.quantizers)
    for each in found["sites"]:
        size = math.prod(model.sites[each["site"]].shape)
        assert len(each["counts"]) == BINS
        assert sum(each["counts"]) in (size, 5 * size), each["site"]
        assert each["levels"] == sorted(each["levels"])


def test_the_ratio_is_that_of_the_definition():
    model = quantized("vit")
    seen = {}

    def visit(name, kind, tensor):
        seen[name] = tensor, model.quantized(name, kind, tensor)
        return seen[name][1]

    with model.visiting(visit), torch.no_grad():
        model.network(GIVEN)
    found = site_noise(model, GIVEN, RUNTIME)
    for each in found["sites"]:
        x, q = (tensor.double() for tensor in seen[each["site"]])
        assert each["snr"] == pytest.approx(float(10 * (x.square().sum() / (x - q).square().sum()).log10()), abs=0.006)


def test_bins_reach_a_quarter_of_the_range_beyond_its_ends():
    model = quantized("vit")
    low, high = model.quantizers["blocks.0.attn.key"].decode(torch.tensor([0, 15], dtype=torch.uint8)).tolist()
    found = at(site_noise(model, GIVEN, RUNTIME), "blocks.0.attn.key")
    margin = (high - low) / 4
    assert (found["low"], found["high"]) == pytest.approx((low - margin, high + margin), rel=1e-4)
    assert (found["levels"][0], found["levels"][-1]) == pytest.approx((low, high), rel=1e-4)
    assert len(found["levels"]) == 16
    assert not any(found["counts"][:10])  # min-max ranges clip nothing, and the margin is a sixth of the bins
    assert not any(found["counts"][-10:])
    assert not found["relative"]


def test_channels_are_shown_relative_to_their_ranges():
    found = at(site_noise(quantized("vit"), GIVEN, RUNTIME), "blocks.0.mlp.fc1.weight")
    assert found["relative"]
    assert (found["low"], found["high"]) == (-0.25, 1.25)
    assert found["levels"] == pytest.approx([index / 15 for index in range(16)], abs=1e-4)


def test_weights_that_a_step_has_rounded_have_no_ratio():
    found = site_noise(quantized("vit", RIDGE), GIVEN, RUNTIME)
    assert at(found, "blocks.1.attn.proj.weight")["snr"] is None
    assert at(found, "blocks.1.attn.proj.input")["snr"] > 0


def test_more_than_64_levels_are_not_listed():
    found = site_noise(quantized("vit", "quantization.activations.bits=8"), GIVEN, RUNTIME)
    assert at(found, "blocks.0.mlp.fc1.input")["levels"] is None
    assert at(found, "blocks.0.mlp.fc1.input")["snr"] > 35


def test_a_network_without_numbered_blocks_has_none():
    assert site_noise(quantized("vit"), GIVEN, RUNTIME)["blocks"] == ["blocks.0", "blocks.1"]


def test_values_that_are_not_finite_have_no_ratio():
    model = quantized("vit")
    found = site_noise(model, GIVEN * float("inf"), RUNTIME)
    assert at(found, "patch_embed.proj.input")["snr"] is None


def test_a_model_without_ranges_is_refused():
    with pytest.raises(SpdfqError, match="was not calibrated"):
        site_noise(place(teacher("vit"), back_end()), GIVEN, RUNTIME)
