"""Closed forms of the quantizers beyond uniform and log2, on vectors computed by hand."""

import math

import attrs
import pytest
import torch
from support.quantizers import FRESH, QUANTIZERS, bitwise_equal, data, frozen_on, squares, tensor

from spdfq.errors import DataError, NonFiniteError
from spdfq.quantizers import (
    AdaptiveLogQuantizer,
    DualUniformQuantizer,
    GridMseObserver,
    Log2Quantizer,
    LogSqrt2Quantizer,
    PowerOfTwoFactorQuantizer,
    ShiftUniformLog2Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    learned_scales,
)
from spdfq.quantizers.cpu_tables import StepTable


def byte(number):
    return torch.tensor(number, dtype=torch.uint8)


def restored(quantizer, **tensors):
    quantizer.restore(tensors)
    return quantizer


def gradient(quantizer, numbers):
    x = tensor(numbers).requires_grad_()
    quantizer(x).sum().backward()
    return x.grad.tolist()


# what an integer runtime needs


@pytest.mark.parametrize("name", ["uniform", "log2", "twin_uniform", "dual_uniform", "power_of_two_factor"])
def test_integers_alone_run(name):
    assert QUANTIZERS[name].integers == "yes"


@pytest.mark.parametrize("name", ["log_sqrt2", "adaptive_log", "shift_uniform_log2"])
def test_integers_and_tables_run(name):
    assert QUANTIZERS[name].integers == "with tables"


@pytest.mark.parametrize("fresh", FRESH)
def test_the_fast_path_is_the_two_functions_one_after_the_other(fresh):
    quantizer = frozen_on(data(fresh), fresh)
    x = torch.cat([data(fresh, seed=1) * 1.5, -data(fresh)[:9]])
    fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    laid = quantizer._broadcast(x, quantizer.tensors())
    one, other = quantizer(fast), quantizer.reconstruct(quantizer.encode(slow, laid), laid)
    assert bitwise_equal(one.detach(), other.detach())
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    (one * weights).sum().backward()
    (other * weights).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=1e-6)


# log_sqrt2


def test_log_sqrt2_closed_form():
    # d = 0.8, n = 8: 0.8 * 2**(-q / 2) for q = 0 .. 6, and zero; boundaries lie at 2**(-(q + 1/2) / 2)
    quantizer = frozen_on(tensor([0.8, 0.1]), LogSqrt2Quantizer(bits=3))
    x = 0.8 * tensor([1.0, 2**-0.24, 2**-0.26, 2**-0.5, 2**-3.0, 2**-3.24, 2**-3.26, 0.0, 5.0, -1.0])
    assert quantizer.codes(x).tolist() == [0, 0, 1, 1, 6, 6, 7, 7, 0, 7]
    root = 0.8 * math.sqrt(0.5)
    assert quantizer(x).tolist() == pytest.approx([0.8, 0.8, root, root, 0.1, 0.1, 0.0, 0.0, 0.8, 0.0], rel=1e-6)
    # value / x: 0.8 -> 0.8, 0.6 -> 0.8 * 2**-0.5
    assert gradient(quantizer, [0.8, 0.6, 0.0, 1e-6, 2.0]) == pytest.approx([1.0, root / 0.6, 0.0, 0.0, 0.0], rel=1e-5)


def test_log_sqrt2_at_even_codes_is_log2():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    fine = frozen_on(x, LogSqrt2Quantizer(bits=5))
    powers = frozen_on(x, Log2Quantizer(bits=4))(x)
    assert bitwise_equal(fine(powers[powers > 0]), powers[powers > 0])
    assert (fine.codes(powers[powers > 0]) % 2 == 0).all()


# adaptive_log


def test_adaptive_log_with_base_two_is_log2():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4
    plain = frozen_on(x, Log2Quantizer(bits=4))
    adaptive = restored(AdaptiveLogQuantizer(bits=4), scale=plain.scale, base=byte(37))
    assert bitwise_equal(adaptive(x), plain(x))
    assert torch.equal(adaptive.codes(x), plain.codes(x))


def test_adaptive_log_closed_form():
    # q = 55, n = 8: exponents 55 / 37 = 1 + 18/37 and 110 / 37 = 2 + 36/37; the table has multiples of 1 / 14:
    # 2**(-18/37) = 0.714 -> 10/14 and 2**(-36/37) = 0.509 -> 7/14
    quantizer = restored(AdaptiveLogQuantizer(bits=3), scale=tensor(2.0), base=byte(55))
    assert quantizer.decode(torch.arange(3, dtype=torch.uint8)).tolist() == pytest.approx([2.0, 5 / 7, 0.25])
    # a value goes to the nearest by its ratio: the middle of 2 and 5/7 is sqrt(10/7) = 1.195
    assert quantizer.codes(tensor([2.0, 1.2, 1.19, 0.43, 0.42, 0.0, -1.0, 9.0])).tolist() == [0, 0, 1, 1, 2, 7, 7, 0]


