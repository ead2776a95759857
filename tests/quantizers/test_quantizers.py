"""Contracts of everything registered, quantizers under observers, and the closed forms of the built-in ones."""

import copy
import math

import attrs
import pytest
import torch
from support.quantizers import (
    OBSERVERS,
    QUANTIZERS,
    allowed,
    bitwise_equal,
    data,
    every_kind,
    every_observed_quantizer,
    every_quantizer,
    frozen_on,
)
from torch import nn

from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.quantizers import (
    Observer,
    UniformQuantizer,
)

# contracts: everything registered


def test_the_built_in_names_are_registered():
    assert {"uniform", "log2"} <= set(QUANTIZERS)
    assert {"minmax", "percentile_mse", "grid_mse"} <= set(OBSERVERS)


@every_observed_quantizer
def test_forward_decodes_its_own_codes_bit_for_bit(fresh, observer):
    x = data(fresh)
    quantizer = frozen_on(x, fresh, observer)
    wider = torch.cat([x * 3, -x, x.flip(0)])
    codes = quantizer.codes(wider)
    assert codes.dtype == quantizer.code_dtype
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
    everything = quantizer.decode(torch.arange(quantizer.levels)[:, None].expand(-1, 6))
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
def test_restored_from_its_tensors_it_is_the_same_bit_for_bit(fresh, observer):
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
    rows = x.T.contiguous()
    if all(map(torch.equal, observer.choose(rows, *rows.aminmax(dim=1), fresh), rows.aminmax(dim=1))):
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
def test_observing_again_starts_over_and_keeps_the_old_range_until_frozen(fresh):
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
