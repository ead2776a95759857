"""Two uniform grids that share one bit."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.quantizers.base import Parameters, bounded, straight_through
from spdfq.quantizers.searched import SearchedQuantizer
from spdfq.quantizers.uniform import LARGEST, usable
from spdfq.registry import quantizers

EXPONENTS = range(1, 16)


@quantizers.register("twin_uniform", paper="arXiv:2111.12293")
@define(eq=False, slots=False, kw_only=True)
class TwinUniformQuantizer(SearchedQuantizer):
    """Two uniform grids, one fine and one coarse, told apart by one bit: for softmax and GELU outputs.

    With ``h = 2**(bits - 1)`` there are h fine codes in steps of s and h coarse ones in steps of ``2**m * s``; m, one
    of 1 .. 15, is the one of least error, and an integer runtime aligns the two by shifts.

    ``split = "magnitude"`` (softmax outputs): the coarse grid ends at the range's top, the fine one has the smaller
    values. Code i below h is ``i * s``, code h + j is ``j * 2**m * s``; a value goes to the nearest of both. ``split =
    "sign"`` (GELU outputs): the fine grid has the negative values down to the range's end (a longer step where the
    positive ones would exceed m = 15), the coarse grid those from zero up. Code i below h is ``-i * s``, zero is code
    h.

    Stores ``scale`` (s, float32 ``[]``) and ``exponent`` (m, uint8 ``[]``). A range too small for a normal float32 step
    counts as zero and gets scale 1. The gradient to x is 1 from the first to the last value and 0 outside.

    Paper: PTQ4ViT, arXiv:2111.12293, section 3.2.

    Args:
        bits: width of a code in bits, 2 to 8.
        split: what decides which grid a value is on, its "magnitude" or its "sign".
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "exponent": torch.uint8}
    largest: ClassVar[dict[str, int]] = {"exponent": EXPONENTS[-1]}
    integers: ClassVar[str] = "yes"

    split: Literal["magnitude", "sign"] = field(default="magnitude", validator=validators.in_(("magnitude", "sign")))

    @property
    def signed(self) -> bool:
        """Whether it takes negative values."""
        return self.split == "sign"

    @property
    def one_ended(self) -> bool:
        """Whether only one end counts: the upper one for magnitudes, as a rule the lower one for signs."""
        return True

    @property
    def apart(self) -> int:
        """Number of codes of each grid."""
        return self.levels // 2

    @property
    def choices(self) -> Sequence[int]:
        """What the exponent can be."""
        return EXPONENTS

    @property
    def usual(self) -> int:
        """An exponent in the middle."""
        return 4

    def chosen(self, low: Tensor, high: Tensor, choice: float) -> Parameters:
        """Scale and exponent for ranges ``low``, ``high`` ``[C]``, extended to contain zero."""
        low, high = low.clamp(-LARGEST, 0.0), high.clamp(0.0, LARGEST)
        if self.split == "sign":
            fine = usable(torch.maximum(-low, high / 2 ** EXPONENTS[-1]) / (self.apart - 1))
        else:
            fine = usable(high / 2**choice / (self.apart - 1))
        return {"scale": fine, "exponent": torch.full_like(fine, choice, dtype=torch.uint8)}

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``."""
        last, ratio = self.apart - 1, torch.exp2(parameters["exponent"].float())
        fine = x / parameters["scale"]
        coarse = bounded(fine / ratio, -1, last)
        if self.split == "sign":
            on_coarse, first = fine.round() > -1, torch.zeros_like(ratio)
            fine = bounded(-fine, 0, last)
        else:
            first = torch.floor(last / ratio) + 1  # the smaller coarse values are fine ones too
            on_coarse = fine > (last + first * ratio) / 2
            fine = bounded(fine, 0, torch.inf)
        # between the two grids, and just below zero, values are rounded to an end and yet inside
        coarse_code = self.apart + torch.maximum(coarse.round(), first)
        rounded = torch.where(on_coarse, coarse_code, fine.round().clamp(max=last))
        return straight_through(torch.where(on_coarse, self.apart + coarse, fine), rounded)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``."""
        ratio = torch.exp2(parameters["exponent"].float())
        fine = -codes if self.split == "sign" else codes
        return torch.where(codes >= self.apart, (codes - self.apart) * ratio, fine) * parameters["scale"]

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))``, to the bit, without its history."""
        if parameters["scale"].requires_grad:
            return super().dequantized(x, parameters)
        with torch.no_grad():
            value = self.reconstruct(self.encode(x, parameters), parameters)
        if not x.requires_grad:
            return value
        ends = self.reconstruct(torch.tensor([self.apart - 1.0, self.levels - 1.0], device=x.device), parameters)
        inside = (x >= (ends[0] if self.signed else 0.0)) & (x <= ends[1])
        return straight_through(torch.where(inside, x, x.detach()), value)