@pytest.mark.parametrize("base", [10, 20, 61, 138])
def test_adaptive_log_finds_the_base_of_its_data(base):
    x = 3.0 * 2 ** (-torch.arange(14.0) * base / 37)
    quantizer = frozen_on(x.repeat(3), AdaptiveLogQuantizer(bits=4))
    found = squares(x, quantizer)
    errors = {
        q: squares(x, restored(AdaptiveLogQuantizer(bits=4), scale=quantizer.scale, base=byte(q)))
        for q in range(10, 139)
    }
    assert found <= min(errors[q] for q in range(max(base - 5, 10), min(base + 6, 139)))
    assert abs(int(quantizer.base) - base) <= 3


def test_adaptive_log_with_a_shift_takes_gelu_outputs():
    x = torch.nn.functional.gelu(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    quantizer = frozen_on(x, AdaptiveLogQuantizer(bits=4, shift=0.17))
    unshifted = restored(AdaptiveLogQuantizer(bits=4), **quantizer.tensors())
    assert bitwise_equal(quantizer(x), unshifted(x + 0.17) - 0.17)
    assert torch.equal(quantizer.codes(x), unshifted.codes(x + 0.17))
    torch.testing.assert_close(quantizer.scale, x.max() + 0.17)
    assert quantizer(tensor([-0.17, -5.0])).tolist() == pytest.approx([-0.17, -0.17])
    assert squares(x, quantizer) < 0.1 * float(x.var())


@pytest.mark.parametrize("shift", [-0.1, 1.0])
def test_a_shift_out_of_range_is_refused(shift):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        AdaptiveLogQuantizer(shift=shift)


def test_a_base_out_of_range_is_refused():
    with pytest.raises(DataError, match="stored base must lie in 0 to 138"):
        AdaptiveLogQuantizer().restore({"scale": tensor(1.0), "base": byte(139)})


# shift_uniform_log2


def test_shift_uniform_log2_closed_form():
    # e = 1/2, n = 4: the grid of log2(x + e) goes from log2(1.5) = 0.585 to -1 in steps of 0.528: 0.585, 0.057, -0.472,
    # -1; rounded 1, 0, 0: 2 - 0.5, 1 - 0.5, 1 - 0.5, and zero; boundaries at 2**0.321 - 0.5 = 0.749, 0.366 and 0.1005
    quantizer = restored(ShiftUniformLog2Quantizer(bits=2), scale=tensor(1.0), shift=tensor(0.5))
    x = tensor([1.0, 0.76, 0.74, 0.37, 0.36, 0.11, 0.1, 0.0, -3.0, 7.0])
    assert quantizer.codes(x).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 0]
    assert quantizer(x).tolist() == [1.5, 1.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.5]
    # (value + e) / (x + e)
    assert gradient(quantizer, [0.74, 0.36, 0.1, 7.0]) == pytest.approx([1 / 1.24, 1 / 0.86, 0.0, 0.0])


def test_shift_uniform_log2_takes_the_shift_of_least_error():
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) ** 6
    quantizer = frozen_on(x, ShiftUniformLog2Quantizer(bits=4))
    shifts = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
    every = [
        squares(x, restored(ShiftUniformLog2Quantizer(bits=4), scale=quantizer.scale, shift=tensor(shift)))
        for shift in shifts
    ]
    assert squares(x, quantizer) == min(every) < 0.9 * sorted(every)[5]


# twin_uniform


def test_twin_uniform_by_magnitude_closed_form():
    # h = 4: 0, 0.1, 0.2, 0.3 and, four times as coarse, 0.4, 0.8, 1.2; between 0.3 and 0.4 the middle decides
    quantizer = restored(TwinUniformQuantizer(bits=3), scale=tensor(0.1), exponent=byte(2))
    x = tensor([0.04, 0.06, 0.29, 0.34, 0.36, 0.61, 0.59, 1.5, -1.0])
    assert quantizer.codes(x).tolist() == [0, 1, 3, 3, 5, 6, 5, 7, 0]
    assert quantizer(x).tolist() == pytest.approx([0.0, 0.1, 0.3, 0.3, 0.4, 0.8, 0.4, 1.2, 0.0])
    assert gradient(quantizer, [0.06, 0.36, 0.61, 1.5, -1.0]) == pytest.approx([1.0, 1.0, 1.0, 0.0, 0.0])


