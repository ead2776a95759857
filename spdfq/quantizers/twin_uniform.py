"""Two uniform grids, a fine and a coarse one, told apart by one bit of the code."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.quantizers.affine import LARGEST, usable_scale
from spdfq.quantizers.base import Parameters, bounded, straight_through
from spdfq.quantizers.searched import SearchedQuantizer
from spdfq.registry import quantizers

_EXPONENTS = range(1, 16)


@quantizers.register("twin_uniform", paper="arXiv:2111.12293")
@define(eq=False, slots=False, kw_only=True)
class TwinUniformQuantizer(SearchedQuantizer):
    """Two uniform grids, one fine and one coarse, told apart by one bit: for softmax and GELU outputs.

    With ``h = 2**(bits - 1)`` there are h fine codes in steps of s and h coarse ones in steps of ``2**m * s``. m is the
    one of 1 .. 15 with the least error; an integer runtime aligns the two grids by shifts.

    ``split = "magnitude"`` (softmax outputs): the coarse grid ends at the range's upper end, the fine grid has the
    smaller values. Code i below h is ``i * s``, code h + j is ``j * 2**m * s``; a value goes to the nearest of both.
    ``split = "sign"`` (GELU outputs): the fine grid has the negative values down to the range's lower end (with a
    longer step if the positive values would need m > 15), the coarse grid has the values from zero up. Code i below h
    is ``-i * s``, zero is code h.

    Stores ``scale`` (s, float32 ``[]``) and ``exponent`` (m, uint8 ``[]``). A range too small for a normal float32 step
    counts as zero and gets scale 1. The gradient to x is 1 from the first to the last value and 0 outside.

    Paper: PTQ4ViT, arXiv:2111.12293, section 3.2.

    Args:
        bits: width of a code in bits, 2 to 8.
        split: what decides on which grid a value lies, its "magnitude" or its "sign".
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "exponent": torch.uint8}
    largest: ClassVar[dict[str, int]] = {"exponent": _EXPONENTS[-1]}
    integers: ClassVar[str] = "yes"

    split: Literal["magnitude", "sign"] = field(default="magnitude", validator=validators.in_(("magnitude", "sign")))

    @property
    def signed(self) -> bool:
        """Whether it accepts negative values."""
        return self.split == "sign"

    @property
    def one_ended(self) -> bool:
        """Whether only one end matters: the upper end for "magnitude", usually the lower end for "sign"."""
        return True

    @property
    def grid_size(self) -> int:
        """Number of codes of each grid."""
        return self.levels // 2

    @property
    def choices(self) -> Sequence[int]:
        """The candidates for the exponent."""
        return _EXPONENTS

    @property
    def default_choice(self) -> int:
        """An exponent in the middle."""
        return 4

    def fitted_with(self, choice: float, low: Tensor, high: Tensor) -> Parameters:
        """Scale and exponent for the ranges ``low``, ``high`` ``[C]``, extended to contain zero."""
        low, high = low.clamp(-LARGEST, 0.0), high.clamp(0.0, LARGEST)
        if self.split == "sign":
            fine = usable_scale(torch.maximum(-low, high / 2 ** _EXPONENTS[-1]) / (self.grid_size - 1))
        else:
            fine = usable_scale(high / 2**choice / (self.grid_size - 1))
        return {"scale": fine, "exponent": torch.full_like(fine, choice, dtype=torch.uint8)}

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``."""
        last, ratio = self.grid_size - 1, torch.exp2(parameters["exponent"].float())
        fine = x / parameters["scale"]
        coarse = bounded(fine / ratio, -1, last)
        if self.split == "sign":
            on_coarse, first = fine.round() > -1, torch.zeros_like(ratio)
            fine = bounded(-fine, 0, last)
        else:
            first = torch.floor(last / ratio) + 1  # smaller coarse values are values of the fine grid too
            on_coarse = fine > (last + first * ratio) / 2
            fine = bounded(fine, 0.0, torch.inf)
        # between the two grids, and just below zero, a value is rounded to the end of a grid but its gradient is 1
        coarse_code = self.grid_size + torch.maximum(coarse.round(), first)
        rounded = torch.where(on_coarse, coarse_code, fine.round().clamp(max=last))
        return straight_through(torch.where(on_coarse, self.grid_size + coarse, fine), rounded)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``."""
        ratio = torch.exp2(parameters["exponent"].float())
        fine = -codes if self.split == "sign" else codes
        return torch.where(codes >= self.grid_size, (codes - self.grid_size) * ratio, fine) * parameters["scale"]

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))``, bit for bit, without recording every operation for the gradient."""
        if parameters["scale"].requires_grad:
            return super().dequantized(x, parameters)
        with torch.no_grad():
            value = self.reconstruct(self.encode(x, parameters), parameters)
        if not x.requires_grad:
            return value
        # made on the device: a list would be copied to it, which waits for all earlier work
        last_codes = torch.arange(self.grid_size - 1, self.levels, self.grid_size, device=x.device, dtype=x.dtype)
        ends = self.reconstruct(last_codes, parameters)
        inside = (x >= (ends[0] if self.signed else 0.0)) & (x <= ends[1])
        return straight_through(torch.where(inside, x, x.detach()), value)
