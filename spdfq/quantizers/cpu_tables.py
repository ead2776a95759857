"""Dequantization by table lookup. CPU only: on any other device the formulas are computed.

On a CPU each pass over a large tensor costs time, and the formula of a fake quantizer takes many passes. A lookup
replaces them by one or two:

* There are only 65,536 different bfloat16 or float16 numbers. `two_byte_results` computes the result for each of them
  once and looks up the rest.
* A logarithmic quantizer is a step function of float32 numbers. `StepTable` looks up its value by the upper two bytes
  of a number, which say between which two edges it lies, or which one edge it has to be compared with.

Values and gradients are bit for bit those of the formulas, except for a gradient at NaN.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from spdfq.quantizers.remembered import is_traced

_TWO_BYTES = 2**16
_BITS = torch.int32  # a float32 number seen as an integer
_INFINITY_BITS = 0x7F800000
# a piece of this many numbers, with the tables, stays in the caches of a core from one pass to the next
_PIECE = 2**17
# index_select is the faster lookup up to so many threads, because it uses one only; take uses all
_FEW_THREADS = 2
# a table pays off if the tensor has several times as many numbers as the table
_LARGE = 8 * _TWO_BYTES


def table_pays(x: Tensor) -> bool:
    """Whether a lookup is faster than the formula: for large tensors on a CPU, unless the code is being exported."""
    on_cpu = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    # the number last: while code is exported, asking for it would fix the number of images
    return on_cpu and not is_traced() and x.numel() >= _LARGE


def two_byte_table_pays(x: Tensor) -> bool:
    """Whether ``x`` holds two-byte floats and `two_byte_results` is faster than the formula."""
    return x.dtype.is_floating_point and x.dtype.itemsize == 2 and table_pays(x)


# results of all two-byte floats


def two_byte_results(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x.float()).to(x.dtype)``, bit for bit, with its first derivative.

    Args:
        function: maps float32 to float32, element by element.
        x: bfloat16 or float16, of any shape.
    """
    every = torch.arange(_TWO_BYTES, device=x.device).to(torch.int16).view(x.dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _look_up_two_bytes(function(every.float()).to(x.dtype), _dense(x))
    leaf = every.float().requires_grad_()
    results = function(leaf)
    (slopes,) = torch.autograd.grad(results.sum(), leaf)
    looked_up: Tensor = _TwoByteLookUp.apply(x, results.detach().to(x.dtype), slopes, _pass_interval(every, slopes))
    return looked_up


class _TwoByteLookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, results: Tensor, slopes: Tensor, interval: tuple[float, float] | None) -> Tensor:
        ctx.interval = interval
        own = _dense(x)
        own = own.clone() if own is x else own  # later layers of the network may change x in place
        ctx.save_for_backward(own, None if interval else slopes)
        return _look_up_two_bytes(results, own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, slopes = ctx.saved_tensors
        if ctx.interval:
            # 0 outside the interval; the only operation for it that takes a single pass over two-byte numbers
            return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.interval), None, None, None
        with torch.no_grad():
            slope = _look_up_two_bytes(slopes, x)
        return (slope * gradients[0].float()).to(x.dtype), None, None, None


def _pass_interval(every: Tensor, slopes: Tensor) -> tuple[float, float] | None:
    """The open interval on which all slopes are 1, if all others are 0; ``None`` if there is no such interval.

    Args:
        every: all two-byte floats, by their bits.
        slopes: the slope at each of them.
    """
    numbers, slopes = _ascending(every), _ascending(slopes)
    numbers, slopes = numbers[~numbers.isnan()], slopes[~numbers.isnan()]
    passed = slopes == 1
    count, first = int(passed.sum()), int(passed.int().argmax())
    last = first + count - 1
    inside = 0 < first <= last < len(numbers) - 1
    only_zero_and_one = count + int((slopes == 0).sum()) == len(numbers)
    if not inside or not only_zero_and_one or not bool(passed[first : last + 1].all()):
        return None
    return float(numbers[first - 1]), float(numbers[last + 1])