def test_twin_uniform_by_sign_closed_form():
    # h = 4: 0, -0.05, -0.1, -0.15 below zero and 0, 0.4, 0.8, 1.2 above; zero is code 4
    quantizer = restored(TwinUniformQuantizer(bits=3, split="sign"), scale=tensor(0.05), exponent=byte(3))
    x = tensor([-0.2, -0.06, -0.02, 0.0, 0.19, 0.21, 1.1, 9.0])
    assert quantizer.codes(x).tolist() == [3, 1, 4, 4, 4, 5, 7, 7]
    assert quantizer(x).tolist() == pytest.approx([-0.15, -0.05, 0.0, 0.0, 0.0, 0.4, 1.2, 1.2])
    assert gradient(quantizer, [-0.2, -0.06, 0.21, 9.0]) == pytest.approx([0.0, 1.0, 1.0, 0.0])


def test_twin_uniform_aligns_its_grids_by_a_power_of_two_and_ends_at_the_range():
    softmax = torch.rand(4000, generator=torch.Generator().manual_seed(0)) ** 20
    quantizer = frozen_on(softmax, TwinUniformQuantizer(bits=4))
    assert float(quantizer(softmax.max())) == pytest.approx(float(softmax.max()))
    small = softmax[softmax < 0.05]
    assert squares(small, quantizer) < 0.5 * squares(small, frozen_on(softmax, UniformQuantizer(bits=4)))
    gelu = torch.nn.functional.gelu(torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 2)
    quantizer = frozen_on(gelu, TwinUniformQuantizer(bits=4, split="sign"))
    assert float(quantizer(gelu.min())) == pytest.approx(float(gelu.min()))
    below = gelu[gelu < 0]
    assert squares(below, quantizer) < 0.5 * squares(below, frozen_on(gelu, UniformQuantizer(bits=4)))


@pytest.mark.parametrize("exponent", [1, 7, 15])
def test_twin_uniform_finds_the_exponent_of_its_data(exponent):
    x = torch.tensor([1.0] + [2.0**-exponent] * 50)
    quantizer = frozen_on(x, TwinUniformQuantizer(bits=2))
    assert quantizer.exponent == exponent
    assert torch.equal(quantizer(x), x)


def test_twin_uniform_refuses_another_split():
    with pytest.raises(ValueError, match="split"):
        TwinUniformQuantizer(split="half")


# power_of_two_factor


def test_power_of_two_factor_closed_form():
    # all channels: [0, 2.4] in 3 steps, so s = 0.8 / 8 = 0.1; a channel up to 0.3 has factor 1, one up to 0.6 factor 2
    x = tensor([[0.0, 0.0, 0.0], [0.8, 0.1, 0.2], [1.6, 0.2, 0.4], [2.4, 0.3, 0.6]])
    quantizer = frozen_on(x, PowerOfTwoFactorQuantizer(bits=2))
    assert quantizer.exponent.tolist() == [3, 0, 1]
    assert float(quantizer.scale) == pytest.approx(0.1)
    assert quantizer.scale.shape == quantizer.zero_point.shape == ()
    torch.testing.assert_close(quantizer(x), x)
    assert quantizer.codes(x).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_power_of_two_factor_shares_the_zero_point_of_the_whole_range():
    # [-3, 12] in 15 steps of 1: z = 3, s = 1/8; the second channel reaches from -3/8 to 12/8 in steps of 1/8
    x = tensor([[-3.0, -0.375], [12.0, 1.5], [5.0, 0.625]])
    quantizer = frozen_on(x, PowerOfTwoFactorQuantizer(bits=4))
    assert (float(quantizer.scale), int(quantizer.zero_point), quantizer.exponent.tolist()) == (0.125, 3, [3, 0])
    assert torch.equal(quantizer(x), x)


def test_power_of_two_factor_beats_one_scale_and_refuses_other_lengths():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * tensor([1, 1, 1, 1, 8, 8, 0.1, 4])
    quantizer = frozen_on(x, PowerOfTwoFactorQuantizer(bits=4))
    assert squares(x, quantizer) < 0.7 * squares(x, frozen_on(x, UniformQuantizer(bits=4)))
    with pytest.raises(DataError, match="frozen for 8 channels"):
        quantizer(x[:, :5])


# dual_uniform


