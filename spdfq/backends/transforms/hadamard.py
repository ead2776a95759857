"""Random orthogonal matrices, randomised Hadamard matrices where one of the size is known."""

import torch
from torch import Tensor

from spdfq.runtime.runtime import normal, uniform

# Paley's construction gives a Hadamard matrix of order q + 1 for each of these primes
_PALEY = (11, 19)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 ``[size, size]`` on the CPU.

    For 2^k, 12 * 2^k and 20 * 2^k it is D H / √size with random signs D and a Hadamard matrix H (QuaRot, arXiv
    2404.00456, section 3), so all entries have the same absolute value. For other sizes it is the Q of a random matrix.
    """
    found = hadamard(size)
    if found is None:
        q, r = torch.linalg.qr(normal(generator, size, size).double())
        return q * r.diagonal().sign()
    signs = torch.where(uniform(generator, size) < 0.5, -1.0, 1.0).double()
    return signs[:, None] * found / size**0.5


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix, float64 ``[size, size]`` of -1 and 1; ``None`` if this module knows none of that size."""
    doublings = 0
    matrices = {1: torch.ones(1, 1, dtype=torch.float64, device="cpu")} | {prime + 1: _paley(prime) for prime in _PALEY}
    rest = size
    while rest not in matrices and rest % 2 == 0 and rest > 0:
        rest, doublings = rest // 2, doublings + 1
    if rest not in matrices:
        return None
    found = matrices[rest]
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64, device="cpu")
    for _ in range(doublings):
        found = torch.kron(two, found)
    return found


def _paley(prime: int) -> Tensor:
    """Paley's Hadamard matrix of order ``prime + 1``, for a prime that leaves 3 when divided by 4."""
    squares = {value * value % prime for value in range(1, prime)}
    found = torch.ones(prime + 1, prime + 1, dtype=torch.float64, device="cpu")
    for row in range(prime):
        found[row + 1, 0] = -1
        for column in range(prime):
            found[row + 1, column + 1] = 1 if row == column or (row - column) % prime in squares else -1
    return found
