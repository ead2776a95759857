"""QDrop: while a network learns, some activation values stay in float at random."""

import torch
from attrs import define, field
from torch import Tensor

from spdfq.backends.blocks import Hidden
from spdfq.backends.learning.shares import Share
from spdfq.quantized.model import QuantizedModel


@define(eq=False)
class QDrop:
    """Quantizes activations, except for a random share of their values (QDrop, arXiv 2203.05740).

    Args:
        model: owns the quantizers.
        drop: share of the values that stay in float.
    """

    model: QuantizedModel
    drop: float
    _generator: torch.Generator | None = field(default=None, init=False)
    _share: Share = field(factory=lambda: Share.whole(slice(None)), init=False)

    def seed(self, generator: torch.Generator, share: Share) -> None:
        """Sets the generator of all following draws, on the device of the activations, and the images they are for."""
        self._generator, self._share = generator, share

    def __call__(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """The partly quantized tensor of a site; a `Visit`."""
        if name not in self.model.quantizers:
            return tensor
        return self._mixed(tensor, self.model.quantized(name, kind, tensor))

    def mixed_inputs(self, teacher: Hidden, student: Hidden) -> Hidden:
        """The inputs of a block: the student's values, with a random share from the teacher."""
        return tuple(self._mixed(*pair) for pair in zip(teacher, student, strict=True))

    def _mixed(self, plain: Tensor, quantized: Tensor) -> Tensor:
        if not self.drop:
            return quantized
        in_float = self._share.drawn(plain.shape, self._generator, plain.device) < self.drop
        return torch.where(in_float, plain, quantized)
