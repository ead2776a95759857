"""Powers of two of a shifted value, so that small values share codes."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.base import Parameters
from spdfq.quantizers.log_grid import LogGrid
from spdfq.quantizers.logarithmic import LogarithmicQuantizer
from spdfq.quantizers.searched import SearchedQuantizer
from spdfq.registry import quantizers

_SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


@quantizers.register("shift_uniform_log2", paper="arXiv:2311.10126")
@define(eq=False, slots=False, kw_only=True)
class ShiftUniformLog2Quantizer(SearchedQuantizer, LogarithmicQuantizer):
    """A uniform grid on the logarithm of the shifted value, rounded to powers of two: for softmax outputs.

    With ``n = 2**bits``, the scale d = the upper end of the range and the shift e, ``y = log2(x / d + e)`` has the
    codes 0 .. n - 1 of the uniform grid from ``log2(1 + e)`` down to ``log2(e)``. Code q is
    ``d * (2**round(y_q) - e)``. Code n - 1, the code of 0, is exactly zero (in the paper ``d * (2**round(log2(e)) -
    e)``), and so is every value closer to it than half a step. e is the one of 0.001, 0.005, 0.01, 0.02, 0.03, 0.04,
    0.05, 0.1, 0.2, 0.5 and 1 with the least error. The paper has no scale (d = 1, the largest possible softmax output)
    and takes the range of the observed values.

    Stores ``scale`` (d) and ``shift`` (e), float32 ``[]`` each. After calibration a negative value becomes zero, and a
    value above the range is clamped. The gradient to x is ``(value + d * e) / (x + d * e)``, and 0 where clamped or
    zero.

    Paper: I&S-ViT, arXiv:2311.10126, section 3.2.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "shift": torch.float32}
    integers: ClassVar[str] = "with tables"

    @property
    def choices(self) -> Sequence[float]:
        """The candidates for the shift."""
        return _SHIFTS

    @property
    def default_choice(self) -> float:
        """A shift in the middle."""
        return 0.04

    def fitted_with(self, choice: float, low: Tensor, high: Tensor) -> Parameters:
        """Scale and shift for ranges that end at ``high`` ``[C]``."""
        scale = LogarithmicQuantizer.fitted(self, low, high)["scale"]
        return {"scale": scale, "shift": torch.full_like(scale, choice)}

    def grid(self, parameters: Parameters) -> LogGrid:
        """Shifted powers of two, and zero."""
        shift = parameters["shift"]
        top, last = torch.log2(1 + shift), self.levels - 1
        step = (top - torch.log2(shift)) / last
        codes = torch.arange(last, device=shift.device, dtype=shift.dtype)
        edges = (torch.exp2(top - (codes + 0.5) * step) - shift).clamp(min=0)
        values = torch.exp2((top - codes * step).round()) - shift
        values = torch.where(values > edges[-1], values, 0.0)
        return LogGrid(torch.nn.functional.pad(values, (0, 1)), edges, step, shift)
