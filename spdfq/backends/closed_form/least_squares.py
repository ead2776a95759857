"""Closed forms: ridge regression, and rounding whose error the columns that are not yet rounded make good."""

import torch
from torch import Tensor

from spdfq.backends.transforms.grid import Grid


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """The X of least ``‖A X - Y‖² + penalty ‖X‖²``, by Cholesky in float64.

    Args:
        gram: ``AᵀA`` ``[d, d]``.
        cross: ``AᵀY`` ``[d, k]``.
        penalty: above 0 (or 0 where the Gram matrix is positive definite by itself).

    Returns:
        float64 ``[d, k]``.
    """
    damped = gram.double().clone()
    damped.diagonal().add_(penalty)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(damped))


def round_by_halves(weight: Tensor, gram: Tensor, penalty: float, flips: int, grid: Grid, free: int = 0) -> Tensor:
    """Round the columns of a weight half by half; after each half the columns left make good its error.

    The weight half of ERQ (arXiv 2407.06794): the first half of the columns left is rounded, the rounding refined by
    `descended`, and the columns left take the ridge regression of the error.

    Args:
        weight: ``[k, d + free]``.
        gram: of the layer's inputs ``[d + free, d + free]``.
        penalty: of the ridge regression.
        flips: how many codes of a row may be changed for each half.
        grid: of the weight ``[k, d]``.
        free: how many of the last columns are never rounded (the bias).

    Returns:
        float64 ``[k, d + free]``.
    """
    weight, gram = weight.double().clone(), gram.double()
    start, end = 0, weight.shape[1] - free
    while start < end:
        half = slice(start, start + -(-(end - start) // 2))
        rounded = descended(weight[:, half], gram[half, half], flips, grid.columns(half))
        error = weight[:, half] - rounded
        weight[:, half] = rounded
        rest = slice(half.stop, None)
        if half.stop < len(gram):
            weight[:, rest] += ridge(gram[rest, rest], gram[rest, half] @ error.T, penalty).T
        start = half.stop
    return weight


def descended(weight: Tensor, gram: Tensor, flips: int, grid: Grid) -> Tensor:
    """The weight rounded to the nearest, then up to ``flips`` codes of each row moved up or down by one.

    Each move is the one that lowers the row's error ``δ gram δᵀ``, δ = values - weight, the most; a row without such a
    move is done.

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
    for _ in range(flips):
        movable = torch.where(slope < 0, codes < grid.last, codes > 0)
        gain, column = ((slope.abs() - curvature) * movable).max(1, keepdim=True)
        better = gain > 0
        if not bool(better.any()):
            break
        move = -slope.gather(1, column).sign() * better
        codes.scatter_add_(1, column, move)
        slope += 2 * move * step.gather(1, column) * step * gram[column[:, 0]]
    return grid.values(codes).double()
