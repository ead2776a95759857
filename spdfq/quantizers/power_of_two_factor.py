"""Evenly spaced values with one scale for all channels, and a power of two for each channel."""

from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.affine import LARGEST, AffineQuantizer, usable_scale
from spdfq.quantizers.base import Parameters
from spdfq.quantizers.observers import Observer
from spdfq.quantizers.product import Product
from spdfq.quantizers.statistics import Statistics
from spdfq.registry import quantizers

_EXPONENTS = range(4)


@quantizers.register("power_of_two_factor", paper="arXiv:2111.13824")
@define(eq=False, slots=False, kw_only=True)
class PowerOfTwoFactorQuantizer(AffineQuantizer):
    """Evenly spaced values, with 1, 2, 4 or 8 times one step for each channel: for activations around LayerNorms.

    The step of channel c is ``2**a_c * s``. s and the zero point are those of ``uniform`` for the range of all
    channels, with ``8 * s`` as the step. a_c is the exponent of least error, so a channel of small values has a finer
    step. An integer runtime shifts by a_c. Everything is chosen by the error of the values, never by that of a product.

    Stores ``scale`` (s, float32 ``[]``), ``zero_point`` (uint8 ``[]``) and ``exponent`` (a, uint8 ``[C]``). Zero is
    always one of the values. A range too small for a normal float32 step counts as zero and gets scale 1.

    Paper: FQ-ViT, arXiv:2111.13824, section 3.2.

    Args:
        bits: width of a code in bits, 2 to 8.
        axis: the channel axis, -1 for the features of tokens.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {
        "scale": torch.float32,
        "zero_point": torch.uint8,
        "exponent": torch.uint8,
    }
    largest: ClassVar[dict[str, int]] = {"exponent": _EXPONENTS[-1]}

    axis: int = -1

    @property
    def channel_axis(self) -> int:
        """The channel axis."""
        return self.axis

    def axis_of(self, name: str) -> int | None:
        """The channel axis for the exponent; all channels share everything else."""
        return self.axis if name == "exponent" else None

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Parameters for the ranges ``low``, ``high`` ``[C]``, with zero included; each as if for the whole tensor."""
        low, high = low.clamp(-LARGEST, 0.0), high.clamp(0.0, LARGEST)
        exponent = torch.full_like(low, _EXPONENTS[-1], dtype=torch.uint8)
        scale = usable_scale((high - low) / (self.levels - 1) / 2 ** _EXPONENTS[-1])
        zero_point = (-low / (scale * 2 ** _EXPONENTS[-1])).round().clamp(0, self.levels - 1)
        return {"scale": scale, "zero_point": zero_point.to(torch.uint8), "exponent": exponent}

    def freeze(self, observer: Observer | None = None, product: Product | None = None) -> None:
        """Fixes the range and the exponents like `Quantizer.freeze`; ``product`` is not used."""
        super().freeze(observer)

    def fit(self, seen: Statistics, observer: Observer) -> Parameters:
        """One scale and zero point for the range of all channels ``[1]``, and the best exponent of each ``[C]``."""
        low, high = observer.range_of(seen, self)
        shared = self.fitted(low.min()[None], high.max()[None])
        channels = {name: parameter.expand(len(low)) for name, parameter in shared.items()}
        candidates = [channels | {"exponent": torch.full_like(channels["exponent"], a)} for a in _EXPONENTS]
        errors = [self.error(seen.samples, each) for each in candidates]
        return shared | {"exponent": torch.stack(errors).argmin(dim=0).to(torch.uint8)}

    def step(self, parameters: Parameters) -> Parameters:
        """Scale and zero point of each channel."""
        scale = parameters["scale"] * torch.exp2(parameters["exponent"].float())
        return {"scale": scale, "zero_point": parameters["zero_point"]}
