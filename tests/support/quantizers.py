"""Every registered quantizer in several variants, and data for them."""

import attrs
import pytest
import torch

from spdfq.quantizers import DualUniformQuantizer, TwinUniformQuantizer, UniformQuantizer
from spdfq.registry import observers, quantizers
from support.registered import made

QUANTIZERS = {name: quantizers.get(name) for name in quantizers.names()}
OBSERVERS = {name: observers.get(name) for name in observers.names()}
VARIANTS = {name: [made("quantizer", name, bits=b) for b in (2, 4, 8)] for name in QUANTIZERS}
VARIANTS["uniform"] += [UniformQuantizer(symmetric=True), UniformQuantizer(granularity="channel", axis=-1)]
VARIANTS["uniform"] += [UniformQuantizer(bits=16), UniformQuantizer(bits=16, symmetric=True)]
VARIANTS["uniform"] += [UniformQuantizer(bits=16, granularity="channel", axis=-1)]
VARIANTS["twin_uniform"] += [TwinUniformQuantizer(split="sign", bits=b) for b in (2, 4, 8)]
VARIANTS["dual_uniform"] += [DualUniformQuantizer(share=0.4), DualUniformQuantizer(share=0.4, symmetric=True)]
FRESH = [pytest.param(quantizer, id=str(quantizer)) for variants in VARIANTS.values() for quantizer in variants]
every_quantizer = pytest.mark.parametrize("fresh", FRESH)
every_kind = pytest.mark.parametrize(
    "fresh",
    [
        pytest.param(quantizer, id=str(quantizer))
        for variants in VARIANTS.values()
        for quantizer in variants
        if quantizer.bits == 4
    ],
)
# each quantizer under every observer at 4 bits, under one at other widths
every_observed_quantizer = pytest.mark.parametrize(
    ("fresh", "observer"),
    [
        pytest.param(quantizer, made("observer", name), id=f"{quantizer}-{name}")
        for variants in VARIANTS.values()
        for quantizer in variants
        for name in OBSERVERS
        if quantizer.bits == 4 or name == "minmax"
    ],
)


def bitwise_equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def allowed(x, quantizer):
    return x if quantizer.signed else x.abs()


def data(quantizer, rows=64, seed=0):
    """`[rows, 6]` of channels of very different scale, the last one dead."""
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) + 0.5
    return allowed(x * torch.tensor([1.0, 30.0, 0.01, 1e-6, 1.0, 0.0]), quantizer)


def frozen_on(x, quantizer, observer=None):
    quantizer = attrs.evolve(quantizer)
    quantizer.observe(x)
    quantizer.freeze(observer)
    return quantizer


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float32)


def squares(x, quantizer):
    return float((quantizer(x) - x).square().mean())
