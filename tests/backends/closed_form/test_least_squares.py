"""Closed forms: ridge regression, and rounding that compensates its own errors."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from support.second_device import second_device, transfers

from spdfq.backends.closed_form.layer_inputs import NormalEquations
from spdfq.backends.closed_form.least_squares import (
    ridge_regression,
    round_by_columns,
    round_by_halves,
    rounded_with_flips,
)
from spdfq.backends.weight_grid import WeightGrid
from spdfq.quantizers import UniformQuantizer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count, columns, seed=0):
    """Correlated inputs that are not centred."""
    mix = torch.randn(columns, columns, generator=generator(seed + 1)) / columns**0.5
    return torch.randn(count, columns, generator=generator(seed)) @ mix + 0.5


def quantizer_of(weight, bits=3):
    quantizer = UniformQuantizer(bits=bits, symmetric=True, granularity="channel")
    quantizer.observe(weight)
    quantizer.freeze()
    return quantizer


def off(found, wanted, gram):
    """The squared error of each row's outputs."""
    difference = (found - wanted).double()
    return (difference @ gram.double() * difference).sum(1)


# the regression


@pytest.mark.parametrize("penalty", [0.5, 1000.0])
def test_it_is_numpys_least_squares_of_the_augmented_system(penalty):
    a, y = rows(50, 6).double(), torch.randn(50, 4, generator=generator(7)).double()
    root = penalty**0.5 * np.eye(6)
    expected = np.linalg.lstsq(np.vstack([a.numpy(), root]), np.vstack([y.numpy(), np.zeros((6, 4))]), rcond=None)[0]
    np.testing.assert_allclose(ridge_regression(a.T @ a, a.T @ y, penalty).numpy(), expected, atol=1e-12)


def test_known_noise_on_the_inputs_costs_what_the_closed_form_says():
    """Inputs x of variance 1 and noise of variance t²: the error t²‖W‖² of an output falls to t² / (1 + t²) ‖W‖²."""
    noise, weight = 0.5, torch.randn(4, 8, generator=generator(1))
    x = torch.randn(40000, 8, generator=generator(2))
    noisy = x + noise * torch.randn(40000, 8, generator=generator(3))
    gap = (x - noisy) @ weight.T
    found = NormalEquations(torch.zeros(8, 8).double(), torch.zeros(8, 4).double())
    for part in range(0, 40000, 9000):
        found.add(noisy[part : part + 9000], gap[part : part + 9000])
    change = ridge_regression(found.gram, found.cross, 1.0)
    before, after = gap.double().square().sum(), (gap.double() - noisy.double() @ change).square().sum()
    assert before / 40000 == pytest.approx(noise**2 * weight.square().sum().item(), rel=0.03)
    assert after / before == pytest.approx(1 / (1 + noise**2), rel=0.03)
    # the minimum of ‖Y - AX‖² + λ‖X‖² is ‖Y‖² - <AᵀY, X>, to rounding
    assert after + change.square().sum() == pytest.approx((before - (found.cross * change).sum()).item(), rel=1e-5)


# rounding


def test_one_flip_is_the_best_of_all_single_moves():
    x = rows(200, 5)
    weight, gram = torch.randn(3, 5, generator=generator(1)), x.T @ x
    quantizer = quantizer_of(weight)
    codes = quantizer.codes(weight)
    grid = WeightGrid.of(quantizer, weight)
    moved = []
    for column, step in product(range(5), (-1, 0, 1)):
        other = codes.int()
        other[:, column] = (other[:, column] + step).clamp(0, 7)
        moved.append(off(quantizer.decode(other), weight, gram))
    found = rounded_with_flips(weight, gram, 1, grid)
    torch.testing.assert_close(off(found, weight, gram), torch.stack(moved).min(0).values, rtol=1e-4, atol=1e-4)
    assert ((quantizer.codes(found.float()).int() - codes.int()).abs().sum(1) <= 1).all()


