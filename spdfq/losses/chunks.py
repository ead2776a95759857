"""Pieces of a computation over token pairs, so small that its temporaries never matter."""

from collections.abc import Iterator

import torch

# 1 MiB of float32 stays in a core's own cache (benchmarks/losses.py); an accelerator wants long kernels instead
_ELEMENTS_CPU = 2**18
_ELEMENTS = 2**24


def chunk_length(elements: int, device: torch.device) -> int:
    """How many rows of so many elements suit the device at a time; at least one."""
    limit = _ELEMENTS_CPU if device.type == "cpu" else _ELEMENTS
    return max(1, limit // max(1, elements))


def row_chunks(rows: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``elements`` elements each, as many at a time as suit the device."""
    step = chunk_length(elements, device)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
