"""Contracts of everything registered, quantizers under observers, and the closed forms of the built-in ones."""

import copy
import math

import attrs
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.quantizers import (
    DualUniformQuantizer,
    GridMseObserver,
    Log2Quantizer,
    MinMaxObserver,
    Observer,
    PercentileMseObserver,
    TwinUniformQuantizer,
    UniformQuantizer,
)
from spdfq.quantizers.observers import least_error
from spdfq.registry import observers, quantizers

few = settings(deadline=None, max_examples=40)
float32 = st.floats(-(2.0**100), 2.0**100, width=32)
values = st.lists(float32, min_size=1, max_size=40)
bits = st.integers(2, 8)

QUANTIZERS = {name: quantizers.get(name) for name in quantizers.names()}
OBSERVERS = {name: observers.get(name) for name in observers.names()}
VARIANTS = {name: [kind(bits=b) for b in (2, 4, 8)] for name, kind in QUANTIZERS.items()}
VARIANTS["uniform"] += [UniformQuantizer(symmetric=True), UniformQuantizer(granularity="channel", axis=-1)]
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
        pytest.param(quantizer, kind(), id=f"{quantizer}-{name}")
        for variants in VARIANTS.values()
        for quantizer in variants
        for name, kind in OBSERVERS.items()
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


# contracts: everything registered


def test_the_built_in_names_are_registered():
    assert {"uniform", "log2"} <= set(QUANTIZERS)
    assert {"minmax", "percentile_mse", "grid_mse"} <= set(OBSERVERS)


@every_observed_quantizer
def test_forward_decodes_its_own_codes_to_the_bit(fresh, observer):
    x = data(fresh)
    quantizer = frozen_on(x, fresh, observer)
    wider = torch.cat([x * 3, -x, x.flip(0)])
    codes = quantizer.codes(wider)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < quantizer.levels == 2**fresh.bits
    assert len(codes.unique()) > 2
    assert bitwise_equal(quantizer.decode(codes), quantizer(wider))


@every_observed_quantizer
def test_idempotent_and_zero_stays_zero(fresh, observer):
    x = data(fresh)
    quantizer = frozen_on(x, fresh, observer)
    once = quantizer(x * 1.3)
    assert bitwise_equal(quantizer(once), once)
    assert bitwise_equal(quantizer(torch.zeros(2, 6)), torch.zeros(2, 6))
    assert bitwise_equal(quantizer(torch.full((2, 6), -0.0)), torch.zeros(2, 6))


@every_observed_quantizer
def test_monotone_and_bounded(fresh, observer):
    x = data(fresh)
    quantizer = frozen_on(x, fresh, observer)
    reach = 2 * float(x.abs().max())
    ladder = torch.linspace(-reach, reach, 4001)[:, None].expand(-1, 6)
    steps = quantizer(ladder)
    assert bool((steps.diff(dim=0) >= 0).all())
    everything = quantizer.decode(torch.arange(quantizer.levels, dtype=torch.uint8)[:, None].expand(-1, 6))
    assert bool((steps >= everything.amin(0)).all())
    assert bool((steps <= everything.amax(0)).all())
    assert bool((everything.amax(0)[:5] <= 2 * x.amax()).all())


@every_observed_quantizer
def test_ranges_are_ordered_and_inside_what_was_seen(fresh, observer):
    rows = data(fresh).T.contiguous()
    low, high = rows.aminmax(dim=1)
    new_low, new_high = observer.choose(rows, low, high, fresh)
    assert new_low.shape == new_high.shape == low.shape
    assert bool((new_low <= new_high).all())
    # shrinking a range moves it towards zero, which every quantizer's range contains
    assert bool((new_low >= low.clamp(max=0)).all())
    assert bool((new_high <= high.clamp(min=0)).all())


