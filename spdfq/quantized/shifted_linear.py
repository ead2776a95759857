"""A linear layer that shifts and scales the channels of its input before it multiplies."""

import torch
from torch import Tensor, nn


class ShiftedLinear(nn.Linear):
    """``W ((x - shift) * factor) + b``: its input site is quantized after the shift and the factor.

    Args:
        layer: its weight and bias are taken over, not copied. The shift is 0 and the factor 1 at first.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.input_shift = nn.Parameter(torch.zeros_like(layer.weight[0]), requires_grad=False)
        self.input_factor = nn.Parameter(torch.ones_like(layer.weight[0]), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """The output ``[..., out]`` for ``[..., in]``."""
        return super().forward((input - self.input_shift) * self.input_factor)
