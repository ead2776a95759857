"""Observers: the ranges they choose from what was observed."""

import attrs
import numpy as np
import pytest
import torch
from support.quantizers import OBSERVERS, allowed, bitwise_equal, data, frozen_on, squares, tensor
from support.registered import made

from spdfq.quantizers import (
    AdaptiveLogQuantizer,
    GridMseObserver,
    Log2Quantizer,
    MinMaxObserver,
    PercentileMseObserver,
    PowerOfTwoFactorQuantizer,
    Product,
    ProgressiveObserver,
    RunningMinMaxObserver,
    UniformQuantizer,
    searched,
)
from spdfq.quantizers.observers import least_error
from spdfq.quantizers.statistics import Statistics

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
    with pytest.raises(ValueError, match=r"must |expected a whole number, got 2\.0"):
        build()


def test_observers_are_values():
    assert MinMaxObserver() == MinMaxObserver()
    assert GridMseObserver(steps=3) != GridMseObserver()


# observers


def test_running_minmax_closed_form():
    # 0.9 of the first batch and 0.1 of the second: low -1 -> -1.2, high 2 -> 2.3
    quantizer = UniformQuantizer(bits=2)
    quantizer.observe(tensor([-1.0, 2.0]))
    quantizer.observe(tensor([-3.0, 5.0]))
    quantizer.freeze(RunningMinMaxObserver())
    assert float(quantizer.scale) == pytest.approx((2.3 + 1.2) / 3)


def test_running_minmax_of_one_batch_is_minmax_and_of_channels_goes_channel_by_channel():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    channels = UniformQuantizer(granularity="channel", axis=1)
    assert bitwise_equal(frozen_on(x, channels, RunningMinMaxObserver())(x), frozen_on(x, channels)(x))
    for part in x.split(5):
        channels.observe(part)
    channels.freeze(RunningMinMaxObserver(momentum=0.5))
    lows, highs = (torch.stack(side) for side in zip(*(part.aminmax(dim=0) for part in x.split(5)), strict=True))
    weights = tensor([0.125, 0.125, 0.25, 0.5])
    torch.testing.assert_close(channels.scale, (weights @ highs - weights @ lows) / 15)


@pytest.mark.parametrize("fresh", [UniformQuantizer(bits=3), UniformQuantizer(bits=2, symmetric=True), Log2Quantizer()])
def test_progressive_comes_close_to_a_full_search_of_both_ends(fresh):
    x = allowed(torch.randn(3, 500, generator=torch.Generator().manual_seed(4)) ** 3 + 0.3, fresh)
    low, high = x.aminmax(dim=1)
    factors = torch.linspace(0.16, 1, 29).tolist()
    pairs = [(lower, upper) for lower in factors[:: 1 if fresh.signed else 29] for upper in factors]
    full = torch.stack([fresh.error(x, fresh.fitted(low * lower, high * upper)) for lower, upper in pairs]).amin(0)
    found = fresh.error(x, fresh.fitted(*ProgressiveObserver().choose(x, low, high, fresh)))
    assert bool((found <= 1.05 * full).all())
    assert bool((found < fresh.error(x, fresh.fitted(low, high))).any())


def test_progressive_judges_each_row_of_a_large_weight_by_enough_of_it():
    x = torch.randn(1536, 384, generator=torch.Generator().manual_seed(0))
    fresh = UniformQuantizer(granularity="channel")
    plain, found = (squares(x, frozen_on(x, fresh, observer)) for observer in (MinMaxObserver(), ProgressiveObserver()))
    assert found < 0.85 * plain


@pytest.mark.parametrize("features", [256, 96, 210])
def test_samples_are_thinned_without_leaving_out_features(features):
    x = torch.arange(features).float().expand(4, 50, features)
    seen = UniformQuantizer()
    seen.observe(x)
    for count in (2000, 5000, 11000, 10**6):
        thinned = seen._statistics.thinned(count)
        assert len(thinned.unique()) == features
        assert thinned.shape[1] < 2 * count


def test_progressive_sees_features_far_from_all_others():
    x = torch.randn(32, 64, 256, generator=torch.Generator().manual_seed(0)) * 0.3
    x[..., 1] += 4
    x[..., 130] -= 4
    errors = [squares(x, frozen_on(x, UniformQuantizer(), each)) for each in (ProgressiveObserver(), GridMseObserver())]
    assert errors[0] < 1.05 * errors[1]


def test_a_base_is_judged_by_all_features(monkeypatch):
    x = torch.randn(32, 50, 768, generator=torch.Generator().manual_seed(0))
    x *= torch.where(torch.arange(768) % 2 == 0, 0.1, 1.5)
    x = torch.nn.functional.gelu(x)
    by_a_part = squares(x, frozen_on(x, AdaptiveLogQuantizer(shift=0.17)))
    monkeypatch.setattr(searched, "_JUDGED_VALUES", 2**30)
    assert by_a_part < 1.01 * squares(x, frozen_on(x, AdaptiveLogQuantizer(shift=0.17)))


