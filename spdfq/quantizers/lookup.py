"""Dequantization by a table: a tensor of two-byte floats holds no more than 65,536 different values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ALL = 2**16
# a table pays where it is looked up several times as often as it is long
_ENOUGH = 8 * _ALL


def pays(x: Tensor) -> bool:
    """Whether looking ``x`` up is faster than computing: if large, on a CPU, where each pass over memory costs."""
    return x.device.type == "cpu" and x.dtype.is_floating_point and x.dtype.itemsize == 2 and x.numel() >= _ENOUGH


def looked_up(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x.float()).to(x.dtype)`` to the bit, with its gradient, by one pass over ``x`` (bfloat16 or float16).

    Args:
        function: maps float32 to float32, each element by itself.
        x: of any shape.
    """
    every = torch.arange(_ALL).to(torch.int16).view(x.dtype).float()
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _select(function(every).to(x.dtype), x)
    values = function(every.requires_grad_())
    (slopes,) = torch.autograd.grad(values.sum(), every)
    result: Tensor = _LookUp.apply(x, values.detach().to(x.dtype), slopes)
    return result


def _select(table: Tensor, x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int16).int().bitwise_and_(_ALL - 1)
    return table.index_select(0, bits.reshape(-1)).reshape(x.shape)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(x, slopes)
        return _select(values, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, slopes = ctx.saved_tensors
        return (gradients[0] * _select(slopes, x)).to(x.dtype), None, None
