"""A quantized model beside its reference: forward passes in which single sites are in float, or quantized alone."""

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType

import torch
from attrs import define, field
from torch import Tensor, nn

from spdfq.backends.divergence import divergence
from spdfq.errors import NonFiniteError
from spdfq.quantized.dequantized import dequantized, folded_shift
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantized.visiting import Visit

# twice as far from the float weight as zero is: another basis, or a weight that was learned anew
_ANOTHER_WEIGHT = 1.0
Change = Callable[[Tensor], Tensor]


@define(eq=False)
class Images:
    """Images, and what the teacher says about them.

    Args:
        images: ``[n, C, H, W]``, normalised.
        target: the teacher's output, ``[n, K]``.
        labels: int64 ``[n]``; ``None`` without labels.
    """

    images: Tensor
    target: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@define(eq=False)
class Outcome:
    """How far a model is from the teacher on some images.

    Args:
        divergences: float32 ``[n]``, of each image: KL divergence of the class probabilities from the teacher's, in
            nats; for a model without a head, the squared difference of the features relative to the teacher's.
        top1: accuracy in percent; ``None`` without labels.
    """

    divergences: Tensor
    top1: float | None = None

    @property
    def kl(self) -> float:
        """The mean over the images."""
        return float(self.divergences.mean())

    def fall_to(self, other: "Outcome") -> tuple[float, float]:
        """How much the divergence falls to that of another model on the same images, and the standard error."""
        falls = self.divergences - other.divergences
        error = float(falls.std()) / len(falls) ** 0.5 if len(falls) > 1 else 0.0
        return float(falls.mean()), error


@define(eq=False)
class Pair:
    """A quantized model and its reference.

    Args:
        model: the quantized one.
        reference: the same back-end without the steps that learn.
        headless: whether the outputs are features.
        batch: images in one forward pass.
    """

    model: QuantizedModel
    reference: QuantizedModel
    headless: bool
    batch: int = 32
    passes: int = field(default=0, init=False)
    weights: dict[str, Tensor] = field(init=False)

    def __attrs_post_init__(self) -> None:
        model = self.model
        # quantized once instead of in every forward pass
        self.weights = {name: model.quantizers[name](model.weight(name)).detach() for name in model.weight_names()}

    @cached_property
    def sites(self) -> list[str]:
        """The quantized sites that have a counterpart in float."""
        return [name for name in self.model.quantizers if name not in self.lost]

    @cached_property
    def lost(self) -> list[str]:
        """Quantized weights that are not near the reference's, so that nothing says what they are in float."""
        found = []
        for name, weight in self.weights.items():
            plain = self.reference.weight(name)
            if plain.shape != weight.shape or (weight - plain).norm() > _ANOTHER_WEIGHT * plain.norm():
                found.append(name)
        return found

    def quantized(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """The quantized tensor of a site; a `Visit`."""
        return self.weights[name] if name in self.weights else self.model.quantized(name, kind, tensor)

    def floating(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """The float tensor of a site for the network of the quantized model; a `Visit`."""
        if kind == WEIGHT:
            return self.reference.weight(name)
        shift = self.shift(name)
        return tensor + shift if shift else tensor

    def shift(self, site: str) -> float:
        """What the bias behind a site contains of its quantizer's shift."""
        return folded_shift(self.model.quantizers[site]) if site in self.model.quantizers else 0.0

    def all_quantized(self, images: Images, changes: Mapping[str, Change] = MappingProxyType({})) -> Outcome:
        """The quantized model, with other tensors at some sites."""

        def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
            return changes[name](tensor) if name in changes else self.quantized(name, kind, tensor)

        return self._outcome(self.model, visit, images)

    def alone_in_float(self, site: str, images: Images) -> Outcome:
        """The quantized model with one site in float."""

        def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
            return (self.floating if name == site else self.quantized)(name, kind, tensor)

        return self._outcome(self.model, visit, images)

    def alone_quantized(self, site: str, images: Images) -> Outcome:
        """The float model with one site quantized."""

        def visit(name: str, _: str, tensor: Tensor) -> Tensor:
            if name != site:
                return tensor
            return self.weights[name] if name in self.weights else dequantized(self.model.quantizers[name], tensor)

        return self._outcome(self.reference, visit, images)

    @torch.no_grad()
    def _outcome(self, model: QuantizedModel, visit: Visit, images: Images) -> Outcome:
        with model.visiting(visit):
            output = self.outputs(model.network, images.images)
        found = divergence(output, images.target, self.headless).clamp(min=0)
        if not bool(found.isfinite().all()):
            raise NonFiniteError("doctor: the output is not finite with a site in float; check the images")
        labels = images.labels
        top1 = None if labels is None else 100 * float((output.argmax(1) == labels).float().mean())
        return Outcome(found, top1)

    @torch.no_grad()
    def outputs(self, network: nn.Module, images: Tensor) -> Tensor:
        """The float32 output ``[n, K]`` of a network for images, batch by batch."""
        self.passes += len(images)
        return torch.cat([network(part).float() for part in images.split(self.batch)])
