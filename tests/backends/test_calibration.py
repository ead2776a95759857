"""Calibration: ranges from a float pass over the images, and images that cannot be used."""

import sys

import pytest
import torch
from support.backends import (
    CALIBRATE,
    RUNTIME,
    back_end,
    images,
    quantized,
    teacher,
    teacher_of,
)
from torch import nn

from spdfq.backends import Calibrate, Calibration, quantize
from spdfq.errors import DataError, ModelError, NonFiniteError, SpdfqError
from spdfq.quantized import place
from spdfq.quantizers import MinMaxObserver

# calibration


def test_every_quantizer_is_frozen_after_calibration_and_a_model_before_it_is_refused():
    chosen = teacher("vit")
    model = place(chosen, back_end())
    assert not any(quantizer.frozen for quantizer in model.quantizers.values())
    with pytest.raises(SpdfqError, match=r"patch_embed.proj.input was not calibrated; .*'calibrate'"):
        model(images())
    Calibrate().run(model, Calibration(teacher=chosen, images=images(), runtime=RUNTIME))
    assert all(quantizer.frozen for quantizer in model.quantizers.values())


def test_ranges_are_those_of_the_float_pass():
    chosen = teacher("vit")
    model = quantized(chosen)
    seen = {}
    handle = chosen.module.blocks[1].mlp.fc2.register_forward_hook(lambda _, given, out: seen.update(x=given[0]))
    chosen.module(images())
    handle.remove()
    scale = (seen["x"].max() - seen["x"].min().clamp(max=0)) / 15
    torch.testing.assert_close(model.quantizers["blocks.1.mlp.fc2.input"].scale, scale)
    low, high = chosen.module.blocks[1].mlp.fc2.weight.detach().aminmax(dim=1)
    torch.testing.assert_close(model.quantizers["blocks.1.mlp.fc2.weight"].scale, (high - low) / 15)


def test_the_batch_size_does_not_change_minmax_ranges():
    chosen = teacher("swin")
    steps = CALIBRATE.removesuffix("}]")
    one, two, all_at_once = (quantized(chosen, f"{steps}, batch={batch}}}]") for batch in (1, 2, 32))
    for name, quantizer in all_at_once.quantizers.items():
        for other in (one, two):
            torch.testing.assert_close(other.quantizers[name].scale, quantizer.scale, atol=0, rtol=1e-5)


def test_every_image_counts():
    chosen, given = teacher("vit"), images()
    given[4] *= 3
    last = quantize(chosen, given, back_end(f"{CALIBRATE.removesuffix('}]')}, batch=2}}]"), RUNTIME)
    expected = (given.max() - given.min()) / 15
    torch.testing.assert_close(last.quantizers["patch_embed.proj.input"].scale, expected)


def test_values_that_are_nan_are_named_by_the_first_site_that_has_them(monkeypatch):
    monkeypatch.setattr(sys.modules["spdfq.backends.quantize"], "check_images", lambda *_: None)
    given = images()
    given[3, 0, 5, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^calibrate: patch_embed.proj.input: 1 of 15360 observed values are NaN"):
        quantize(teacher("vit"), given, back_end(), RUNTIME)


def test_weights_that_are_infinite_are_named():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.blocks[1].attn.proj.weight[3, 4] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^calibrate: blocks.1.attn.proj.weight: 1 of 1024 observed values"):
        quantized(chosen)


def test_a_quantizer_that_does_not_take_what_a_site_sees_is_named_with_the_site():
    with pytest.raises(DataError, match=r"^calibrate: patch_embed.proj.input: Log2Quantizer.* accepts no negative"):
        quantized("vit", "quantization.activations={type='log2', bits=4}")


def test_a_site_that_no_image_reaches_is_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.bright, self.dark = nn.Linear(3, 10), nn.Linear(3, 10)

        def forward(self, x):
            x = x.mean((-1, -2))
            return (self.dark if bool((x == 0).all()) else self.bright)(x)

    with pytest.raises(ModelError, match=r"calibrate: dark.input took part in no forward pass of the images"):
        quantized(teacher_of(Branching()))


def test_calibrating_again_replaces_the_ranges():
    chosen = teacher("vit")
    model = quantized(chosen)
    before = model.quantizers["patch_embed.proj.input"].scale.clone()
    step = Calibrate(observer=MinMaxObserver(), weight_observer=MinMaxObserver())
    step.run(model, Calibration(teacher=chosen, images=images() * 2, runtime=RUNTIME))
    torch.testing.assert_close(model.quantizers["patch_embed.proj.input"].scale, before * 2)


# bad images


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, 3, 32, 32), r"images of shape \(0, 3, 32, 32\) do not fit .*; it needs \[n, 3x32x32\], n > 0"),
        (torch.zeros(2, 1, 32, 32), r"images of shape \(2, 1, 32, 32\) do not fit"),
        (torch.zeros(3, 32, 32), r"images of shape \(3, 32, 32\) do not fit"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"images are torch.uint8, so they are not normalised"),
    ],
)
def test_images_that_do_not_fit_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        quantize(teacher("vit"), given, back_end(), RUNTIME)


def test_images_of_another_float_type_are_taken():
    assert torch.equal(
        quantize(teacher("vit"), images().double(), back_end(), RUNTIME)(images()), quantized("vit")(images())
    )
