"""One scale for all channels, and a power of two for each."""

from typing import ClassVar

import torch
from attrs import define, field
from torch import Tensor

from spdfq.quantizers.base import Parameters
from spdfq.quantizers.observers import Observer, Product, Statistics
from spdfq.quantizers.uniform import LARGEST, AffineQuantizer, check_axis, usable
from spdfq.registry import quantizers

EXPONENTS = range(4)


@quantizers.register("power_of_two_factor", paper="arXiv:2111.13824")
@define(eq=False, slots=False, kw_only=True)
class PowerOfTwoFactorQuantizer(AffineQuantizer):
    """Evenly spaced values, each channel's step 1, 2, 4 or 8 times the same one: for activations around LayerNorms.

    The step of channel c is ``2**a_c * s``. s and the zero point are those of ``uniform`` for the range of all
    channels, with ``8 * s`` for a step; a_c is the exponent of least error, so a channel of small values has a finer
    step. An integer runtime shifts by a_c. All of it is judged by values, never by a product's output.

    Stores ``scale`` (s, float32 ``[]``), ``zero_point`` (uint8 ``[]``) and ``exponent`` (a, uint8 ``[C]``). Zero is
    always a value. A range too small for a normal float32 step counts as zero and gets scale 1.

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
    largest: ClassVar[dict[str, int]] = {"exponent": EXPONENTS[-1]}

    axis: int = field(default=-1, validator=check_axis)

    @property
    def channel_axis(self) -> int:
        """The channel axis."""
        return self.axis

    def axis_of(self, name: str) -> int | None:
        """Only the exponent belongs to a channel."""
        return self.axis if name == "exponent" else None

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Each channel as if it were all: parameters for ranges ``low``, ``high`` ``[C]``, extended to contain zero."""
        low, high = low.clamp(-LARGEST, 0.0), high.clamp(0.0, LARGEST)
        exponent = torch.full_like(low, EXPONENTS[-1], dtype=torch.uint8)
        scale = usable((high - low) / (self.levels - 1) / 2 ** EXPONENTS[-1])
        zero_point = (-low / (scale * 2 ** EXPONENTS[-1])).round().clamp(0, self.levels - 1)
        return {"scale": scale, "zero_point": zero_point.to(torch.uint8), "exponent": exponent}

    def freeze(self, observer: Observer | None = None, product: Product | None = None) -> None:
        """Fixes the range and the exponents as `Quantizer.freeze` does; ``product`` plays no part."""
        super().freeze(observer)

    def fit(self, seen: Statistics, observer: Observer) -> Parameters:
        """One scale and zero point for the range of all channels ``[1]``, and the best exponent of each ``[C]``."""
        low, high = observer.range_of(seen, self)
        shared = self.fitted(low.min()[None], high.max()[None])
        channels = {name: parameter.expand(len(low)) for name, parameter in shared.items()}
        candidates = [channels | {"exponent": torch.full_like(channels["exponent"], a)} for a in EXPONENTS]
        errors = [self.error(seen.samples, each) for each in candidates]
        return shared | {"exponent": torch.stack(errors).argmin(dim=0).to(torch.uint8)}

    def step(self, parameters: Parameters) -> Parameters:
        """Scale and zero point of each channel."""
        scale = parameters["scale"] * torch.exp2(parameters["exponent"].float())
        return {"scale": scale, "zero_point": parameters["zero_point"]}
