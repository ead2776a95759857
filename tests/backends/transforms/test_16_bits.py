"""Steps on activations of 16 bits: RepQ folds their ranges, and power-of-two factors have no such width."""

import pytest
import torch
from support.backends import RUNTIME, images, network, quantized, teacher

from spdfq.backends import Calibration, PowerOfTwoFactors, RepQ
from spdfq.errors import SpdfqError
from spdfq.quantized.checkpoint import load_quantized, save_quantized

A16 = ["quantization.weights.bits=8", "quantization.activations.bits=16"]


@torch.no_grad()
def test_repq_folds_the_ranges_of_channels(tmp_path):
    chosen = teacher("vit")
    model, given = quantized(chosen, *A16), Calibration(teacher=chosen, images=images(), runtime=RUNTIME)
    RepQ(part="channels").run(model, given)
    channels = model(images(3, seed=1))
    RepQ(part="fold").run(model, given)
    quantizer = model.quantizers["blocks.1.mlp.fc1.input"]
    assert (quantizer.bits, quantizer.channel_axis, quantizer.zero_point.dtype) == (16, None, torch.int32)
    whole = model(images(3, seed=1))
    torch.testing.assert_close(whole, channels, atol=0.1 * float(channels.abs().max()), rtol=0)
    save_quantized(model, tmp_path, chosen)
    assert torch.equal(load_quantized(tmp_path, network("vit"))(images(3, seed=1)), whole)


def test_power_of_two_factors_are_refused():
    model = quantized(teacher("vit"), *A16, "quantization.placement='psaq'")
    with pytest.raises(SpdfqError, match=r"^ptf: blocks.0.residual has 16 bits; power_of_two_factor has 2 to 8, so"):
        PowerOfTwoFactors().check(model, [])
