"""The values of a logarithmic quantizer, and the codes of numbers between them."""

from functools import cached_property
from typing import NamedTuple

import torch
from attrs import field, frozen
from torch import Tensor

from spdfq.quantizers.cpu_tables import StepTable, table_pays
from spdfq.quantizers.remembered import Remembered

# keeps every value a normal float32 number, which no device flushes to zero
OCTAVES = 63
TINY = torch.finfo(torch.float32).tiny


def octave_fractions(parts: int, device: torch.device) -> Tensor:
    """``2 ** (-i / parts)`` for i in 0 .. parts - 1, float32, the same on every device."""
    return torch.tensor([2.0 ** (-i / parts) for i in range(parts)], device=device, dtype=torch.float32)


def power_of_two(numerator: Tensor, fractions: Tensor) -> Tensor:
    """``2 ** (-numerator / parts)`` for whole numerators: an exact power of two times one of `octave_fractions`."""
    parts = len(fractions)
    octaves = torch.exp2(-(numerator // parts).float())
    return octaves * fractions.take(numerator % parts)


class LogTables(NamedTuple):
    """All tensors that give a float32 number its value, for one scale.

    Args:
        scale: the upper end of the range, ``[]``.
        edges: those of a `LogGrid`, and NaN after the last code and after that of NaN, ``[n + 1]``.
        values: of each code and of NaN, ``[n + 1]``.
        minus_step: the step of the `LogGrid` with the other sign, ``[]``.
        shift: of the `LogGrid`, ``[]``, or ``None``.
        top: of the `LogGrid`, ``[]``, or ``None`` without a shift.
    """

    scale: Tensor
    edges: Tensor
    values: Tensor
    minus_step: Tensor
    shift: Tensor | None
    top: Tensor | None

    def at(self, x: Tensor) -> Tensor:
        """The values of float32 ``x`` of any shape."""
        codes = _codes(x / self.scale, self.edges, self.minus_step, self.shift, self.top)
        return _entries(self.values, codes)


@frozen(eq=False, slots=False)
class LogGrid:
    """The values of all codes of a range that ends at 1, from the largest down to zero, and the edges between them.

    Args:
        values: float32 ``[n]``, the value of each code; never rising.
        edges: float32 ``[n - 1]``, never rising. Ratios above ``edges[q]`` (and up to ``edges[q - 1]``) have code q. An
            edge is less than half a step away from the middle of its two codes; codes whose edge is 0 are zero.
        step: octaves between two codes, float32 ``[]``.
        shift: number that is added to a ratio before the logarithm.
    """

    values: Tensor
    edges: Tensor
    step: Tensor
    shift: Tensor | float = 0.0
    _values_for: Remembered[Tensor] = field(factory=Remembered, init=False)
    _table_for: Remembered[StepTable] = field(factory=Remembered, init=False)

    @cached_property
    def top(self) -> Tensor:
        """Logarithm of the upper end of the range."""
        return torch.log2(torch.ones_like(self.step) + self.shift)

    @cached_property
    def smallest_edge(self) -> Tensor:
        """Every ratio up to this edge is zero."""
        return torch.where(self.edges > 0, self.edges, torch.inf).min()

    def codes(self, ratio: Tensor) -> Tensor:
        """Codes int32 of float32 ``ratio`` of any shape; n for NaN."""
        return _codes(ratio, self._all_edges, self._minus_step, *self._shift_and_top)

    @cached_property
    def _minus_step(self) -> Tensor:
        return -self.step

    @cached_property
    def _shift_and_top(self) -> tuple[Tensor | float | None, Tensor | None]:
        shifted = isinstance(self.shift, Tensor) or self.shift != 0
        return (self.shift, self.top) if shifted else (None, None)

    @cached_property
    def _all_edges(self) -> Tensor:
        """The edges, and NaN after the last code and after that of NaN: never reached."""
        return torch.cat([self.edges, self.edges.new_full([2], torch.nan)])

    def dequantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """The values of float32 ``x`` of any shape for a scale ``[]``."""
        if table_pays(x):
            table = self._table_for.of([scale], lambda: StepTable(self._scaled_edges(scale), self.values * scale))
            if table.usable:
                return table.at(x)
        return _entries(self._values_for.of([scale], lambda: self._values_and_nan(scale)), self.codes(x / scale))

    def tables(self, scale: Tensor) -> LogTables:
        """The tables for a scale ``[]``."""
        shift, top = self._shift_and_top
        if isinstance(shift, float):
            shift = torch.full_like(scale, shift)
        return LogTables(scale, self._all_edges, self._values_and_nan(scale), self._minus_step, shift, top)

    def _values_and_nan(self, scale: Tensor) -> Tensor:
        values = self.values * scale
        return torch.cat([values, values.new_full([1], torch.nan)])

    def _scaled_edges(self, scale: Tensor) -> Tensor:
        """For each edge the largest x whose float32 ratio ``x / scale`` does not exceed it."""
        # product and quotient are both rounded, so that x lies at most two float32 numbers away from edge * scale
        nearest = self.edges * scale
        candidates = [nearest]
        for direction in (nearest.new_zeros(()), nearest.new_full((), torch.inf)):
            once = nearest.nextafter(direction)
            candidates += [once, once.nextafter(direction)]
        near = torch.stack(candidates)
        return torch.where(near / scale <= self.edges, near, 0.0).amax(dim=0)

    def decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The values of whole ``codes`` for a scale; NaN for code n."""
        return _entries(self._values_and_nan(scale), codes)


def _codes(
    ratio: Tensor, edges: Tensor, minus_step: Tensor, shift: Tensor | float | None, top: Tensor | None
) -> Tensor:
    """Codes int32 of float32 ``ratio``; ``edges`` as in `LogTables`."""
    # The logarithm may be off by one unit in the last place, so rounding it could give a neighbouring code on
    # another device. Rounded down, it gives the code or the one before it; comparing with the edge is exact.
    last, nan_code = len(edges) - 2, len(edges) - 1
    logarithm = (ratio if shift is None else ratio + shift).clamp(min=TINY).log2_()
    steps_below_top = (logarithm if top is None else logarithm.sub_(top)).div_(minus_step)
    guess = steps_below_top.floor_().clamp_(0, last).nan_to_num_(nan=nan_code).int()
    return guess.add_(ratio <= _entries(edges, guess))


def _entries(table: Tensor, index: Tensor) -> Tensor:
    # not take(): index_select accepts int32
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def even_log_grid(codes: int, steps: Tensor, fractions: Tensor) -> LogGrid:
    """The grid of the values ``2 ** (-q * steps / parts)`` for q = 0 .. codes - 2, and zero.

    Args:
        codes: number of codes.
        steps: distance of two codes in parts of an octave, whole, ``[]``.
        fractions: `octave_fractions`, float32 ``[parts]``, rounded or not.
    """
    parts = len(fractions)
    numerators = torch.arange(codes - 1, device=fractions.device) * steps
    values = torch.where(numerators <= OCTAVES * parts, power_of_two(numerators, fractions), 0.0)
    following = torch.nn.functional.pad(values[1:], (0, 1))
    # sqrt is correctly rounded: the edge of two powers of two is the float32 number nearest to their geometric mean
    half = power_of_two(steps, octave_fractions(2 * parts, fractions.device))
    edges = torch.where(following > 0, (values * following).sqrt(), values * half)
    return LogGrid(torch.nn.functional.pad(values, (0, 1)), edges, steps / parts)
