"""Powers of a base that is fitted to the data."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from attrs import Attribute, define, field
from torch import Tensor

from spdfq.quantizers.base import Parameters
from spdfq.quantizers.log_grid import LogGrid, even_log_grid, octave_fractions
from spdfq.quantizers.logarithmic import LogarithmicQuantizer
from spdfq.quantizers.searched import SearchedQuantizer
from spdfq.registry import quantizers

_PARTS = 37


def check_shift(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Attrs validator: the number that is added before the logarithm."""
    if not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must be at least 0 and below 1, such as 0.17 for GELU, not {value!r}")


@quantizers.register("adaptive_log", paper="arXiv:2407.12951")
@define(eq=False, slots=False, kw_only=True)
class AdaptiveLogQuantizer(SearchedQuantizer, LogarithmicQuantizer):
    """Powers of the base of least error below the range's upper end, and zero: for softmax and GELU outputs.

    With ``n = 2**bits``, the scale d = the upper end of the range and the base ``2 ** (q / 37)``, q one of 10 .. 138,
    code c in 0 .. n - 2 is ``d * 2**-(q * c // 37) * T[q * c % 37]``. T is a table of ``2 ** (-i / 37)`` rounded to
    bits + 1 bits, so that an integer runtime multiplies by a small number and shifts. Code n - 1 is exactly zero (the
    public code has n powers and zero). q = 37 is ``log2``, with its limits. A value goes to the nearest one on the
    logarithmic scale.

    With a shift, ``x + shift`` is quantized and the shift is subtracted from the result: for GELU outputs, whose
    minimum is -0.16997. Zero is then not one of the values. The step ``adalog`` folds the subtraction into the bias of
    the layer that follows.

    Stores ``scale`` (float32 ``[]``) and ``base`` (q, uint8 ``[]``). The gradient to x is ``value / x`` (with the shift
    added to both), and 0 where clamped or zero.

    Paper: AdaLog, arXiv:2407.12951, sections 3.2 and 3.3.

    Args:
        bits: width of a code in bits, 2 to 8.
        shift: number that is added before the logarithm and subtracted from the result.
        folded: do not subtract the shift, because the bias of the next layer contains it (set by the step ``adalog``).
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "base": torch.uint8}
    largest: ClassVar[dict[str, int]] = {"base": 138}
    integers: ClassVar[str] = "with tables"

    shift: float = field(default=0.0, validator=check_shift)
    folded: bool = False

    @property
    def signed(self) -> bool:
        """Whether it accepts negative values: with a shift. Values below ``-shift`` are clamped."""
        return self.shift > 0

    @property
    def input_shift(self) -> float:
        """The shift."""
        return self.shift

    def shifted_back(self, values: Tensor) -> Tensor:
        """The values without the shift, unless that is folded."""
        return values if self.folded else super().shifted_back(values)

    @property
    def choices(self) -> Sequence[int]:
        """The candidates for q."""
        return range(10, 139)

    @property
    def default_choice(self) -> int:
        """The q of powers of two."""
        return _PARTS

    def fitted_with(self, choice: float, low: Tensor, high: Tensor) -> Parameters:
        """Scale and base for ranges that end at ``high`` ``[C]``."""
        scale = LogarithmicQuantizer.fitted(self, low, high)["scale"]
        return {"scale": scale, "base": torch.full_like(scale, choice, dtype=torch.uint8)}

    def grid(self, parameters: Parameters) -> LogGrid:
        """Powers of the base, by the rounded table, and zero."""
        largest = 2 * self.levels - 2
        table = (octave_fractions(_PARTS, parameters["scale"].device) * largest).round() / largest
        return even_log_grid(self.levels, parameters["base"].long(), table)
