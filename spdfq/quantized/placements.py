"""Placements: which kinds of tensors are quantized."""

from typing import ClassVar

from attrs import frozen

from spdfq.quantized.products import (
    BRANCH,
    INPUT,
    KEY,
    KINDS,
    LAYER_NORM,
    LOGITS,
    PRODUCT,
    QUERY,
    RESIDUAL,
    SCORES,
    VALUE,
    WEIGHT,
)
from spdfq.registry import placements


@placements.register("matmul_inputs", paper="arXiv:2212.08254")
@frozen(kw_only=True)
class MatmulInputs:
    """Both operands of every product: inputs and weights of linear and convolution layers, q, k, v, softmax output."""

    kinds: ClassVar[frozenset[str]] = frozenset(KINDS)


@placements.register("psaq", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Psaq:
    """PSAQ-ViT's points: layer inputs, q, k, v, scores before the softmax, LayerNorm outputs, residual sums, logits.

    Both the sum and the branch that is added are quantized; the softmax output is not. A LayerNorm output or residual
    sum that enters a linear layer is quantized once. The paper's code quantizes q, k and v as one tensor, and the sum
    of patch embedding and position too.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(
        (WEIGHT, INPUT, QUERY, KEY, VALUE, PRODUCT, SCORES, LAYER_NORM, BRANCH, RESIDUAL, LOGITS)
    )


@placements.register("weights_only")
@frozen(kw_only=True)
class WeightsOnly:
    """Weights of linear and convolution layers; every activation stays in float."""

    kinds: ClassVar[frozenset[str]] = frozenset((WEIGHT,))
