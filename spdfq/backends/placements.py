"""Placements: which kinds of tensors are quantized."""

from typing import ClassVar

from attrs import frozen

from spdfq.backends.products import KINDS
from spdfq.registry import placements


@placements.register("matmul_inputs", paper="arXiv:2212.08254")
@frozen(kw_only=True)
class MatmulInputs:
    """Both operands of every product: inputs and weights of linear and convolution layers, q, k, v, softmax output."""

    kinds: ClassVar[frozenset[str]] = frozenset(KINDS)