def test_dual_uniform_closed_form():
    # steps of 0.1 (row 0) and 0.2 (row 1), but for column 7 with steps of 3 and 5; 5 % of 20 columns is one
    weight = tensor([[0.1, -0.3, 0.2, 0.0] * 5, [0.6, 0.2, -0.4, 0.2] * 5])
    weight[:, 7] = tensor([9.0, -15.0])
    quantizer = frozen_on(weight, DualUniformQuantizer(bits=3, symmetric=True, granularity="channel"))
    assert quantizer.outlier.nonzero().flatten().tolist() == [7]
    assert quantizer.scale.tolist() == pytest.approx([0.1, 0.2])
    assert quantizer.outlier_scale.tolist() == pytest.approx([3.0, 5.0])
    torch.testing.assert_close(quantizer(weight), weight)
    plain = frozen_on(weight, UniformQuantizer(bits=3, symmetric=True, granularity="channel"))
    assert (plain(weight)[:, :7] == 0).all()


def test_dual_uniform_without_outlying_columns_is_uniform():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    options = {"bits": 4, "symmetric": True, "granularity": "channel"}
    dual = frozen_on(weight, DualUniformQuantizer(**options), GridMseObserver())
    assert int(dual.outlier.sum()) == 0
    assert bitwise_equal(dual(weight), frozen_on(weight, UniformQuantizer(**options), GridMseObserver())(weight))


def test_dual_uniform_sets_no_column_without_an_outlier_apart():
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    # one of 100 values of a row is an outlier, and five columns could be set apart
    weight[:, 40], weight[:, 41] = 50.0, 20.0
    quantizer = frozen_on(weight, DualUniformQuantizer(granularity="channel", share=0.05))
    assert quantizer.outlier.nonzero().flatten().tolist() == [40]


def test_dual_uniform_takes_convolutions():
    weight = torch.randn(4, 30, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[:, 11] *= 50
    quantizer = frozen_on(weight, DualUniformQuantizer(symmetric=True, granularity="channel"))
    assert quantizer.outlier.nonzero().flatten().tolist() == [11]
    assert quantizer.scale.shape == quantizer.outlier_scale.shape == (4,)
    assert bitwise_equal(quantizer.decode(quantizer.codes(weight)), quantizer(weight))


def test_dual_uniform_explains_wrong_options():
    with pytest.raises(DataError, match="on the axis of its columns"):
        DualUniformQuantizer(granularity="channel", columns=0).observe(torch.rand(3, 4))
    with pytest.raises(ValueError, match="a share of all columns"):
        DualUniformQuantizer(share=0.0)


# many numbers at once


def just_around(edges):
    """Float32 numbers at the edges, and three to either side."""
    near = [edges]
    for end in (0.0, torch.inf):
        step = edges
        for _ in range(3):
            step = step.nextafter(torch.full_like(edges, end))
            near.append(step)
    return torch.cat(near)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("top", [1.0, 0.37, 3e4, 1e-12])
@pytest.mark.parametrize("kind", ["log2", "log_sqrt2", "adaptive_log", "shift_uniform_log2"])
def test_many_numbers_are_looked_up_as_the_formula_says(kind, top, bits):
    x = top * torch.rand(600000, generator=torch.Generator().manual_seed(bits)) ** 8
    quantizer = frozen_on(x, QUANTIZERS[kind](bits=bits))
    parameters = quantizer._broadcast(x, quantizer.tensors())
    edges = quantizer.grid(parameters).edges * parameters["scale"]
    every = torch.arange(-(2**31), 2**31, 9973).to(torch.int32).view(torch.float32)
    x = torch.cat([x, just_around(edges), every[~every.isnan()], tensor([0.0, -0.0, math.inf, -math.inf])])
    for numbers in (x, x[x >= 0]):
        assert bitwise_equal(quantizer(numbers), quantizer.decode(quantizer.codes(numbers)))
    missing = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -(2**23) + 1], dtype=torch.int32)
    assert quantizer(torch.cat([x, missing.view(torch.float32)]))[-5:].isnan().all()


@pytest.mark.parametrize("zero_point", [0, 1, 6, 7])
def test_the_uniform_gradient_ends_where_rounding_leaves_the_codes(zero_point):
    # s = 1: the outermost codes reach half a step further out, and include the middle where they are even
    quantizer = restored(UniformQuantizer(bits=3), scale=tensor(1.0), zero_point=byte(zero_point))
    low, high = -zero_point, 7 - zero_point
    x = torch.cat([tensor([low - 9, 0.2, high + 9]), just_around(tensor([low - 0.5, high + 0.5]))]).requires_grad_()
    quantizer(x).sum().backward()
    inside = (x.detach().round() >= low) & (x.detach().round() <= high)
    assert 0 < inside.sum() < len(x)
    assert torch.equal(x.grad, inside.float())