def test_flips_lower_the_error_until_no_move_does():
    x = rows(200, 12)
    weight, gram = torch.randn(6, 12, generator=generator(1)), x.T @ x
    quantizer = quantizer_of(weight)
    grid = WeightGrid.of(quantizer, weight)
    errors = [off(rounded_with_flips(weight, gram, flips, grid), weight, gram) for flips in range(8)]
    torch.testing.assert_close(rounded_with_flips(weight, gram, 0, grid).float(), quantizer(weight))
    assert all((after <= before * (1 + 1e-5)).all() for before, after in pairwise(errors))
    assert errors[-1].sum() < 0.6 * errors[0].sum()
    end = rounded_with_flips(weight, gram, 1000, grid)
    moves = [end.float() + step * grid.step * torch.eye(12)[column] for column in range(12) for step in (-1, 1)]
    allowed = [((grid.positions(move) > -0.5) & (grid.positions(move) < 7.5)).all(1) for move in moves]
    for move, rows_inside in zip(moves, allowed, strict=True):
        assert (off(move, weight, gram) >= off(end, weight, gram) * (1 - 1e-4))[rows_inside].all()


def test_an_accelerator_is_rarely_asked_whether_to_go_on():
    x = rows(200, 12)
    weight, gram = torch.randn(6, 12, generator=generator(1)), x.T @ x
    grid = WeightGrid.of(quantizer_of(weight), weight)
    expected = rounded_with_flips(weight, gram, 25, grid)
    with second_device() as device:
        there = WeightGrid(grid.low.to(device), grid.step.to(device), grid.last)
        weight, gram = weight.to(device), gram.to(device)
        with transfers() as events:
            found = rounded_with_flips(weight, gram, 25, there)
        assert events == {"wait: _local_scalar_dense": 2}  # 25 flips could be asked for three times
        assert torch.equal(found.cpu(), expected)


def test_two_columns_by_hand():
    gram, penalty = torch.tensor([[4.0, 2.0], [2.0, 3.0]]), 1.0
    grid = WeightGrid(torch.full([1, 2], -4.0), torch.ones(1, 2), 7)
    found = round_by_halves(torch.tensor([[1.4, 0.7, 9.0]]), _with_a_stranger(gram), penalty, 0, grid, unrounded=1)
    # the first is rounded to 1; its error 0.4 times 2 / (3 + 1) makes the second 0.9, which is rounded to 1
    assert found[0].tolist() == [1.0, 1.0, 9.0]
    found = round_by_halves(torch.tensor([[1.4, 0.2, 9.0]]), _with_a_stranger(gram), penalty, 0, grid, unrounded=1)
    assert found[0].tolist() == [1.0, 0.0, 9.0]


def _with_a_stranger(gram):
    """One more column that has nothing to do with the others."""
    return torch.block_diag(gram, torch.ones(1, 1))


def test_the_bias_makes_good_what_is_left_and_is_not_rounded():
    x = torch.cat([rows(300, 8), torch.ones(300, 1)], 1)
    weight, gram = torch.randn(5, 9, generator=generator(4)), x.T @ x
    quantizer = quantizer_of(weight[:, :8])
    found = round_by_halves(weight, gram, 1e-6, 0, WeightGrid.of(quantizer, weight[:, :8]), unrounded=1)
    torch.testing.assert_close(quantizer(found[:, :8].float()), found[:, :8].float(), atol=1e-5, rtol=0)
    assert ((x.double() @ (found - weight).T).mean(0).abs() < 1e-4).all()
    nearest = torch.cat([quantizer(weight[:, :8]), weight[:, 8:]], 1)
    assert (off(found, weight, gram) < off(nearest, weight, gram)).all()


# rounding column by column


