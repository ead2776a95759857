"""Activation quantizers while a network learns: values left in float at random, and scales that are learned."""

import torch
from attrs import define, field
from torch import Tensor

from spdfq.backends.blocks import Hidden
from spdfq.backends.model import QuantizedModel
from spdfq.backends.products import WEIGHT
from spdfq.quantizers import Quantizer, UniformQuantizer


@define(eq=False)
class Activations:
    """The quantizers of activations during reconstruction.

    Args:
        model: whose quantizers.
        drop: share of the values that are left in float at random.
        factors: logarithm ``[]`` of the factor of each learned scale, by site.
    """

    model: QuantizedModel
    drop: float
    factors: dict[str, Tensor]
    _generator: torch.Generator | None = field(default=None, init=False)

    @classmethod
    def of(cls, model: QuantizedModel, drop: float, learned: str | None) -> "Activations":
        """With the scales of uniform per-tensor quantizers learned at sites whose name starts with ``learned``."""
        factors = {
            name: torch.zeros_like(quantizer.tensors()["scale"])
            for name, quantizer in model.quantizers.items()
            if learned is not None and name.startswith(learned) and model.sites[name].kind != WEIGHT
            if isinstance(quantizer, UniformQuantizer) and quantizer.channel_axis is None
        }
        return cls(model, drop, factors)

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned."""
        return list(self.factors.values())

    @property
    def changes(self) -> list[str]:
        """Names, in the network's state dict, of what `finish` changes."""
        return [f"{name}_quantizer.scale" for name in self.factors]

    def seed(self, generator: torch.Generator) -> None:
        """Decides what is left in float from now on."""
        self._generator = generator

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What is multiplied at a site."""
        quantizer = self.model.quantizers.get(name)
        if quantizer is None:
            return tensor
        factor = self.factors.get(name)
        return self._dropped(tensor, quantizer(tensor) if factor is None else _rescaled(quantizer, factor, tensor))

    def mixed(self, teacher: Hidden, student: Hidden) -> Hidden:
        """What enters a block: the student's values, some of them the teacher's."""
        return tuple(self._dropped(*pair) for pair in zip(teacher, student, strict=True))

    def finish(self) -> None:
        """Fix the learned scales."""
        for name, factor in self.factors.items():
            quantizer = self.model.quantizers[name]
            stored = quantizer.tensors()
            quantizer.restore({**stored, "scale": stored["scale"] * factor.detach().exp()})

    def _dropped(self, plain: Tensor, quantized: Tensor) -> Tensor:
        if not self.drop:
            return quantized
        left = torch.rand(plain.shape, generator=self._generator, device=plain.device) < self.drop
        return torch.where(left, plain, quantized)


def _rescaled(quantizer: Quantizer, factor: Tensor, tensor: Tensor) -> Tensor:
    """The quantized tensor under a scale times ``exp(factor)``, with its gradient to the factor: round(x/s) - x/s."""
    stored = quantizer.tensors()
    parameters = {**stored, "scale": stored["scale"] * factor.exp()}
    return quantizer.reconstruct(quantizer.encode(tensor.float(), parameters), parameters).to(tensor.dtype)
