"""The base class of logarithmic quantizers."""

from abc import abstractmethod
from typing import Any

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer, straight_through
from spdfq.quantizers.log_grid import OCTAVES, TINY, LogGrid, LogTables
from spdfq.quantizers.remembered import Remembered

_SMALLEST_SCALE = 2.0**-OCTAVES


@define(eq=False, slots=False, kw_only=True)
class LogarithmicQuantizer(Quantizer):
    """Base class: values on a logarithmic scale, from the upper end of the range down, and zero.

    A child class defines its values in `grid`, and in ``input_shift`` a number that is added to x first and subtracted
    from the result. The gradient to x is that of the formula without its rounding, and 0 where x is clamped or zero.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    def __attrs_pre_init__(self) -> None:
        super().__attrs_pre_init__()
        self._grid: Remembered[LogGrid] = Remembered()

    @property
    def signed(self) -> bool:
        """Whether it accepts negative values: no."""
        return False

    @property
    def one_ended(self) -> bool:
        """Whether only the upper end matters: yes."""
        return True

    @property
    def input_shift(self) -> float:
        """Number that is added to x first and subtracted from the result."""
        return 0.0

    @abstractmethod
    def grid(self, parameters: Parameters) -> LogGrid:
        """The values for parameters ``[]`` each, relative to the scale: on its device, but the same for every scale."""

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale for ranges that end at ``high``, float32 ``[C]``; ``low`` is not used."""
        top = high + self.input_shift
        return {"scale": torch.where(top < _SMALLEST_SCALE, 1.0, top)}

    def quantize_with(self, values: Tensor, parameters: Parameters) -> Tensor:
        """Dequantizes ``values`` float32 ``[C, n]`` with parameters ``[C]`` from `fitted`, frozen or not."""
        rows = ({name: p[row] for name, p in parameters.items()} for row in range(len(values)))
        return torch.stack([self.dequantized(x, own) for x, own in zip(values, rows, strict=True)])

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``, from 0 for the upper end to n - 1 for zero."""
        grid, ratio = self._grid_of(parameters), (x + self.input_shift) / parameters["scale"]
        codes = grid.codes(ratio.detach()).float()
        inside = (ratio > grid.smallest_edge) & (ratio <= 1)
        ratio = torch.where(inside, ratio, ratio.detach().clamp(TINY, 1))
        return straight_through((grid.top - (ratio + grid.shift).log2()) / grid.step, codes)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``, from the table."""
        grid, scale = self._grid_of(parameters), parameters["scale"]
        exact = grid.decoded(codes.detach().int(), scale)
        shift = grid.shift * scale
        smooth = (exact + shift) * torch.exp2((codes.detach() - codes) * grid.step) - shift
        return self.shifted_back(straight_through(smooth, exact))

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))``, bit for bit, in fewer passes over memory."""
        if parameters["scale"].requires_grad:
            return super().dequantized(x, parameters)
        shifted = x + self.input_shift if self.input_shift else x
        return self.shifted_back(_FakeQuantizeLog.apply(shifted, parameters["scale"], self._grid_of(parameters)))

    def tables(self) -> LogTables:
        """The tables of the values of ``x + input_shift``; `shifted_back` follows."""
        parameters = {name: tensor.reshape(()) for name, tensor in self.tensors().items()}
        return self.grid(parameters).tables(parameters["scale"])

    def shifted_back(self, values: Tensor) -> Tensor:
        """The values without the shift of the input."""
        return values - self.input_shift if self.input_shift else values

    def _grid_of(self, parameters: Parameters) -> LogGrid:
        """The grid, made again only if a parameter other than the scale changes: a learned scale does in every step."""
        others = [parameter for name, parameter in parameters.items() if name != "scale"]
        return self._grid.of(others, lambda: self.grid(parameters), parameters["scale"].device)


class _FakeQuantizeLog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: LogGrid) -> Tensor:
        value = grid.dequantized(x, scale)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, value)
            ctx.low, ctx.high = grid.smallest_edge * scale, scale
            ctx.shift = grid.shift * scale if isinstance(grid.shift, Tensor) or grid.shift else None
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, value = ctx.saved_tensors
        slope = (value + ctx.shift) / (x + ctx.shift) if ctx.shift is not None else value / x
        if x.is_cpu:  # in one pass; on another device float(ctx.low) would wait for all earlier work
            above = ctx.high.nextafter(torch.full_like(ctx.high, torch.inf))
            slope = slope.mul_(gradients[0])
            # passes the gradient strictly between the two bounds, and is 0 elsewhere
            return torch.ops.aten.hardtanh_backward(slope, x, float(ctx.low), float(above)), None, None
        inside = (x > ctx.low) & (x <= ctx.high)
        return gradients[0] * torch.where(inside, slope, 0.0), None, None
