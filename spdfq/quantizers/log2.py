"""Powers of two, and of the square root of two."""

from typing import ClassVar

import torch
from attrs import define

from spdfq.quantizers.base import Parameters
from spdfq.quantizers.log_grid import LogGrid, even_log_grid, octave_fractions
from spdfq.quantizers.logarithmic import LogarithmicQuantizer
from spdfq.registry import quantizers


@quantizers.register("log2", paper="arXiv:2111.13824")
@define(eq=False, slots=False, kw_only=True)
class Log2Quantizer(LogarithmicQuantizer):
    """Powers of two below the range's upper end, and zero: for softmax outputs.

    With ``n = 2**bits`` and the scale d = the upper end of the range, code q in 0 .. n - 2 is ``d * 2**-q``,
    ``q = round(-log2(x / d))``. Code n - 1 is exactly zero; values too small for exponent n - 2 are zero too. So there
    are n values, as many as the bits hold. The public FQ-ViT and RepQ-ViT codes have n powers and zero, one value more.
    At 7 and 8 bits the exponents end at 63, because float32 ends soon after, and all later codes are zero too.

    Stores ``scale`` (float32 ``[]``). Observed values must be 0 or above. Afterwards, a negative value becomes zero and
    a value above the range is clamped to d. A range of zeros only (or one below 2**-63) gets scale 1. The gradient to x
    is ``value / x`` (between 0.7 and 1.42), and 0 where clamped or zero.

    Paper: FQ-ViT, arXiv:2111.13824 (Log-Int-Softmax).

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    integers: ClassVar[str] = "yes"
    parts: ClassVar[int] = 1

    def grid(self, parameters: Parameters) -> LogGrid:
        """Powers of two, or of its root, up to 1, and zero."""
        device = parameters["scale"].device
        one = torch.ones((), dtype=torch.int64, device=device)
        return even_log_grid(self.levels, one, octave_fractions(self.parts, device))


@quantizers.register("log_sqrt2", paper="arXiv:2212.08254")
@define(eq=False, slots=False, kw_only=True)
class LogSqrt2Quantizer(Log2Quantizer):
    """Powers of the square root of two below the range's upper end, and zero: for softmax outputs.

    Like ``log2`` with twice as many steps: code q in 0 .. n - 2 is ``d * 2**-ceil(q / 2)``, times the square root of
    two for odd q, ``q = round(-2 * log2(x / d))``. Code n - 1 is exactly zero (RepQ-ViT has n powers and zero). The
    gradient to x is ``value / x`` (between 0.84 and 1.19), and 0 where clamped or zero.

    Paper: RepQ-ViT, arXiv:2212.08254, section 3.3.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    integers: ClassVar[str] = "with tables"
    parts: ClassVar[int] = 2