def test_channels_may_be_none_and_of_several_zero_points():
    quantizer = restored(UniformQuantizer(granularity="channel"), scale=tensor([]), zero_point=torch.empty(0).byte())
    assert quantizer(torch.empty(0, 5)).shape == (0, 5)
    x = tensor([[-9.0, 0.4, 9.0], [-9.0, 0.4, 9.0]]).requires_grad_()
    options = {"scale": tensor([1.0, 1.0]), "zero_point": torch.tensor([1, 2], dtype=torch.uint8)}
    y = restored(UniformQuantizer(granularity="channel", bits=2), **options)(x)
    assert y.tolist() == [[-1.0, 0.0, 2.0], [-2.0, 0.0, 1.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 0.0]] * 2


def test_steps_are_looked_up_if_they_are_apart():
    values = tensor([3.0, 2.0, 1.0])
    x = tensor([0.4, 0.5, 0.6, 0.75, 0.8, math.inf, -1.0])
    expected = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 1.0]
    for edges in (tensor([0.75, 0.5]), tensor([0.75001, 0.5])):  # of two alike bytes at the end, and not
        steps = StepTable(edges, values)
        assert steps.usable
        assert steps.at(x).tolist() == expected
        assert steps.at(x[:6]).tolist() == expected[:6]
    assert not StepTable(tensor([0.75001, 0.75]), values).usable
    assert not StepTable(tensor([0.75, -0.5]), values).usable
    assert StepTable(tensor([0.75, -0.5]), tensor([3.0, 2.0, 2.0])).usable  # no step at the latter


def test_the_gradient_of_many_logarithms_has_one_itself():
    x = torch.rand(600000, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantizer = frozen_on(x.float(), Log2Quantizer(bits=4))
    leaf, upstream = x.clone().requires_grad_(), torch.ones_like(x).requires_grad_()
    (slope,) = torch.autograd.grad(quantizer(leaf), leaf, upstream, create_graph=True)
    (again,) = torch.autograd.grad(slope.sum(), upstream)
    assert torch.equal(again, slope)


# learned scales


def test_the_gradient_of_a_learned_scale_is_that_of_lsq():
    # s = 0.5, z = 3, 8 codes: -1.5 .. 2; inside round(x / s) - x / s, outside the code without the zero point
    quantizer = restored(UniformQuantizer(bits=3), scale=tensor(0.5), zero_point=byte(3))
    for x, expected in [(0.6, 1 - 1.2), (-0.9, -2 + 1.8), (1.0, 0.0), (9.0, 4.0), (-9.0, -3.0)]:
        with learned_scales([quantizer]) as (scale,):
            value = quantizer(tensor([x]))
            value.sum().backward()
            assert float(scale.grad) == pytest.approx(expected, abs=1e-6)
        plain = quantizer(tensor([x]))
        assert bitwise_equal(value.detach(), plain)
        assert not plain.requires_grad


@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}, {"granularity": "channel", "axis": -1}])
def test_and_so_are_its_sum_and_the_gradient_of_the_input(options):
    x = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(1))
    quantizer = frozen_on(0.7 * x, UniformQuantizer(bits=3, **options))
    gradients = []
    with learned_scales([quantizer]) as (scale,):
        # the formula itself, operation by operation
        for compute in (
            quantizer.dequantized,
            lambda *given: quantizer.reconstruct(quantizer.encode(*given), given[1]),
        ):
            leaf = x.clone().requires_grad_()
            value = compute(leaf, quantizer._broadcast(leaf, quantizer.tensors()))
            gradients.append((value.detach(), *torch.autograd.grad(value, [leaf, scale], upstream)))
    assert bitwise_equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1:], gradients[1][1:], atol=1e-4, rtol=1e-4)


def test_learned_scales_come_closer_to_the_data_and_stay():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    quantizer = frozen_on(x, UniformQuantizer(bits=2))
    before = squares(x, quantizer)
    with learned_scales([quantizer]) as scales:
        optimizer = torch.optim.SGD(scales, lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            (quantizer(x) - x).square().mean().backward()
            optimizer.step()
    assert squares(x, quantizer) < 0.8 * before
    assert not quantizer.scale.requires_grad
    assert quantizer.scale.grad is None
    assert bitwise_equal(restored(attrs.evolve(quantizer), **quantizer.tensors())(x), quantizer(x))


@pytest.mark.parametrize("ruined", [0.0, -1.0, math.nan])
def test_a_scale_that_learning_ruined_is_told(ruined):
    quantizer = restored(UniformQuantizer(bits=3), scale=tensor(0.5), zero_point=byte(3))
    with pytest.raises(NonFiniteError, match="no longer finite and above 0"), learned_scales([quantizer]) as (scale,):
        scale.data.fill_(ruined)
