"""Placements: which kinds of sites are quantized."""

from typing import ClassVar

from attrs import frozen

from spdfq.quantized.sites import (
    BRANCH,
    INPUT,
    KEY,
    LAYER_NORM,
    LOGITS,
    OPERANDS,
    PRODUCT,
    QUERY,
    RESIDUAL,
    SCORES,
    VALUE,
    WEIGHT,
)
from spdfq.recipe.structure import Checked
from spdfq.registry import placements


@placements.register("matmul_inputs", paper="arXiv:2212.08254")
@frozen(kw_only=True)
class MatmulInputs(Checked):
    """Both operands of every product: inputs and weights of linear and convolution layers, q, k, v, softmax output."""

    kinds: ClassVar[frozenset[str]] = frozenset(OPERANDS)


@placements.register("psaq", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Psaq(Checked):
    """PSAQ-ViT's sites: layer inputs, q, k, v, scores before the softmax, LayerNorm outputs, residual sums, logits.

    Both the residual sum and the branch that is added to it are quantized; the softmax output is not. A LayerNorm
    output or residual sum that enters a linear layer is quantized once. The paper's code quantizes q, k and v as one
    tensor, and also the sum of patch embedding and position.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(
        (WEIGHT, INPUT, QUERY, KEY, VALUE, PRODUCT, SCORES, LAYER_NORM, BRANCH, RESIDUAL, LOGITS)
    )


@placements.register("weights_only")
@frozen(kw_only=True)
class WeightsOnly(Checked):
    """Weights of linear and convolution layers; every activation stays in float."""

    kinds: ClassVar[frozenset[str]] = frozenset((WEIGHT,))
