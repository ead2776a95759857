"""What the logarithmic quantizers share: a table of values, and the codes of values on a grid of logarithms."""

from abc import abstractmethod
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer, straight_through
from spdfq.quantizers.lookup import Steps, pays

# keeps every value a normal float32 number, which no device flushes to zero
OCTAVES = 63
SMALLEST = 2.0**-OCTAVES
_TINY = torch.finfo(torch.float32).tiny


def fractions(parts: int, device: torch.device) -> Tensor:
    """``2 ** (-i / parts)`` for i in 0 .. parts - 1, float32, the same on every device."""
    return torch.tensor([2.0 ** (-i / parts) for i in range(parts)], device=device)


def power(numerator: Tensor, table: Tensor) -> Tensor:
    """``2 ** (-numerator / len(table))`` for whole numbers, by the table of fractions and an exact power of two."""
    octaves = torch.exp2(-(numerator // len(table)).float())
    return octaves * table.take(numerator % len(table))


@frozen(eq=False)
class Grid:
    """The values of a range that ends at 1, from the largest to zero, and where one code ends and the next begins.

    Args:
        values: float32 ``[n]``, of each code, never rising.
        edges: float32 ``[n - 1]``, never rising: code q ends, and q + 1 begins, at ``edges[q]``, which is less than
            half a step from the middle of the two. Codes whose edge is 0 are zero.
        step: octaves between two codes, float32 ``[]``.
        shift: is added to a value before the logarithm.
    """

    values: Tensor
    edges: Tensor
    step: Tensor
    shift: Tensor | float = 0.0

    @property
    def top(self) -> Tensor:
        """Logarithm of the range's end."""
        return torch.log2(torch.ones_like(self.step) + self.shift)

    @property
    def smallest(self) -> Tensor:
        """Below it everything is zero."""
        return torch.where(self.edges > 0, self.edges, torch.inf).min()

    def codes(self, ratio: Tensor) -> Tensor:
        """Codes int32 of float32 ``ratio`` of any shape; n for NaN."""
        last = len(self.values) - 1
        position = (ratio + self.shift).clamp_(min=_TINY).log2_().sub_(self.top).div_(-self.step)
        # log2 is off by an ulp here and there, but the code is this or the next, and comparing with an edge is exact
        guess = position.floor_().clamp_(0, last).nan_to_num_(nan=last + 1).int()
        edges = torch.cat([self.edges, self.edges.new_full([2], torch.nan)])
        return guess.add_(ratio <= _looked_up(edges, guess))

    def dequantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """Values of float32 ``x`` of any shape under a scale ``[]``."""
        if pays(x) and (steps := Steps(self._ends(scale), self.values * scale)).apart:
            return steps.at(x)
        return self.decoded(self.codes(x / scale), scale)

    def _ends(self, scale: Tensor) -> Tensor:
        """The largest x of which ``x / scale`` does not exceed each edge."""
        near = [self.edges * scale]  # at most an ulp and a half off: product and quotient are both rounded
        for direction in (near[0].new_zeros(()), near[0].new_full((), torch.inf)):
            once = near[0].nextafter(direction)
            near += [once, once.nextafter(direction)]
        candidates = torch.stack(near)
        return torch.where(candidates / scale <= self.edges, candidates, 0.0).amax(dim=0)

    def decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Values of whole ``codes`` under a scale; NaN for code n."""
        values = self.values * scale
        return _looked_up(torch.cat([values, values.new_full([1], torch.nan)]), codes)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def even_grid(codes: int, steps: Tensor, table: Tensor) -> Grid:
    """The grid of ``2 ** (-q * steps / parts)`` for q = 0 .. codes - 2, and zero.

    Args:
        codes: how many codes there are.
        steps: parts of an octave between two of them, whole, ``[]``.
        table: `fractions` of an octave, float32 ``[parts]``, rounded or not.
    """
    numerators = torch.arange(codes - 1, device=table.device) * steps
    values = torch.where(numerators <= OCTAVES * len(table), power(numerators, table), 0.0)
    following = torch.nn.functional.pad(values[1:], (0, 1))
    # a root is exact to the last bit, so the middle of two powers of two is where it should be
    half = power(steps, fractions(2 * len(table), table.device))
    edges = torch.where(following > 0, (values * following).sqrt(), values * half)
    return Grid(torch.nn.functional.pad(values, (0, 1)), edges, steps / len(table))


@define(eq=False, slots=False, kw_only=True)
class LogarithmicQuantizer(Quantizer):
    """Base class: values evenly spaced on a logarithmic scale below the range's top, and zero.

    A child says in `grid` what its values are, and in ``lift`` what is added to x beforehand and taken off afterwards.
    The gradient to x is that of the formula without its rounding, and 0 where x is clamped or zero.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    @property
    def signed(self) -> bool:
        """Whether it takes negative values: no."""
        return False

    @property
    def one_ended(self) -> bool:
        """Whether only the upper end counts: yes."""
        return True

    @property
    def lift(self) -> float:
        """What is added to x before anything else, and taken off the result."""
        return 0.0

    @abstractmethod
    def grid(self, parameters: Parameters) -> Grid:
        """The values under parameters ``[]`` each, but for the scale."""

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale for ranges that end at ``high``, float32 ``[C]``; ``low`` plays no part."""
        top = high + self.lift
        return {"scale": torch.where(top < SMALLEST, 1.0, top)}

    def quantize_with(self, values: Tensor, parameters: Parameters) -> Tensor:
        """Dequantized ``values`` float32 ``[C, n]`` under `fitted` parameters ``[C]``, frozen or not."""
        rows = ({name: p[row] for name, p in parameters.items()} for row in range(len(values)))
        return torch.stack([self.dequantized(x, own) for x, own in zip(values, rows, strict=True)])

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``, from 0 for the top to n - 1 for zero."""
        grid, ratio = self.grid(parameters), (x + self.lift) / parameters["scale"]
        codes = grid.codes(ratio.detach()).float()
        inside = (ratio > grid.smallest) & (ratio <= 1)
        ratio = torch.where(inside, ratio, ratio.detach().clamp(_TINY, 1))
        return straight_through((grid.top - (ratio + grid.shift).log2()) / grid.step, codes)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``, from the table."""
        grid, scale = self.grid(parameters), parameters["scale"]
        exact = grid.decoded(codes.detach().int(), scale)
        shift = grid.shift * scale
        smooth = (exact + shift) * torch.exp2((codes.detach() - codes) * grid.step) - shift
        return self._lowered(straight_through(smooth, exact))

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))``, to the bit, in fewer passes over memory."""
        if parameters["scale"].requires_grad:
            return super().dequantized(x, parameters)
        lifted = x + self.lift if self.lift else x
        return self._lowered(_FakeQuantize.apply(lifted, parameters["scale"], self.grid(parameters)))

    def _lowered(self, values: Tensor) -> Tensor:
        return values - self.lift if self.lift else values


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        value = grid.dequantized(x, scale)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, value)
            ctx.low, ctx.high = grid.smallest * scale, scale
            ctx.shift = grid.shift * scale if isinstance(grid.shift, Tensor) or grid.shift else None
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, value = ctx.saved_tensors
        slope = (value + ctx.shift) / (x + ctx.shift) if ctx.shift is not None else value / x
        if x.is_cpu:  # the same in one pass, where each costs; elsewhere the ends would have to be waited for
            above = ctx.high.nextafter(torch.full_like(ctx.high, torch.inf))
            slope = slope.mul_(gradients[0])
            return torch.ops.aten.hardtanh_backward(slope, x, float(ctx.low), float(above)), None, None
        inside = (x > ctx.low) & (x <= ctx.high)
        return gradients[0] * torch.where(inside, slope, 0.0), None, None
