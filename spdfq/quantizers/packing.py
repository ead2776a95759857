"""Packs codes at their true bit-width: b bits each, lowest bit first, without gaps."""

from collections.abc import Sequence
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from spdfq.errors import DataError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 of any shape -> uint8 ``[ceil(numel * bits / 8)]``, with the first code in the lowest bits.

    Raises:
        DataError: ``bits`` is not 1 to 8, or ``codes`` are not uint8 below ``2**bits``.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or bool((codes > 2**bits - 1).any()):
        raise DataError(f"codes to be packed at {bits} bits must be uint8 below {2**bits}; they are {codes.dtype}")
    stream = _to_bits(rearrange(codes, "... -> (...)"), bits)
    return _from_bits(torch.nn.functional.pad(stream, (0, -len(stream) % 8)), 8)


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The uint8 codes of ``shape`` that `pack` was given.

    Raises:
        DataError: ``bits`` is not 1 to 8, or ``packed`` is not uint8 of the length that ``shape`` needs.
    """
    _check_bits(bits)
    used = prod(shape) * bits
    if packed.dtype != torch.uint8 or list(packed.shape) != [-(-used // 8)]:
        raise DataError(
            f"codes of shape {tuple(shape)} at {bits} bits fill {-(-used // 8)} bytes of uint8, "
            f"not {tuple(packed.shape)} of {packed.dtype}; the file is damaged or its bits are wrong"
        )
    return _from_bits(_to_bits(packed, 8)[:used], bits).reshape(tuple(shape))


def _to_bits(numbers: Tensor, bits: int) -> Tensor:
    """uint8 ``[n]`` -> its bits ``[n * bits]``, 0 or 1."""
    places = torch.arange(bits, dtype=torch.uint8, device=numbers.device)
    return rearrange((numbers[:, None] >> places) & 1, "numbers bits -> (numbers bits)")


def _from_bits(stream: Tensor, bits: int) -> Tensor:
    """The reverse of `_to_bits`."""
    places = torch.arange(bits, dtype=torch.uint8, device=stream.device)
    return (rearrange(stream, "(numbers bits) -> numbers bits", bits=bits) << places).sum(dim=1, dtype=torch.uint8)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise DataError(f"codes are packed at 1 to 8 bits, not {bits}")
