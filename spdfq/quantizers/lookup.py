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
    small = x.dtype.is_floating_point and x.dtype.itemsize == 2
    return x.device.type == "cpu" and small and x.numel() >= _ENOUGH and not torch.compiler.is_compiling()


def looked_up(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x.float()).to(x.dtype)`` to the bit, in the layout of ``x``, with its first derivative.

    Args:
        function: maps float32 to float32, each element by itself.
        x: bfloat16 or float16, of any shape.
    """
    every = torch.arange(_ALL, device=x.device).to(torch.int16).view(x.dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _select(function(every.float()).to(x.dtype), x if x.is_contiguous() else x.clone())
    leaf = every.float().requires_grad_()
    values = function(leaf)
    (slopes,) = torch.autograd.grad(values.sum(), leaf)
    result: Tensor = _LookUp.apply(x, values.detach().to(x.dtype), slopes, _passed(every, slopes))
    return result


def _select(table: Tensor, x: Tensor) -> Tensor:
    """``x`` without gaps, whatever the order of its axes: contiguous, or a clone."""
    bits = x.as_strided((x.numel(),), (1,)).view(torch.int16).int().bitwise_and_(_ALL - 1)
    return table.index_select(0, bits).as_strided(x.shape, x.stride())


def _passed(every: Tensor, slopes: Tensor) -> tuple[float, float] | None:
    """The ends, exclusive, of the one interval on which the gradient passes as it is, if it is 0 outside; or None."""
    values, slopes = _rising(every), _rising(slopes)
    inside = slopes == 1
    count, first = int(inside.sum()), int(inside.int().argmax())
    last = first + count - 1
    if (
        not 0 < first <= last < _ALL - 1
        or count + int((slopes == 0).sum()) < _ALL
        or not bool(inside[first : last + 1].all())
    ):
        return None
    return float(values[first - 1]), float(values[last + 1])


def _rising(table: Tensor) -> Tensor:
    """What belongs to -NaN .. -0 and then to 0 .. NaN."""
    return torch.cat([table[_ALL // 2 :].flip(0), table[: _ALL // 2]])


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, slopes: Tensor, passed: tuple[float, float] | None) -> Tensor:
        ctx.passed = passed
        own = x.clone()  # the network may go on in place
        ctx.save_for_backward(own, None if passed else slopes)
        return _select(values, own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, slopes = ctx.saved_tensors
        if ctx.passed:
            # of the operations that tell an interval from the rest, the one that is a single pass in two bytes
            return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.passed), None, None, None
        return _select(slopes, x).mul_(gradients[0]).to(x.dtype), None, None, None
