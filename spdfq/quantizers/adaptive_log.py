"""Powers of a base that is fitted to the data."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from attrs import Attribute, define, field
from torch import Tensor

from spdfq.quantizers.base import Parameters
from spdfq.quantizers.logarithm import Grid, LogarithmicQuantizer, even_grid, fractions
from spdfq.quantizers.searched import SearchedQuantizer
from spdfq.quantizers.uniform import check_flag
from spdfq.registry import quantizers

PARTS = 37


def check_shift(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Attrs validator: what is added before the logarithm."""
    if not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must be at least 0 and below 1, such as 0.17 for GELU, not {value!r}")


@quantizers.register("adaptive_log", paper="arXiv:2407.12951")
@define(eq=False, slots=False, kw_only=True)
class AdaptiveLogQuantizer(SearchedQuantizer, LogarithmicQuantizer):
    """Powers of the base of least error below the range's top, and zero: for softmax and GELU outputs.

    With ``n = 2**bits``, the scale d = the top of the range and the base ``2 ** (q / 37)``, q one of 10 .. 138, code c
    in 0 .. n - 2 is ``d * 2**-(q * c // 37) * T[q * c % 37]`` with a table T of ``2 ** (-i / 37)`` rounded to bits + 1
    bits, so that an integer runtime multiplies by a small number and shifts; code n - 1 is exactly zero (the public
    code keeps n powers and zero besides). q = 37 is ``log2``, with its limits. A value goes to the nearest on the
    logarithmic scale.

    With a shift, ``x + shift`` is quantized and the shift taken off again: for GELU outputs, which end at -0.16997.
    Zero is no value of the grid then. The step ``adalog`` folds what is taken off into the bias of the layer that
    follows.

    Stores ``scale`` (float32 ``[]``) and ``base`` (q, uint8 ``[]``). The gradient to x is ``value / x`` (the shift
    added to both), and 0 where clamped or zero.

    Paper: AdaLog, arXiv:2407.12951, sections 3.2 and 3.3.

    Args:
        bits: width of a code in bits, 2 to 8.
        shift: is added before the logarithm and taken off afterwards.
        folded: leave the shift in, because the bias of the layer that follows makes good for it (step ``adalog``).
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "base": torch.uint8}
    largest: ClassVar[dict[str, int]] = {"base": 138}
    integers: ClassVar[str] = "with tables"

    shift: float = field(default=0.0, validator=check_shift)
    folded: bool = field(default=False, validator=check_flag)

    @property
    def signed(self) -> bool:
        """Whether it takes negative values: those that the shift lifts above zero, others are clamped."""
        return self.shift > 0

    @property
    def lift(self) -> float:
        """The shift."""
        return self.shift

    def _lowered(self, values: Tensor) -> Tensor:
        return values if self.folded else super()._lowered(values)

    @property
    def choices(self) -> Sequence[int]:
        """What q can be."""
        return range(10, 139)

    @property
    def usual(self) -> int:
        """The q of powers of two."""
        return PARTS

    def chosen(self, low: Tensor, high: Tensor, choice: float) -> Parameters:
        """Scale and base for ranges that end at ``high`` ``[C]``."""
        scale = LogarithmicQuantizer.fitted(self, low, high)["scale"]
        return {"scale": scale, "base": torch.full_like(scale, choice, dtype=torch.uint8)}

    def grid(self, parameters: Parameters) -> Grid:
        """Powers of the base by the rounded table, and zero."""
        whole = 2 * self.levels - 2
        table = (fractions(PARTS, parameters["scale"].device) * whole).round() / whole
        return even_grid(self.levels, parameters["base"].long(), table)