@every_observed_quantizer
def test_restored_from_its_tensors_it_is_the_same_to_the_bit(fresh, observer):
    x = data(fresh)
    quantizer = frozen_on(x, fresh, observer)
    tensors = quantizer.tensors()
    again = attrs.evolve(quantizer)
    assert not again.frozen
    again.restore({name: t.clone() for name, t in tensors.items()})
    assert again.frozen
    assert bitwise_equal(again(x * 1.1), quantizer(x * 1.1))
    assert all(
        torch.equal(again.tensors()[name], t) and again.tensors()[name].dtype == t.dtype for name, t in tensors.items()
    )
    assert set(again.state_dict()) == set(tensors)


@every_observed_quantizer
@pytest.mark.parametrize("constant", [2.5, 0.0, -2.5, 1e-44, 5e37])
def test_constant_tensors_have_usable_parameters(fresh, observer, constant):
    x = allowed(torch.full((8, 6), constant), fresh)
    quantizer = frozen_on(x, fresh, observer)
    scale = quantizer.tensors()["scale"]
    assert bool((scale.isfinite() & (scale >= torch.finfo(torch.float32).tiny)).all())
    y = quantizer(x)
    assert bool(y.isfinite().all())
    assert float((y - x).abs().max()) <= float(scale.max()) / 2
    assert bool(quantizer(torch.full((1, 6), 3e38)).isfinite().all())


@every_quantizer
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_refused(fresh, poison):
    x = data(fresh)
    x[3, :2] = poison
    quantizer = attrs.evolve(fresh)
    with pytest.raises(NonFiniteError, match="2 of 384 observed values"):
        quantizer.observe(x)
    with pytest.raises(SpdfqError, match="observed nothing"):
        quantizer.freeze()


@every_quantizer
def test_unfrozen_or_unobserved_use_says_what_to_do(fresh):
    quantizer = attrs.evolve(fresh)
    x = data(fresh)
    for use in (quantizer, quantizer.codes, quantizer.decode):
        with pytest.raises(SpdfqError, match=r"observe\(x\) and freeze\(\)"):
            use(x)
    with pytest.raises(SpdfqError, match="not frozen"):
        quantizer.tensors()
    with pytest.raises(SpdfqError, match="before freeze"):
        quantizer.freeze()
    assert quantizer.state_dict() == {}
    with pytest.raises(DataError, match="empty"):
        quantizer.observe(torch.zeros(0, 6))


@every_quantizer
def test_nan_has_no_code_and_is_not_hidden(fresh):
    quantizer = frozen_on(data(fresh), fresh)
    x = torch.full((1, 6), math.nan)
    assert bool(quantizer(x).isnan().all())
    with pytest.raises(NonFiniteError, match="6 of 6"):
        quantizer.codes(x)


@every_quantizer
def test_autocast_and_low_precision_inputs(fresh):
    x = data(fresh)
    quantizer = frozen_on(x, fresh)
    plain = quantizer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bitwise_equal(quantizer(x), plain)
        assert bitwise_equal(frozen_on(x, fresh)(x), plain)
    half = x.bfloat16()
    assert quantizer(half).dtype == torch.bfloat16
    assert torch.equal(quantizer(half), quantizer(half.float()).bfloat16())
    assert quantizer(x.double()).dtype == torch.float64


@every_quantizer
def test_copies_and_casts(fresh):
    x = data(fresh)
    quantizer = frozen_on(x, fresh)
    plain = quantizer(x)
    twin = copy.deepcopy(quantizer)
    twin.restore({name: torch.ones_like(t) for name, t in twin.tensors().items()})
    assert bitwise_equal(quantizer(x), plain)
    assert not attrs.evolve(quantizer, bits=3).frozen
    assert bitwise_equal(nn.Sequential(quantizer).bfloat16()(x), plain)
    assert {t.device.type for t in copy.deepcopy(quantizer).to("meta").tensors().values()} == {"meta"}


