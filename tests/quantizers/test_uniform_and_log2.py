"""Closed forms of the two quantizers of SPDFQ, on vectors computed by hand."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.quantizers import bitwise_equal, frozen_on, tensor

from spdfq.errors import DataError
from spdfq.quantizers import (
    Log2Quantizer,
    UniformQuantizer,
)

few = settings(deadline=None, max_examples=25)

float32 = st.floats(-(2.0**100), 2.0**100, width=32)

values = st.lists(float32, min_size=1, max_size=40)

bits = st.integers(2, 8)


# uniform


@few
@given(values, bits, st.booleans())
@example([-1.0, 1.0, 0.3], 4, False)
@example([1e-40, 3e-38], 8, False)
@example([-1e-37, 1e-37], 2, True)
def test_uniform_is_within_half_a_step_inside_the_range(numbers, width, symmetric):
    x = tensor(numbers)
    quantizer = frozen_on(x, UniformQuantizer(bits=width, symmetric=symmetric))
    between = torch.cat([x, torch.linspace(0, 1, 50) * x.min(), torch.linspace(0, 1, 50) * x.max()])
    scale = quantizer.scale.double()
    error = (quantizer(between).double() - between.double()).abs().max()
    # float32 rounds x / s and z * s: a few units in the last place of n steps
    assert float(error) <= float(scale) * (0.5 + quantizer.levels * 2.0**-21)


@few
@given(values, bits, st.booleans(), st.lists(float32, min_size=2, max_size=20))
@example([1e-45], 4, False, [1e30, -1e30])
def test_uniform_stays_a_grid_everywhere(numbers, width, symmetric, others):
    quantizer = frozen_on(tensor(numbers), UniformQuantizer(bits=width, symmetric=symmetric))
    zero, scale = int(quantizer.zero_point), quantizer.scale
    ladder = tensor(others).sort().values
    y = quantizer(ladder)
    assert bitwise_equal(quantizer(y), y)
    assert bool((y.diff() >= 0).all())
    assert bool((y >= -zero * scale).all())
    assert bool((y <= (quantizer.levels - 1 - zero) * scale).all())
    assert float(quantizer(torch.zeros(()))) == 0.0


@few
@given(values, bits, st.booleans())
def test_uniform_gradient_is_one_inside_and_zero_outside(numbers, width, symmetric):
    quantizer = frozen_on(tensor(numbers), UniformQuantizer(bits=width, symmetric=symmetric))
    zero, scale = int(quantizer.zero_point), float(quantizer.scale)
    steps = tensor([-zero - 0.9, -zero - 0.4, -zero, 0.0, quantizer.levels - 1.1 - zero, quantizer.levels - 0.1 - zero])
    x = (steps * scale).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 1.0, 0.0], rel=1e-6)


def test_uniform_asymmetric_closed_form():
    # [-3, 12] with 16 codes: s = 15 / 15 = 1, z = round(3 / 1) = 3
    x = tensor([-3.0, 12.0, 0.4, 0.6, 2.5, 3.5, -7.0, 40.0])
    quantizer = frozen_on(x[:6], UniformQuantizer(bits=4))
    assert (float(quantizer.scale), int(quantizer.zero_point)) == (1.0, 3)
    assert quantizer.zero_point.dtype == torch.uint8
    assert quantizer.scale.shape == quantizer.zero_point.shape == ()
    # halves go to the even neighbour
    assert quantizer(x).tolist() == [-3.0, 12.0, 0.0, 1.0, 2.0, 4.0, -3.0, 12.0]
    assert quantizer.codes(x).tolist() == [0, 15, 3, 4, 5, 7, 0, 15]


def test_uniform_range_is_extended_to_zero():
    # [5, 30] becomes [0, 30]: s = 2, z = 0; [-30, -5] becomes [-30, 0]: s = 2, z = 15
    above = frozen_on(tensor([5.0, 30.0]), UniformQuantizer(bits=4))
    below = frozen_on(tensor([-5.0, -30.0]), UniformQuantizer(bits=4))
    assert (float(above.scale), int(above.zero_point)) == (2.0, 0)
    assert (float(below.scale), int(below.zero_point)) == (2.0, 15)


def test_uniform_symmetric_closed_form():
    # max |x| = 14, n / 2 - 1 = 7: s = 2, z = 8; code 0 stands for -16
    quantizer = frozen_on(tensor([-14.0, 5.0]), UniformQuantizer(bits=4, symmetric=True))
    assert (float(quantizer.scale), int(quantizer.zero_point)) == (2.0, 8)
    assert quantizer(tensor([-99.0, -14.0, 3.1, 99.0])).tolist() == [-16.0, -14.0, 4.0, 14.0]


@pytest.mark.parametrize(("axis", "channel"), [(0, 0), (1, 1), (-1, 2), (2, 2)])
def test_uniform_channels_equal_separate_tensors(axis, channel):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    quantizer = frozen_on(x, UniformQuantizer(granularity="channel", axis=axis))
    assert quantizer.scale.shape == quantizer.zero_point.shape == (x.shape[channel],)
    apart = [frozen_on(part, UniformQuantizer())(part) for part in x.unbind(channel)]
    assert bitwise_equal(quantizer(x), torch.stack(apart, dim=channel))


def test_a_dead_channel_does_not_disturb_the_others():
    x = tensor([[0.0, 0.0], [-3.0, 12.0]])
    quantizer = frozen_on(x, UniformQuantizer(granularity="channel"))
    assert (quantizer.scale.tolist(), quantizer.zero_point.tolist()) == ([1.0, 1.0], [0, 3])
    assert torch.equal(quantizer(x), x)


def test_channels_that_do_not_fit_are_refused():
    quantizer = frozen_on(torch.rand(3, 4), UniformQuantizer(granularity="channel"))
    for shape in [(1, 4), (2, 4)]:
        with pytest.raises(DataError, match="3 channels"):
            quantizer(torch.rand(shape))
    with pytest.raises(DataError, match="lacks"):
        UniformQuantizer(granularity="channel", axis=2).observe(torch.rand(3, 4))
    collecting = UniformQuantizer(granularity="channel")
    collecting.observe(torch.rand(3, 4))
    with pytest.raises(DataError, match="3 channels before and 2 now"):
        collecting.observe(torch.rand(2, 4))


def test_a_zero_point_beyond_the_codes_is_refused():
    tensors = {"scale": torch.tensor(1.0), "zero_point": torch.tensor(16, dtype=torch.uint8)}
    with pytest.raises(DataError, match="must lie in 0 to 15 at 4 bits"):
        UniformQuantizer(bits=4).restore(tensors)
    channels = {"scale": torch.ones(3), "zero_point": torch.zeros(2, dtype=torch.uint8)}
    with pytest.raises(DataError, match="differ in length"):
        UniformQuantizer(granularity="channel").restore(channels)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8, or 16 for activations, not 1"),
        ({"bits": 9}, "from 2 to 8, or 16"),
        ({"bits": True}, "bits: expected a whole number, got True"),
        ({"bits": 4.0}, "bits: expected a whole number, got 4.0"),
        ({"granularity": "group"}, "expected one of 'tensor', 'channel', got 'group'"),
        ({"symmetric": 1}, "symmetric: expected true or false"),
        ({"axis": 0.5}, "axis: expected a whole number"),
    ],
)
def test_wrong_options_are_explained(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        UniformQuantizer(**options)


# log2


def test_log2_closed_form():
    # d = 0.8, n = 8: exponents 0 .. 6 and zero; boundaries lie at 2**-(q + 1/2)
    quantizer = frozen_on(tensor([0.8, 0.1]), Log2Quantizer(bits=3))
    assert float(quantizer.scale) == pytest.approx(0.8)
    x = 0.8 * tensor([1.0, 2**-0.49, 2**-0.51, 2**-6.0, 2**-6.49, 2**-6.51, 2**-30.0, 0.0, 5.0, -1.0])
    assert quantizer.codes(x).tolist() == [0, 0, 1, 6, 6, 7, 7, 7, 0, 7]
    expected = [0.8, 0.8, 0.4, 0.0125, 0.0125, 0.0, 0.0, 0.0, 0.8, 0.0]
    assert quantizer(x).tolist() == pytest.approx(expected, rel=1e-6)
    assert set(quantizer.tensors()) == {"scale"}


@few
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=40), bits)
@example([1e-45, 0.0], 4)
@example([2.0**-63, 2.0**-126, 3e-39], 8)
def test_log2_is_idempotent_monotone_and_bounded(numbers, width):
    x = tensor(numbers).sort().values
    quantizer = frozen_on(x, Log2Quantizer(bits=width))
    y = quantizer(x)
    assert bitwise_equal(quantizer(y), y)
    assert bool((y.diff() >= 0).all())
    assert bool((y <= x.max()).all())
    assert bool((y[x == 0] == 0).all())
    near = y > 0
    ratio = y[near] / x[near]
    assert bool(((ratio > 0.7071) & (ratio < 1.4143)).all())


@few
@given(st.integers(0, 62), st.integers(-3, 3))
def test_log2_rounds_exactly_at_the_boundaries(exponent, offset):
    boundary = tensor([2.0 ** -(exponent + 0.5)])
    for _ in range(abs(offset)):
        boundary = torch.nextafter(boundary, tensor([math.copysign(math.inf, offset)]))
    # float64 resolves which side of 2**-(q + 1/2) a float32 number lies
    exact = round(-math.log2(float(boundary)))
    quantizer = frozen_on(tensor([1.0]), Log2Quantizer(bits=8))
    assert quantizer.codes(boundary).tolist() == [exact]
    # alone or in a vectorised loop, the answer is one
    assert quantizer.codes(boundary.expand(37).contiguous()).tolist() == [exact] * 37


def test_log2_powers_of_two_are_exact():
    powers = tensor([2.0**-k for k in range(64)])
    quantizer = frozen_on(powers, Log2Quantizer(bits=8))
    assert bitwise_equal(quantizer(powers), powers)
    assert quantizer.codes(powers).tolist() == list(range(64))


def test_log2_gradient_is_that_of_the_formula_without_the_rounding():
    quantizer = frozen_on(tensor([1.0]), Log2Quantizer(bits=3))
    x = tensor([1.0, 0.6, 0.3, 1e-6, 0.0, 2.0]).requires_grad_()
    quantizer(x).sum().backward()
    # value / x, with 0.6 -> 0.5 and 0.3 -> 0.25; nothing for zeros and the clamped
    assert x.grad.tolist() == pytest.approx([1.0, 0.5 / 0.6, 0.25 / 0.3, 0.0, 0.0, 0.0], rel=1e-5)


def test_log2_refuses_negative_values():
    with pytest.raises(DataError, match=r"accepts no negative values, but observed -0\.5"):
        Log2Quantizer().observe(tensor([0.1, -0.5]))
