"""Activation quantizers while a network learns: values left in float at random, and scales that are learned."""

import torch
from attrs import define, field
from torch import Tensor

from spdfq.backends.learning.blocks import Hidden
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import WEIGHT
from spdfq.quantizers import Quantizer


@define(eq=False)
class Activations:
    """The quantizers of activations, some values left in float at random (QDrop, arXiv 2203.05740).

    Args:
        model: whose quantizers.
        drop: share of the values that are left in float.
    """

    model: QuantizedModel
    drop: float
    _generator: torch.Generator | None = field(default=None, init=False)

    def seed(self, generator: torch.Generator) -> None:
        """Decides what is left in float from now on."""
        self._generator = generator

    def __call__(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """What is multiplied at a site."""
        return (
            self._dropped(tensor, self.model.quantized(name, kind, tensor)) if name in self.model.quantizers else tensor
        )

    def mixed(self, teacher: Hidden, student: Hidden) -> Hidden:
        """What enters a block: the student's values, some of them the teacher's."""
        return tuple(self._dropped(*pair) for pair in zip(teacher, student, strict=True))

    def _dropped(self, plain: Tensor, quantized: Tensor) -> Tensor:
        if not self.drop:
            return quantized
        left = torch.rand(plain.shape, generator=self._generator, device=plain.device) < self.drop
        return torch.where(left, plain, quantized)


def scaled_activations(model: QuantizedModel, prefix: str) -> dict[str, Quantizer]:
    """The quantizers of activations that have one scale for the whole tensor, at sites that start with ``prefix``.

    They are named after their scale in the network's state dict.
    """
    return {
        f"{name}_quantizer.scale": quantizer
        for name, quantizer in model.quantizers.items()
        if name.startswith(prefix) and model.sites[name].kind != WEIGHT
        if "scale" in quantizer.stores and quantizer.axis_of("scale") is None
    }
