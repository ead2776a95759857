"""Least squares in closed form: ridge regression, and rounding with compensation of the rounding error."""

import torch
from torch import Tensor

from spdfq.backends.weight_grid import WeightGrid

_FLIPS = 10  # between two looks at whether any flip still lowers an error
_COLUMNS = 64  # rounded together, so that the columns after them change by one product of matrices


def ridge_regression(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """The X of least ``‖A X - Y‖² + penalty ‖X‖²``, by Cholesky decomposition in float64.

    Args:
        gram: ``AᵀA`` ``[d, d]``.
        cross: ``AᵀY`` ``[d, k]``.
        penalty: above 0 (or 0 if the Gram matrix is positive definite).

    Returns:
        float64 ``[d, k]``.
    """
    damped = gram.double().clone()
    damped.diagonal().add_(penalty)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(damped))


def round_by_halves(
    weight: Tensor, gram: Tensor, penalty: float, flips: int, grid: WeightGrid, unrounded: int = 0
) -> Tensor:
    """Rounds the columns of a weight half by half; after each half the remaining columns compensate its error.

    This is the weight half of ERQ (arXiv 2407.06794). The first half of the remaining columns is rounded by
    `rounded_with_flips`. Then the ridge regression of the rounding error is added to the other remaining columns.

    Args:
        weight: ``[k, d + unrounded]``.
        gram: Gram matrix of the layer's inputs ``[d + unrounded, d + unrounded]``.
        penalty: of the ridge regression.
        flips: largest number of changed codes of a row for each half.
        grid: of the weight ``[k, d]``.
        unrounded: number of last columns that are never rounded (the bias).

    Returns:
        float64 ``[k, d + unrounded]``.
    """
    weight, gram = weight.double().clone(), gram.double()
    start, end = 0, weight.shape[1] - unrounded
    while start < end:
        half = slice(start, start + -(-(end - start) // 2))
        rounded = rounded_with_flips(weight[:, half], gram[half, half], flips, grid.columns(half))
        error = weight[:, half] - rounded
        weight[:, half] = rounded
        rest = slice(half.stop, None)
        if half.stop < len(gram):
            weight[:, rest] += ridge_regression(gram[rest, rest], gram[rest, half] @ error.T, penalty).T
        start = half.stop
    return weight


def rounded_with_flips(weight: Tensor, gram: Tensor, flips: int, grid: WeightGrid) -> Tensor:
    """The weight rounded to the nearest values, with up to ``flips`` codes of each row then changed by one.

    With δ = values - weight, the error of a row is ``δ gram δᵀ``. Each flip is the one that lowers the error of its row
    the most. A row ends when no flip lowers its error.

    Args:
        weight: ``[k, d]``.
        gram: ``[d, d]``.
        flips: 0 rounds to the nearest.
        grid: of the weight ``[k, d]``.

    Returns:
        float64 ``[k, d]``, values of the grid.
    """
    weight, gram, step = weight.float(), gram.float(), grid.step
    codes = grid.positions(weight).round().clamp(0, grid.last)
    slope = 2 * step * ((grid.values(codes) - weight) @ gram)
    curvature = step.square() * gram.diagonal()
    # reading a result makes an accelerator wait, while a flip too many changes nothing
    every = 1 if weight.device.type == "cpu" else _FLIPS
    for flip in range(flips):
        movable = torch.where(slope < 0, codes < grid.last, codes > 0)
        gain, column = ((slope.abs() - curvature) * movable).max(1, keepdim=True)
        better = gain > 0
        if flip % every == 0 and not bool(better.any()):
            break
        move = -slope.gather(1, column).sign() * better
        codes.scatter_add_(1, column, move)
        slope += 2 * move * step.gather(1, column) * step * gram[column[:, 0]]
    return grid.values(codes).double()


def round_by_columns(weight: Tensor, gram: Tensor, penalty: float, grid: WeightGrid, unrounded: int = 0) -> Tensor:
    """Rounds the columns of a weight one by one; after each, the columns that remain compensate its error.

    This is GPTQ (arXiv 2210.17323, section 3.3) with its order of columns, from the largest sum of squared inputs to
    the smallest. The columns that remain take the error that minimises ``δ (gram + penalty I) δᵀ``.

    Args:
        weight: ``[k, d + unrounded]``.
        gram: Gram matrix of the layer's inputs ``[d + unrounded, d + unrounded]``.
        penalty: damping of the Gram matrix.
        grid: of the weight ``[k, d]``.
        unrounded: number of last columns that are never rounded (the bias).

    Returns:
        float64 ``[k, d + unrounded]``.
    """
    count = weight.shape[1] - unrounded
    damped = gram.double().clone()
    damped.diagonal().add_(penalty)
    first = damped.diagonal()[:count].argsort(descending=True, stable=True)
    order = torch.cat([first, torch.arange(count, len(damped), dtype=first.dtype, device=first.device)])
    # damped = upper upperᵀ, so row j of the inverse of upper is how the error of column j spreads over those after it
    upper = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    spread = torch.linalg.solve_triangular(upper, identity, upper=True).float()
    wanted, grid = weight[:, order].float(), grid.columns(first)
    for start in range(0, count, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, count))
        errors = _round_part(wanted[:, part], spread[part, part], grid.columns(part))
        wanted[:, part.stop :] -= errors @ spread[part, part.stop :]
    return wanted[:, order.argsort()].double()


def _round_part(wanted: Tensor, spread: Tensor, grid: WeightGrid) -> Tensor:
    """Rounds some columns in place; returns the error of each, divided by its entry on the diagonal of ``spread``."""
    errors, low, step = torch.empty_like(wanted), grid.low, grid.step
    for column in range(wanted.shape[1]):
        now = wanted[:, column].clone()
        code = ((now - low[:, column]) / step[:, column]).round_().clamp_(0, grid.last)
        wanted[:, column] = low[:, column] + code * step[:, column]
        errors[:, column] = (now - wanted[:, column]) / spread[column, column]
        wanted[:, column + 1 :] -= errors[:, column, None] * spread[column, column + 1 :]
    return errors
