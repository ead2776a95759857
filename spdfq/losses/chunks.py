"""Sizes of the chunks in which losses go through token pairs, so that temporary tensors stay small."""

import torch

# 1 MiB of float32 fits into the cache of a core (benchmarks/losses.py); an accelerator is faster with large kernels
_ELEMENTS_CPU = 2**18
_ELEMENTS = 2**24


def chunk_length(elements: int, device: torch.device) -> int:
    """How many rows to process at a time on a device, at least one.

    Args:
        elements: number of elements in a row.
        device: where the rows are.
    """
    limit = _ELEMENTS_CPU if device.type == "cpu" else _ELEMENTS
    return max(1, limit // max(1, elements))