def test_progressive_spends_no_candidates_on_an_end_that_plays_no_part():
    judged = []

    class Counting(AdaptiveLogQuantizer):
        def error(self, samples, parameters):
            judged.append(float(parameters["scale"]))
            return super().error(samples, parameters)

    fresh, x = Counting(shift=0.17), torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).clamp(min=-0.17)
    ProgressiveObserver().choose(x, *x.aminmax(dim=1), fresh)
    assert len(judged) == 6 + 3 * 9


def test_factors_of_channels_are_judged_by_values_where_others_are_by_outputs():
    fresh = PowerOfTwoFactorQuantizer()
    x = data(fresh)
    fresh.observe(x)
    fresh.freeze(PercentileMseObserver(), Product(x, lambda operand: operand.sum(1)))
    assert bitwise_equal(fresh(x), frozen_on(x, PowerOfTwoFactorQuantizer(), PercentileMseObserver())(x))


@pytest.mark.parametrize(("channels", "length"), [(768, 3072), (1024, 4096), (768, 6304)])
def test_at_least_a_thousand_values_of_a_row_are_kept(channels, length):
    rows = torch.zeros(channels, length)
    seen = Statistics(rows)
    seen.add(rows, *rows.aminmax(dim=1))
    assert 2**10 <= seen.samples.shape[1] < 2**13


@pytest.mark.parametrize("fresh", [UniformQuantizer(), UniformQuantizer(granularity="channel", axis=-1)], ids=str)
def test_what_is_kept_of_many_values_does_not_depend_on_the_size_of_batches(fresh):
    x = torch.randn(24, 50, 960, generator=torch.Generator().manual_seed(0)) ** 3  # 1.15 million

    def kept(batch):
        quantizer = attrs.evolve(fresh)
        for part in x.split(batch):
            quantizer.observe(part)
        return quantizer._statistics.samples

    assert all(torch.equal(kept(24), kept(batch)) for batch in (10, 7, 1))


def test_a_product_has_candidates_judged_by_its_output():
    # the second input is never anything but 0, so an output error ignores its large weight
    weight, inputs = tensor([[0.7, 100.0], [0.7, -0.2]]), tensor([[1.0, 0.0], [-2.0, 0.0]])
    product = Product(weight, lambda operand: inputs @ operand.T, channels=1)
    fresh = UniformQuantizer(bits=4, symmetric=True, granularity="channel")
    observer = GridMseObserver(steps=1000, smallest=0.001)
    by_value, by_output = frozen_on(weight, fresh, observer), attrs.evolve(fresh)
    by_output.observe(weight)
    by_output.freeze(observer, product)
    assert float(by_value.scale[0]) > 5
    assert abs(float(by_output(weight)[0, 0]) - 0.7) < 0.01
    assert by_output.scale.shape == (2,)


def test_the_error_of_a_product_closed_form():
    # steps of 1: [0.4, 2.0] -> [0, 2]; the outputs 2 * 0.4 and 3 * 2.0 become 0 and 6: (0.8**2 + 0) / 2
    operand = tensor([0.4, 2.0])
    quantizer = UniformQuantizer(bits=2)
    quantizer._product = Product(operand, lambda x: x * tensor([2.0, 3.0]))
    parameters = {"scale": tensor([1.0]), "zero_point": torch.zeros(1, dtype=torch.uint8)}
    assert quantizer.error(operand[None], parameters).tolist() == pytest.approx([0.32])
    # per output channel, where the output has one for each row of the operand
    weight = tensor([[0.4], [2.2]])
    channels = UniformQuantizer(bits=2, granularity="channel")
    channels._product = Product(weight, lambda w: tensor([[1.0], [3.0]]) @ w.T, channels=-1)
    parameters = {"scale": tensor([1.0, 1.0]), "zero_point": torch.zeros(2, dtype=torch.uint8)}
    # rows are off by 0.4 and 0.2, times 1 and 3: 0.16 * (1 + 9) / 2 and 0.04 * 5
    assert channels.error(weight, parameters).tolist() == pytest.approx([0.8, 0.2], rel=1e-5)


def test_a_product_is_forgotten_after_freezing():
    x = tensor([[0.0, 3.0]])
    quantizer = UniformQuantizer(bits=2)
    quantizer.observe(x)
    quantizer.freeze(MinMaxObserver(), Product(x, lambda operand: operand))
    assert quantizer._product is None


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_take_dead_channels(observer):
    x = torch.zeros(50, 2)
    quantizer = frozen_on(x, UniformQuantizer(granularity="channel", axis=1), made("observer", observer))
    assert quantizer.scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "build",
    [
        lambda: RunningMinMaxObserver(momentum=1.0),
        lambda: RunningMinMaxObserver(momentum=-0.1),
        lambda: ProgressiveObserver(steps=1),
        lambda: ProgressiveObserver(smallest=1.0),
        lambda: PercentileMseObserver(percentiles=(0.2,)),
    ],
)
def test_searching_observers_explain_wrong_options(build):
    with pytest.raises(ValueError, match=r"must |expected a whole number, got 2\.0"):
        build()
