"""The evenly spaced values that each number of a weight can have after quantization."""

import torch
from attrs import frozen
from torch import Tensor

from spdfq.quantizers.affine import AffineQuantizer


@frozen(eq=False)
class WeightGrid:
    """The values ``low + code * step`` of each number of a weight, for codes 0 .. last.

    Args:
        low: float32, shaped like the weight.
        step: float32, shaped like the weight, above 0.
        last: the largest code.
    """

    low: Tensor
    step: Tensor
    last: int

    @classmethod
    def of(cls, quantizer: AffineQuantizer, weight: Tensor) -> "WeightGrid":
        """The values that a frozen quantizer gives a weight."""
        first = torch.zeros_like(weight, dtype=torch.uint8)
        low = quantizer.decode(first)
        return cls(low, quantizer.decode(first + 1) - low, quantizer.levels - 1)

    def columns(self, chosen: slice | Tensor) -> "WeightGrid":
        """The grid of some columns of a weight ``[k, d]``."""
        return WeightGrid(self.low[:, chosen], self.step[:, chosen], self.last)

    def positions(self, weight: Tensor) -> Tensor:
        """Codes that are neither rounded nor clamped."""
        return (weight - self.low) / self.step

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes, whole or not."""
        return self.low + codes * self.step
