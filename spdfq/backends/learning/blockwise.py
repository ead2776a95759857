"""Block-wise reconstruction: the weights of one block after the other learn to compensate the quantization error."""

from typing import ClassVar, Literal

import torch
from attrs import define
from torch import Tensor

from spdfq.backends.blocks import Hidden
from spdfq.backends.learning.reconstruction import BlockLearner, Reconstruction, squared_errors
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantized.visiting import Visit
from spdfq.registry import steps


@steps.register("blockwise", paper="arXiv:2412.16553")
@define(kw_only=True)
class Blockwise(Reconstruction):
    """Reconstruct block by block: minimise the 2-norm of the difference from the teacher's block output.

    Adam on the block's quantized weights with a straight-through gradient and cosine decay to zero. LayerNorms and zero
    points do not change, and scales do only if ``scale_lr`` is set (SPDFQ, arXiv 2412.16553, section 3.4).

    With ``sites = "activations"`` the weights stay in float: the first of the three stages of I&S-ViT (arXiv
    2311.10126), whose other stages are ``repq`` and a second ``blockwise``.

    Args:
        biases: learn the biases too (unpublished).
        sites: what is quantized during the step, ``all`` or the ``activations`` alone.
    """

    name: ClassVar[str] = "blockwise"

    biases: bool = False
    sites: Literal["all", "activations"] = "all"

    def learner(self, model: QuantizedModel, block: str) -> BlockLearner:
        """Learns the weights themselves."""
        return StraightThrough(self.quantized(model), learned_parameters(model, block, self.biases))

    def distance(self, output: Hidden, target: Hidden, importance: Hidden | None) -> Tensor:
        """The 2-norm of the difference, over all tensors together."""
        errors = squared_errors(output, target, importance)
        return torch.stack([error.sum() for error in errors]).sum().sqrt()

    def quantized(self, model: QuantizedModel) -> Visit:
        """Quantizes all sites, or the activations alone."""

        def activations(name: str, kind: str, tensor: Tensor) -> Tensor:
            return tensor if kind == WEIGHT else model.quantized(name, kind, tensor)

        return model.quantized if self.sites == "all" else activations


def learned_parameters(model: QuantizedModel, block: str, biases: bool) -> dict[str, Tensor]:
    """The quantized weights of a block by name, and the biases beside them."""
    weights = model.weight_names(f"{block}.")
    named: dict[str, Tensor] = dict(model.network.named_parameters())
    beside = [name.removesuffix("weight") + "bias" for name in weights] if biases else []
    return {name: named[name] for name in [*weights, *beside] if name in named}


class StraightThrough(BlockLearner):
    """Learns the weights of a block by the straight-through gradient of their quantizers.

    Args:
        quantized: quantizes the sites.
        named: parameters of the network by name.
    """

    def __init__(self, quantized: Visit, named: dict[str, Tensor]) -> None:
        self.quantized, self.parameters, self.changes = quantized, list(named.values()), list(named)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """The quantized weight."""
        return self.quantized(name, WEIGHT, weight)
