"""Block-wise reconstruction: the weights of one block after the other learn to undo the quantization error."""

from typing import ClassVar, Literal

import torch
from attrs import define
from torch import Tensor

from spdfq.backends.learning.blocks import Hidden
from spdfq.backends.learning.reconstruction import Learner, Reconstruction
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import WEIGHT, Visit
from spdfq.registry import steps


@steps.register("blockwise", paper="arXiv:2412.16553")
@define(kw_only=True)
class Blockwise(Reconstruction):
    """Reconstruct block by block: minimise the 2-norm of the difference to the teacher's block output.

    Adam on the block's quantized weights with a straight-through gradient and cosine decay to zero; LayerNorm and zero
    points stay as they are, scales too unless ``scale_lr`` is set (SPDFQ, arXiv 2412.16553, section 3.4).

    With ``sites = "activations"`` the weights stay in float: the first of the three stages of I&S-ViT (arXiv
    2311.10126), which go on with ``repq`` and a second ``blockwise``.

    Args:
        biases: learn the biases beside the weights (unpublished).
        sites: what is quantized meanwhile, ``all`` or the ``activations`` alone.
    """

    name: ClassVar[str] = "blockwise"

    biases: bool = False
    sites: Literal["all", "activations"] = "all"

    def learner(self, model: QuantizedModel, block: str) -> Learner:
        """The weights themselves."""
        weights = model.weight_names(f"{block}.")
        named = dict(model.network.named_parameters())
        biases = [name.removesuffix("weight") + "bias" for name in weights] if self.biases else []
        names = [name for name in [*weights, *biases] if name in named]
        return StraightThrough(self.deployed(model), {name: named[name] for name in names})

    def distance(self, output: Hidden, target: Hidden, importance: Hidden | None) -> Tensor:
        """The 2-norm of the difference, over all tensors together."""
        errors = [(ours.float() - theirs.float()).square() for ours, theirs in zip(output, target, strict=True)]
        if importance:
            errors = [error * weight for error, weight in zip(errors, importance, strict=True)]
        return torch.stack([error.sum() for error in errors]).sum().sqrt()

    def deployed(self, model: QuantizedModel) -> Visit:
        """How sites are quantized."""

        def activations(name: str, kind: str, tensor: Tensor) -> Tensor:
            return tensor if kind == WEIGHT else model.quantized(name, kind, tensor)

        return model.quantized if self.sites == "all" else activations


class StraightThrough(Learner):
    """The weights themselves are learned, by the gradient that passes their quantizers.

    Args:
        quantized: how sites are quantized.
        named: parameters of the network by name.
    """

    def __init__(self, quantized: Visit, named: dict[str, Tensor]) -> None:
        self.quantized, self.parameters, self.changes = quantized, list(named.values()), list(named)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """The quantized weight."""
        return self.quantized(name, WEIGHT, weight)
