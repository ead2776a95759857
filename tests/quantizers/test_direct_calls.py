"""Quantizers and observers called without a recipe: each mistake is one line."""

import pytest
import torch

from spdfq.errors import SpdfqError
from spdfq.quantizers import GridMseObserver, MinMaxObserver, PercentileMseObserver, UniformQuantizer

VALUES = torch.linspace(-1, 2, 12)
ROWS = VALUES.reshape(2, 6)
LOW, HIGH = torch.zeros(2), torch.ones(2)


def observed():
    quantizer = UniformQuantizer()
    quantizer.observe(VALUES)
    return quantizer


def frozen():
    quantizer = observed()
    quantizer.freeze(GridMseObserver())
    return quantizer


MISTAKES = {
    "x must be a tensor .* got ndarray": lambda: UniformQuantizer().observe(VALUES.numpy()),
    "x must be a tensor .* got list": lambda: UniformQuantizer().observe([1.0]),
    "observed nothing": lambda: UniformQuantizer().freeze(),
    "observer must be an observer such as MinMaxObserver.., got 'minmax'": lambda: observed().freeze("minmax"),
    "got the class MinMaxObserver": lambda: observed().freeze(MinMaxObserver),
    "product must be a spdfq.quantizers.Product, got int": lambda: observed().freeze(product=3),
    "is not frozen": lambda: UniformQuantizer()(VALUES),
    "x must be a tensor .* got int": lambda: frozen()(3),
    "x must be a tensor .* got float": lambda: frozen().codes(0.5),
    "codes must be a tensor .* got list": lambda: frozen().decode([1, 2]),
    "is stored as .*, not int": lambda: UniformQuantizer().restore(3),
    r"samples must be \[C, n\], got \[12\]": lambda: GridMseObserver().choose(VALUES, LOW, HIGH, UniformQuantizer()),
    r"samples must be .* got \[12\]": lambda: PercentileMseObserver().choose(VALUES, LOW, HIGH, UniformQuantizer()),
    r"low must be a tensor \[C\], got float": lambda: GridMseObserver().choose(ROWS, 0.0, 1.0, UniformQuantizer()),
    "quantizer must be a quantizer .* got int": lambda: GridMseObserver().choose(ROWS, LOW, HIGH, 3),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(message):
    with pytest.raises(SpdfqError, match=message) as caught:
        MISTAKES[message]()
    assert "\n" not in str(caught.value)


def test_a_refused_freeze_keeps_what_was_observed():
    quantizer = observed()
    with pytest.raises(SpdfqError):
        quantizer.freeze("minmax")
    quantizer.freeze()
    assert torch.equal(quantizer.decode(quantizer.codes(VALUES)), quantizer(VALUES))


def test_integers_are_quantized_as_their_float_values():
    quantizer, x = UniformQuantizer(bits=4), torch.tensor([0, 10, 100])
    quantizer.observe(x)
    quantizer.freeze()
    assert torch.equal(quantizer(x), quantizer(x.float()))
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.codes(x)))
