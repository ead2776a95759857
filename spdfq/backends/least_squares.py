"""Closed forms: ridge regression, and rounding whose error the columns that are not yet rounded make good."""

import torch
from torch import Tensor

from spdfq.quantizers import UniformQuantizer


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """The X of least ``‖A X - Y‖² + penalty ‖X‖²``, by Cholesky in float64.

    Args:
        gram: ``AᵀA`` ``[d, d]``.
        cross: ``AᵀY`` ``[d, k]``.
        penalty: above 0 (or 0 where the Gram matrix is positive definite by itself).

    Returns:
        float64 ``[d, k]``.
    """
    damped = gram.double()
    damped = damped + penalty * torch.eye(len(gram), dtype=damped.dtype, device=damped.device)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(damped))


def round_by_halves(
    weight: Tensor, gram: Tensor, penalty: float, flips: int, quantizer: UniformQuantizer, free: int = 0
) -> Tensor:
    """Round the columns of a weight half by half; after each half the columns left make good its error.

    The weight half of ERQ (arXiv 2407.06794): the first half of the columns left is rounded, the rounding refined by
    `descended`, and the columns left take the ridge regression of the error.

    Args:
        weight: ``[k, d]``.
        gram: of the layer's inputs ``[d, d]``.
        penalty: of the ridge regression.
        flips: how many codes of a row may be changed for each half.
        quantizer: frozen, of the rows of the weight.
        free: how many of the last columns are never rounded (the bias).

    Returns:
        float64 ``[k, d]``.
    """
    weight, gram = weight.double().clone(), gram.double()
    start, end = 0, weight.shape[1] - free
    while start < end:
        half = slice(start, start + -(-(end - start) // 2))
        rounded = descended(weight[:, half], quantizer.codes(weight[:, half]), gram[half, half], flips, quantizer)
        error = weight[:, half] - rounded
        weight[:, half] = rounded
        rest = slice(half.stop, None)
        if half.stop < len(gram):
            weight[:, rest] += ridge(gram[rest, rest], gram[rest, half] @ error.T, penalty).T
        start = half.stop
    return weight


def descended(weight: Tensor, codes: Tensor, gram: Tensor, flips: int, quantizer: UniformQuantizer) -> Tensor:
    """Values for codes of which up to ``flips`` in each row were moved up or down by one.

    Each move is the one that lowers the row's error ``δ gram δᵀ``, δ = values - weight, the most; a row without such a
    move is done.

    Args:
        weight: ``[k, d]``, what is wanted.
        codes: uint8 ``[k, d]``, where to start.
        gram: ``[d, d]``.
        flips: 0 leaves the codes as they are.
        quantizer: frozen, of the rows of the weight.

    Returns:
        float64 ``[k, d]``, values of the quantizer.
    """
    scale, gram = quantizer.tensors()["scale"].reshape(-1, 1), gram.float()
    found, last = codes.float(), quantizer.levels - 1
    slope = 2 * scale * ((quantizer.decode(codes) - weight.float()) @ gram)
    curvature = scale.square() * gram.diagonal()
    for _ in range(flips):
        movable = torch.where(slope < 0, found < last, found > 0)
        gain, column = ((slope.abs() - curvature) * movable).max(1, keepdim=True)
        better = gain > 0
        if not bool(better.any()):
            break
        move = -slope.gather(1, column).sign() * better
        found.scatter_add_(1, column, move)
        slope += 2 * scale.square() * move * gram[column[:, 0]]
    return quantizer.decode(found).double()