def gptq(weight, gram, penalty, grid, unrounded):
    """The algorithm as its paper writes it, in float64 and without blocks: after each column, eliminate it."""
    weight, gram = weight.double().clone(), gram.double() + penalty * torch.eye(len(gram)).double()
    count = weight.shape[1] - unrounded
    order = sorted(range(count), key=lambda column: -gram[column, column])
    left = [*order, *range(count, len(gram))]
    for column in order:
        inverse = gram[left][:, left].inverse()
        step, low = grid.step[:, column].double(), grid.low[:, column].double()
        code = ((weight[:, column] - low) / step).round().clamp(0, grid.last)
        error = weight[:, column] - (low + code * step)
        weight[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
        left = left[1:]
    return weight


@pytest.mark.parametrize("unrounded", [0, 1])
@pytest.mark.parametrize("columns", [7, 70, 130])  # 64 are rounded together
def test_rounding_by_columns_is_gptq(columns, unrounded):
    x = torch.cat([rows(400, columns), torch.ones(400, unrounded)], 1)
    weight, gram = torch.randn(6, columns + unrounded, generator=generator(1)), x.T @ x
    grid = WeightGrid.of(quantizer_of(weight[:, :columns]), weight[:, :columns])
    found = round_by_columns(weight, gram, 10.0, grid, unrounded)
    wanted = gptq(weight, gram, 10.0, grid, unrounded)
    near = (found - wanted).abs() < 1e-3
    # where a value lies between two codes, float32 may take the other one, which changes the rest of its row
    assert near.all(1).sum() >= 5
    assert off(found, weight, gram).sum() == pytest.approx(off(wanted, weight, gram).sum().item(), rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_by_columns_has_the_least_error(bits):
    x = torch.cat([rows(300, 40), torch.ones(300, 1)], 1)
    weight, gram, penalty = torch.randn(8, 41, generator=generator(4)), x.T @ x, 1.0
    quantizer = quantizer_of(weight[:, :40], bits)
    grid = WeightGrid.of(quantizer, weight[:, :40])
    damped = gram + penalty * torch.eye(41)
    nearest = torch.cat([quantizer(weight[:, :40]), weight[:, 40:]], 1)
    halves = round_by_halves(weight, gram, penalty, 100, grid, unrounded=1)
    columns = round_by_columns(weight, gram, penalty, grid, unrounded=1)
    errors = [off(found, weight, damped).sum() for found in (columns, halves, nearest)]
    assert errors[0] < errors[1] < errors[2]


def test_rounding_by_columns_gives_values_of_the_grid_and_a_bias_that_is_none():
    x = torch.cat([rows(300, 8), torch.ones(300, 1)], 1)
    weight, gram = torch.randn(5, 9, generator=generator(4)), x.T @ x
    given = weight.clone()
    quantizer = quantizer_of(weight[:, :8])
    found = round_by_columns(weight, gram, 1e-6, WeightGrid.of(quantizer, weight[:, :8]), unrounded=1)
    assert torch.equal(weight, given)
    torch.testing.assert_close(quantizer(found[:, :8].float()), found[:, :8].float(), atol=1e-5, rtol=0)
    # the bias takes the rest of the error: on average the outputs are right
    assert ((x.double() @ (found - weight).T).mean(0).abs() < 1e-4).all()
    assert (found[:, 8] != weight[:, 8]).all()


def test_two_columns_by_hand_in_the_order_of_their_inputs():
    gram, penalty = torch.tensor([[2.0, 2.0], [2.0, 4.0]]), 1.0
    grid = WeightGrid(torch.full([1, 2], -4.0), torch.ones(1, 2), 7)
    found = round_by_columns(torch.tensor([[0.7, 1.4, 9.0]]), _with_a_stranger(gram), penalty, grid, unrounded=1)
    # the second is rounded to 1; its error 0.4 times 2 / (2 + 1) makes the first 0.97, which is rounded to 1
    assert found[0].tolist() == [1.0, 1.0, 9.0]
    found = round_by_columns(torch.tensor([[0.2, 1.4, 9.0]]), _with_a_stranger(gram), penalty, grid, unrounded=1)
    assert found[0].tolist() == [0.0, 1.0, 9.0]
    found = round_by_columns(torch.tensor([[0.3, 1.4, 9.0]]), _with_a_stranger(gram), penalty, grid, unrounded=1)
    assert found[0].tolist() == [1.0, 1.0, 9.0]
