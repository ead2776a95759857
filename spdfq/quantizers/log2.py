"""Powers of two, for probabilities."""

from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer, bounded, straight_through
from spdfq.registry import quantizers

# keeps every value a normal float32 number, which no device flushes to zero
LAST_EXPONENT = 63
SMALLEST_SCALE = 2.0**-LAST_EXPONENT
# the largest float32 number below the square root of 1/2; as float32 has no number in between, comparing is exact
ROOT_HALF = 11863283 / 2**24


def nearest_exponent(ratio: Tensor) -> Tensor:
    """``round(-log2(ratio))`` for float32 ``ratio`` in (0, 1], exact whatever log2's last bit."""
    # log2 is off by an ulp here and there, so a value near a boundary could get a larger code than its left
    # neighbour; multiplying by a power of two is exact and settles it
    guess = (-ratio.log2()).round()
    rest = ratio * torch.exp2(guess)
    return guess + (rest <= ROOT_HALF).to(ratio.dtype) - (rest > 2 * ROOT_HALF).to(ratio.dtype)


@quantizers.register("log2", paper="arXiv:2111.13824")
@define(eq=False, slots=False, kw_only=True)
class Log2Quantizer(Quantizer):
    """Powers of two below the range's top, and zero: for softmax outputs.

    With ``n = 2**bits`` and the scale d = the top of the range, code q in 0 .. n - 2 is ``d * 2**-q``,
    ``q = round(-log2(x / d))``, and code n - 1 is exactly zero; values too small for exponent n - 2 are zero too. So
    there are n values, as many as the bits hold: the public FQ-ViT and RepQ-ViT codes keep n powers and zero besides,
    which is one value more. At 7 and 8 bits exponents end at 63, for float32's sake, and the codes between stay unused.

    Stores ``scale`` (float32 ``[]``). Values must be 0 or above when observed; a negative one given later is zero, one
    above the range is clamped to d. An all-zero range (or one below 2**-63) gets scale 1. The gradient to x is
    ``value / x`` (between 0.7 and 1.42), and 0 where clamped or zero.

    Paper: FQ-ViT, arXiv:2111.13824 (Log-Int-Softmax).

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    signed: ClassVar[bool] = False

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale for ranges that end at ``high``, float32 ``[C]``; ``low`` plays no part."""
        return {"scale": torch.where(high < SMALLEST_SCALE, 1.0, high)}

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``: ``round(-log2(x / d))``, or n - 1 for zero and what is nearest to it."""
        last = min(self.levels - 2, LAST_EXPONENT)
        ratio = bounded(x / parameters["scale"], 2.0 ** -(last + 1), 1.0)
        exponent = straight_through(-ratio.log2(), nearest_exponent(ratio))
        return torch.where(exponent > last, float(self.levels - 1), exponent)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``: ``d * 2**-codes``, and 0 for the last code."""
        return torch.where(codes == self.levels - 1, 0.0, parameters["scale"] * torch.exp2(-codes))