def _ascending(table: Tensor) -> Tensor:
    """The entries of a table by bits in ascending order of the floats: from -NaN to -0, then from 0 to NaN."""
    return torch.cat([table[_TWO_BYTES // 2 :].flip(0), table[: _TWO_BYTES // 2]])


def _look_up_two_bytes(table: Tensor, x: Tensor) -> Tensor:
    """The entry of ``table`` for each two-byte float of the dense tensor ``x``."""
    entries = torch.empty_like(x, dtype=table.dtype)
    for piece, entry in _pieces(x, entries):
        _look_up(table, piece.view(torch.uint16).int(), entry)
    return entries


# step functions of float32 numbers


class StepTable:
    """A step function of float32 numbers: ``values[number of edges that x does not exceed]``, and NaN for NaN.

    The upper two bytes of a float32 number select an entry. An entry that no edge falls into has one value. An entry
    with an edge has two values, below and above. If all edges have the same lower two bytes, adding a constant to the
    bits moves the edges to the boundaries of entries, and one lookup suffices.

    Args:
        edges: float32 ``[n - 1]``, never rising.
        values: float32 ``[n]``.
    """

    def __init__(self, edges: Tensor, values: Tensor) -> None:
        differs = values.diff() != 0
        self._edges = edges[differs].flip(0)
        self._values = torch.cat([values[:1], values[1:][differs]])
        self._edge_bits = self._edges.unique().view(_BITS)

    @cached_property
    def usable(self) -> bool:
        """Whether the table gives the right values: no edge is negative, and no entry holds two edges."""
        entries = self._edge_bits >> 16
        return len(entries.unique()) == len(entries) and bool((self._edges >= 0).all())

    def at(self, x: Tensor) -> Tensor:
        """The values at float32 ``x`` of any shape; only if `usable`."""
        x = _dense(x)
        values = torch.empty_like(x)
        for piece, value in _pieces(x, values):
            bits = piece.view(_BITS)
            if self._aligned_table and _all_from_zero_to_infinity(bits):
                offset, table = self._aligned_table
                _look_up(table, (bits + offset).bitwise_right_shift_(16), value)
            else:
                thresholds, table = self._tables_with_thresholds
                entry = (bits >> 15).bitwise_and_(2 * _TWO_BYTES - 2)
                above = _look_up(thresholds, entry).sub_(bits).bitwise_right_shift_(31)  # -1 above, else 0
                _look_up(table, entry.sub_(above), value)
        return values

    @cached_property
    def _aligned_table(self) -> tuple[int, Tensor] | None:
        """If all edges have the same lower two bytes: what to add to the bits of a number, and the value of each entry.

        After the addition the upper two bytes of all numbers between two edges, the upper edge included, are different
        from those of all other numbers. It is for numbers from zero to infinity only.
        """
        lower_bytes = (self._edge_bits & (_TWO_BYTES - 1)).unique()
        if len(lower_bytes) != 1:
            return None
        entries = torch.arange(_INFINITY_BITS // _TWO_BYTES + 2, device=lower_bytes.device)
        largest = (entries * _TWO_BYTES + int(lower_bytes)).clamp(max=_INFINITY_BITS).int()
        return _TWO_BYTES - 1 - int(lower_bytes), self._computed(largest.view(torch.float32))

    @cached_property
    def _tables_with_thresholds(self) -> tuple[Tensor, Tensor]:
        """For each entry its edge (or its largest number), twice; and the values up to that number and above it.

        Both tables have two places for each entry, so that one index fits both.
        """
        smallest = torch.arange(_TWO_BYTES, dtype=_BITS, device=self._edge_bits.device) << 16
        largest = smallest | (_TWO_BYTES - 1)
        thresholds = largest.index_copy(0, (self._edge_bits >> 16).long(), self._edge_bits)
        for infinity in (_INFINITY_BITS // _TWO_BYTES, _INFINITY_BITS // _TWO_BYTES - _TWO_BYTES // 2):
            thresholds[infinity] = smallest[infinity]  # all other numbers of this entry are NaN
        ends = torch.stack([smallest, largest], dim=1).view(torch.float32)
        return repeat(thresholds, "k -> (k ends)", ends=2), rearrange(self._computed(ends), "k ends -> (k ends)")

    def _computed(self, x: Tensor) -> Tensor:
        codes = len(self._edges) - torch.searchsorted(self._edges, x)
        return torch.where(x.isnan(), x, self._values[codes])


def _all_from_zero_to_infinity(bits: Tensor) -> bool:
    """Whether the bits of float32 numbers, at least one, include neither a negative number nor NaN."""
    low, high = bits.aminmax()
    return int(low) >= 0 and int(high) <= _INFINITY_BITS


# memory


def _dense(x: Tensor) -> Tensor:
    """``x`` without gaps in memory: itself or a contiguous copy, which the following product would make anyway."""
    return x.resolve_neg().contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels last if ``x`` has that format, contiguous otherwise."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of dense tensors of the same memory format, in pieces that fit into the caches."""
    size = _PIECE * torch.get_num_threads()
    return zip(*(tensor.as_strided((tensor.numel(),), (1,)).split(size) for tensor in tensors), strict=True)


def _look_up(table: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    if torch.get_num_threads() > _FEW_THREADS:
        return torch.take(table, index.long(), out=out)
    return torch.index_select(table, 0, index, out=out)
