"""What a frozen quantizer makes of a tensor, in the units of the float tensor, and the noise of that."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from spdfq.quantizers import Quantizer

_MOST, _LEAST = 100.0, 1e-30


def dequantized(quantizer: Quantizer, tensor: Tensor) -> Tensor:
    """The quantized tensor in the units of the float one, also where a bias contains the quantizer's shift."""
    found: Tensor = quantizer(tensor)
    return found - folded_shift(quantizer)


def folded_shift(quantizer: Quantizer) -> float:
    """What the step ``adalog`` moved from this quantizer into the bias of the layer that follows."""
    return float(getattr(quantizer, "shift", 0.0)) if getattr(quantizer, "folded", False) else 0.0


def level_values(
    quantizer: Quantizer, shape: tuple[int, ...], device: torch.device, codes: Iterable[int] | None = None
) -> Tensor:
    """The values that a quantizer can give, ascending, in the units of the float tensor.

    Args:
        quantizer: frozen.
        shape: of the tensor for one image.
        device: where the values are made.
        codes: those of some levels only; all by default.

    Returns:
        float32 ``[levels, ...]``; the other axes broadcast against a tensor of that shape.
    """
    axes = {axis % len(shape) for name in quantizer.stores if (axis := quantizer.axis_of(name)) is not None}
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    every = [
        quantizer.decode(torch.full(sizes, code, dtype=quantizer.code_dtype, device=device))
        for code in (range(quantizer.levels) if codes is None else codes)
    ]
    return (torch.stack(every) - folded_shift(quantizer)).sort(dim=0).values


def energy(tensor: Tensor) -> float:
    """The sum of squares."""
    return float(tensor.double().square().sum())


def decibels(signal: float, noise: float) -> float:
    """A signal-to-noise ratio of two sums of squares in dB, at most 100."""
    return min(_MOST, 10 * math.log10(max(signal, _LEAST) / max(noise, _LEAST)))