@every_kind
def test_batches_in_turn_are_as_good_as_at_once(fresh):
    x = data(fresh)
    parts = attrs.evolve(fresh)
    for part in x.split(10):
        parts.observe(part)
    for observer in (OBSERVERS["minmax"], OBSERVERS["percentile_mse"], OBSERVERS["grid_mse"]):
        other = copy.deepcopy(parts)
        other.freeze(observer())
        assert bitwise_equal(other(x), frozen_on(x, fresh, observer())(x))


@every_quantizer
def test_observing_again_starts_afresh_and_keeps_the_old_range_meanwhile(fresh):
    x = data(fresh)
    quantizer = frozen_on(x * 100, fresh)
    before = quantizer(x)
    quantizer.observe(x)
    assert bitwise_equal(quantizer(x), before)
    quantizer.freeze()
    assert bitwise_equal(quantizer(x), frozen_on(x, fresh)(x))
    assert not torch.equal(quantizer(x), before)


@every_quantizer
def test_gradients_are_finite_and_vanish_where_clamped(fresh):
    x = data(fresh)
    quantizer = frozen_on(x, fresh)
    wide = torch.cat([x, x * 1e4, torch.full((1, 6), 3e38)]).requires_grad_()
    quantizer(wide).sum().backward()
    assert bool(wide.grad.isfinite().all())
    assert bool((wide.grad[-1] == 0).all())
    assert bool((wide.grad[: len(x)] != 0).any())


@every_quantizer
def test_damaged_tensors_are_refused(fresh):
    quantizer = frozen_on(data(fresh), fresh)
    good = quantizer.tensors()
    bad = [
        {},
        good | {"extra": torch.ones(())},
        good | {"scale": good["scale"].double()},
        good | {"scale": good["scale"] * 0},
        good | {"scale": -good["scale"]},
        good | {"scale": good["scale"] * math.nan},
        good | {"scale": good["scale"] * math.inf},
        good | {"scale": good["scale"][None]},
    ]
    for tensors in bad:
        again = attrs.evolve(quantizer)
        with pytest.raises(DataError):
            again.restore(tensors)
        assert not again.frozen


class Spy(Observer):
    """Keeps the samples it was handed."""

    def choose(self, samples, low, high, quantizer):
        self.samples, self.low, self.high = samples, low, high
        return low, high


@every_kind
def test_a_huge_tensor_is_observed_in_bounded_memory(fresh):
    quantizer, spy = attrs.evolve(fresh), Spy()
    quantizer.observe(torch.zeros(1).expand(2**24 + 2).reshape(-1, 6))
    for _ in range(3):
        quantizer.observe(torch.ones(1).expand(2**18, 6))
    quantizer.freeze(spy)
    assert 2**15 < spy.samples.numel() <= 2**20
    assert (spy.low.unique().tolist(), spy.high.unique().tolist()) == ([0.0], [1.0])
    # the later batches are 3 * 2**18 * 6 of all values
    share = 3 * 2**18 * 6 / (2**24 + 2 + 3 * 2**18 * 6)
    assert float(spy.samples.mean()) == pytest.approx(share, abs=1e-3)


# sampling


def test_thinning_looks_at_every_feature_equally():
    x = torch.zeros(4096, 768)
    x[:, 5] = 1.0
    spy = Spy()
    frozen_on(x, UniformQuantizer(), spy)
    assert spy.samples.numel() < x.numel()
    assert float(spy.samples.mean()) == pytest.approx(1 / 768, rel=0.02)


def test_the_rows_of_a_large_weight_keep_at_least_1024_samples():
    spy = Spy()
    frozen_on(torch.ones(1).expand(2304, 768), UniformQuantizer(granularity="channel"), spy)
    assert spy.samples.shape == (2304, 768)


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
    with pytest.raises(DataError, match="exceeds 15"):
        UniformQuantizer(bits=4).restore(tensors)
    channels = {"scale": torch.ones(3), "zero_point": torch.zeros(2, dtype=torch.uint8)}
    with pytest.raises(DataError, match="differ in length"):
        UniformQuantizer(granularity="channel").restore(channels)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8, not 1"),
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": True}, "from 2 to 8"),
        ({"bits": 4.0}, "from 2 to 8"),
        ({"granularity": "group"}, 'granularity must be "tensor" or "channel", not \'group\''),
        ({"symmetric": 1}, "symmetric must be true or false"),
        ({"axis": 0.5}, "axis must be a whole number"),
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
    with pytest.raises(DataError, match=r"from 0 up, but observed -0\.5"):
        Log2Quantizer().observe(tensor([0.1, -0.5]))


