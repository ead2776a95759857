"""Evenly spaced values, with one scale per tensor or per channel."""

from typing import Literal

import torch
from attrs import define, field
from torch import Tensor

from spdfq.quantizers.affine import LARGEST, AffineQuantizer, usable_scale
from spdfq.quantizers.base import Parameters
from spdfq.quantizers.option_checks import check_wide_bits
from spdfq.registry import quantizers


@quantizers.register("uniform", paper="arXiv:1712.05877")
@define(eq=False, slots=False, kw_only=True)
class UniformQuantizer(AffineQuantizer):
    """Evenly spaced values: ``s * (clamp(round(x / s) + z, 0, n - 1) - z)`` with ``n = 2**bits``.

    Stores ``scale`` (s, float32) and ``zero_point`` (z; uint8, or int32 at 16 bits), ``[]`` per tensor or ``[C]`` per
    channel. Zero is always one of the values. Asymmetric: the range is extended to contain zero,
    ``s = (high - low) / (n - 1)``, ``z = round(-low / s)``; rounding z moves both ends of the grid by up to half a
    step. Symmetric: ``z = n / 2``, ``s = max(|low|, |high|) / (n / 2 - 1)``. In both cases the error of a value inside
    the range is at most half a step, also at the ends. A range too small for a normal float32 step counts as zero and
    gets scale 1.

    The gradient to x is 1 where the rounded value has a code and 0 where it is clamped.

    Paper: Jacob et al., arXiv:1712.05877, section 2.1.

    Args:
        bits: width of a code in bits, 2 to 8, or 16 for activations.
        symmetric: put zero in the middle of the codes; for weights.
        granularity: what shares one scale, the whole "tensor" or each "channel".
        axis: the channel axis if granularity is "channel", 0 for the output channels of weights.
    """

    bits: int = field(default=4, validator=check_wide_bits)
    symmetric: bool = False
    granularity: Literal["tensor", "channel"] = "tensor"
    axis: int = 0

    @property
    def one_ended(self) -> bool:
        """Whether only the end of larger magnitude matters."""
        return self.symmetric

    @property
    def channel_axis(self) -> int | None:
        """The channel axis, or ``None`` per tensor."""
        return self.axis if self.granularity == "channel" else None

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale and zero point for the ranges ``low``, ``high`` float32 ``[C]``, extended to contain zero."""
        low, high = low.clamp(-LARGEST, 0.0), high.clamp(0.0, LARGEST)
        if self.symmetric:
            half = self.levels // 2
            scale = usable_scale(torch.maximum(-low, high) / (half - 1))
            zero_point = torch.full_like(scale, half)
        else:
            scale = usable_scale((high - low) / (self.levels - 1))
            zero_point = (-low / scale).round().clamp(0, self.levels - 1)
        return {"scale": scale, "zero_point": zero_point.to(self.code_dtype)}
