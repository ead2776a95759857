"""Dequantization by tables, on a CPU, where each pass over memory costs.

There are no more than 65,536 two-byte floats, so a table holds the value of each. Of a float32, the first two bytes
say between which thresholds it lies, or which one to compare it with.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

_ALL = 2**16
_INTEGER = torch.int32  # of the size of a float32
_INFINITE = 0x7F800000
# numbers that stay in a core's cache from one pass to the next, with the tables
_PIECE = 2**17
# torch's faster way to look up, which threads do not share, is the faster one up to so many
_FEW_THREADS = 2
# a table pays where it is looked up several times as often as it is long
_ENOUGH = 8 * _ALL


def in_reach(x: Tensor) -> bool:
    """Whether the numbers lie in a CPU's memory, where each pass over them costs, and may decide what is done."""
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    return plain and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def pays(x: Tensor) -> bool:
    """Whether looking ``x`` up is faster than computing."""
    return x.numel() >= _ENOUGH and in_reach(x)


def pays_in_two_bytes(x: Tensor) -> bool:
    """Whether `looked_up` is for ``x``, and faster."""
    return x.dtype.is_floating_point and x.dtype.itemsize == 2 and pays(x)


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps: itself, or a contiguous copy, which products of permuted tensors would make anyway."""
    return x.resolve_neg().contiguous(memory_format=layout(x))


def layout(x: Tensor) -> torch.memory_format:
    """Channels last for what has them there, contiguous for all else."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of tensors without gaps, alike in layout, a piece after the other that stays in the caches."""
    size = _PIECE * torch.get_num_threads()
    return zip(*(tensor.as_strided((tensor.numel(),), (1,)).split(size) for tensor in tensors), strict=True)


def looked_up(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x.float()).to(x.dtype)`` to the bit, with its first derivative.

    Args:
        function: maps float32 to float32, each element by itself.
        x: bfloat16 or float16, of any shape.
    """
    every = torch.arange(_ALL, device=x.device).to(torch.int16).view(x.dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _select(function(every.float()).to(x.dtype), dense(x))
    leaf = every.float().requires_grad_()
    values = function(leaf)
    (slopes,) = torch.autograd.grad(values.sum(), leaf)
    result: Tensor = _LookUp.apply(x, values.detach().to(x.dtype), slopes, _passed(every, slopes))
    return result


class Steps:
    """A function of float32 with few steps: ``values[number of edges that x does not exceed]``, NaN for NaN.

    Args:
        edges: float32 ``[n - 1]``, never rising.
        values: float32 ``[n]``.
    """

    def __init__(self, edges: Tensor, values: Tensor) -> None:
        kept = values.diff() != 0
        self._edges, self._values = edges[kept].flip(0), torch.cat([values[:1], values[1:][kept]])
        self._bits = self._edges.unique().view(_INTEGER)

    @property
    def apart(self) -> bool:
        """Whether it can be looked up: no two steps begin with the same two bytes, and none is negative."""
        return len((self._bits >> 16).unique()) == len(self._bits) and bool((self._edges >= 0).all())

    def at(self, x: Tensor) -> Tensor:
        """The function's values at float32 ``x`` of any shape; only if the steps are `apart`."""
        x = dense(x)
        values = torch.empty_like(x)
        for piece, value in pieces(x, values):
            bits = piece.view(_INTEGER)
            if self._one_table and _from_zero_up(bits):
                carry, table = self._one_table
                _entries(table, (bits + carry).bitwise_right_shift_(16), value)
            else:
                thresholds, table = self._two_tables
                index = (bits >> 15).bitwise_and_(2 * _ALL - 2)
                above = _entries(thresholds, index).sub_(bits).bitwise_right_shift_(31)  # -1 or 0
                _entries(table, index.sub_(above), value)
        return values

    @cached_property
    def _one_table(self) -> tuple[int, Tensor] | None:
        """If all steps end with the same two bytes: what carries all above them to the next two, and their values."""
        ends = (self._bits & (_ALL - 1)).unique()
        if len(ends) != 1:
            return None
        beginnings = torch.arange(_INFINITE // _ALL + 2, device=ends.device)
        largest = (beginnings * _ALL + int(ends)).clamp(max=_INFINITE).int()
        return _ALL - 1 - int(ends), self._computed(largest.view(torch.float32))

    @cached_property
    def _two_tables(self) -> tuple[Tensor, Tensor]:
        """For each two bytes, twice, the last number before the step, or of all; the values up to there and above."""
        first = torch.arange(_ALL, dtype=_INTEGER, device=self._bits.device) << 16
        last = first | (_ALL - 1)
        thresholds = last.index_copy(0, (self._bits >> 16).long(), self._bits)
        for infinite in (_INFINITE // _ALL, _INFINITE // _ALL - _ALL // 2):
            thresholds[infinite] = first[infinite]  # what exceeds infinity is NaN
        ends = torch.stack([first, last], dim=1).view(torch.float32)
        return thresholds.repeat_interleave(2), self._computed(ends).flatten()

    def _computed(self, x: Tensor) -> Tensor:
        codes = len(self._edges) - torch.searchsorted(self._edges, x)
        return torch.where(x.isnan(), x, self._values[codes])


def _from_zero_up(bits: Tensor) -> bool:
    """Whether the bits of float32 numbers, at least one, are of none that is negative or NaN."""
    low, high = bits.aminmax()
    return int(low) >= 0 and int(high) <= _INFINITE


def _select(table: Tensor, x: Tensor) -> Tensor:
    """The entries of ``table`` for ``x`` without gaps."""
    entries = torch.empty_like(x, dtype=table.dtype)
    for piece, entry in pieces(x, entries):
        _entries(table, _index(piece), entry)
    return entries


def _index(piece: Tensor) -> Tensor:
    return piece.view(torch.uint16).int()


def _entries(table: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    if torch.get_num_threads() > _FEW_THREADS:
        return torch.take(table, index.long(), out=out)
    return torch.index_select(table, 0, index, out=out)


def _passed(every: Tensor, slopes: Tensor) -> tuple[float, float] | None:
    """The ends, exclusive, of the one interval on which the gradient passes as it is, if it is 0 outside; or None."""
    values, slopes = _rising(every), _rising(slopes)
    values, slopes = values[~values.isnan()], slopes[~values.isnan()]
    inside = slopes == 1
    count, first = int(inside.sum()), int(inside.int().argmax())
    last = first + count - 1
    if (
        not 0 < first <= last < len(values) - 1
        or count + int((slopes == 0).sum()) < len(values)
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
        own = dense(x)
        own = own.clone() if own is x else own  # the network may go on in place
        ctx.save_for_backward(own, None if passed else slopes)
        return _select(values, own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, slopes = ctx.saved_tensors
        if ctx.passed:
            # of the operations that tell an interval from the rest, the one that is a single pass in two bytes
            return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.passed), None, None, None
        with torch.no_grad():
            own = _select(slopes, x)
        return (own * gradients[0].float()).to(x.dtype), None, None, None