# observers


def test_minmax_is_exact_although_samples_are_thinned():
    x = torch.zeros(2**21 + 1)
    x[123457], x[76543] = 3.0, -1.5
    assert float(frozen_on(x, UniformQuantizer(bits=2)).scale) == 1.5


@pytest.mark.parametrize("count", [1, 2, 999, 5000])
@pytest.mark.parametrize("fraction", [0.6, 0.999, 1.0])
def test_percentile_candidates_agree_with_numpy(count, fraction):
    samples = torch.randn(3, count, generator=torch.Generator().manual_seed(2))
    low, high = samples.aminmax(dim=1)
    observer = PercentileMseObserver(percentiles=(fraction,))
    chosen = observer.choose(samples, low, high, UniformQuantizer())
    for side, p in zip(chosen, (1 - fraction, fraction), strict=True):
        np.testing.assert_allclose(
            side, np.quantile(samples.numpy().astype(np.float64), p, axis=1), rtol=1e-5, atol=1e-6
        )


def test_percentile_cuts_off_a_lone_outlier_row_by_row():
    x = torch.rand(2, 20000, generator=torch.Generator().manual_seed(3))
    x[0, 7] = 12.0
    quantizer = frozen_on(x, UniformQuantizer(granularity="channel"), PercentileMseObserver())
    assert quantizer.scale.tolist() == pytest.approx([1 / 15, 1 / 15], rel=0.01)


@pytest.mark.parametrize("fresh", [UniformQuantizer(bits=3), UniformQuantizer(symmetric=True), Log2Quantizer(bits=3)])
def test_mse_observers_are_no_worse_than_any_candidate(fresh):
    x = allowed(torch.randn(4, 3000, generator=torch.Generator().manual_seed(4)), fresh) ** 3
    low, high = x.aminmax(dim=1)

    def error(chosen):
        return (fresh.quantize_with(x, fresh.fitted(*chosen)) - x).square().mean(1)

    best = error(GridMseObserver(steps=9, smallest=0.2).choose(x, low, high, fresh))
    for tenth in range(2, 11):
        assert bool((best <= error((low * tenth / 10, high * tenth / 10)) * (1 + 1e-5)).all())
    assert bool((best < error((low, high))).any())


def test_least_error_mixes_candidates_by_row_and_keeps_the_first_of_equals():
    x = tensor([[0.0, 3.0], [0.0, 1.0]])
    one, three = tensor([1.0, 1.0]), tensor([3.0, 3.0])
    zero = torch.zeros(2)
    # with 4 codes, high 3 gives steps of 1 (exact for both rows), high 1 clamps row 0
    low, high = least_error([(zero, one), (zero, three)], x, UniformQuantizer(bits=2))
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [3.0, 1.0])


@pytest.mark.parametrize(
    "build",
    [
        lambda: PercentileMseObserver(percentiles=()),
        lambda: PercentileMseObserver(percentiles=(0.5,)),
        lambda: PercentileMseObserver(percentiles=(99.9,)),
        lambda: GridMseObserver(steps=1),
        lambda: GridMseObserver(steps=2.0),
        lambda: GridMseObserver(smallest=0.0),
        lambda: GridMseObserver(smallest=1.0),
    ],
)
def test_observers_explain_wrong_options(build):
    with pytest.raises(ValueError, match="must "):
        build()


def test_observers_are_values():
    assert MinMaxObserver() == MinMaxObserver()
    assert GridMseObserver(steps=3) != GridMseObserver()
