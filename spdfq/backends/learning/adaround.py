"""AdaRound: learns block by block whether each weight is rounded up or down."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.backends.base import Step
from spdfq.backends.blocks import Hidden, block_names
from spdfq.backends.learning.reconstruction import BlockLearner, Reconstruction, squared_errors
from spdfq.backends.weight_grid import WeightGrid
from spdfq.quantized.model import QuantizedModel
from spdfq.registry import steps

# the sigmoid is stretched to this range and clamped to 0..1, so that it reaches 0 and 1 (AdaRound, equation 23)
LOW, HIGH = -0.1, 1.1


def _at_least_one(_: object, __: object, value: tuple[float, float]) -> None:
    if not all(1 <= beta < math.inf for beta in value):
        raise ValueError(f"must be two finite numbers of at least 1, got {list(value)}")


@steps.register("adaround", paper="arXiv:2004.10568")
@define(kw_only=True)
class AdaRound(Reconstruction):
    """Learn the rounding of every weight, up or down, so that each block's output comes close to the teacher's.

    Adam on one number v for each weight. Its rectified sigmoid h, times the quantizer's step, is added to the weight
    rounded down. The penalty ``weight · Σ 1 - |2h - 1|^β`` pushes h to 0 or 1. It is off during the first fifth of the
    iterations; then β falls from the first to the second value of ``temperature``. The error is the squared difference,
    summed over channels. With ``drop`` this is QDrop (arXiv 2203.05740), with ``fisher`` BRECQ (arXiv 2102.05426). The
    published runs take 20,000 iterations.

    Args:
        weight: of the penalty.
        temperature: first and last β, at least 1.
        warmup: share of the iterations without the penalty.
    """

    name: ClassVar[str] = "adaround"

    iterations: int = field(default=2000, validator=validators.ge(1))
    lr: float = field(default=1e-3, validator=validators.gt(0.0))
    weight: float = field(default=0.01, validator=validators.ge(0.0))
    temperature: tuple[float, float] = field(default=(20.0, 2.0), validator=_at_least_one)
    warmup: float = field(default=0.2, validator=[validators.ge(0.0), validators.lt(1.0)])

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses weights whose values are not evenly spaced, and ranges that were not chosen before."""
        super().check(model, before)
        for block in block_names(model):
            for name in model.weight_names(f"{block}."):
                model.affine(name)

    def learner(self, model: QuantizedModel, block: str) -> BlockLearner:
        """Learns a number for each weight of the block.

        Raises:
            SpdfqError: the values of a weight's quantizer are not evenly spaced.
        """
        return Rounding(self, model, model.weight_names(f"{block}."))

    def distance(self, output: Hidden, target: Hidden, importance: Hidden | None) -> Tensor:
        """The squared difference, summed over the channels and averaged over the other axes."""
        errors = squared_errors(output, target, importance)
        return torch.stack([error.sum(-1).mean() for error in errors]).sum()

    def rate(self, share: float) -> float:
        """Constant, as published."""
        return 1.0

    def beta(self, share: float) -> float | None:
        """The penalty's exponent; ``None`` while there is no penalty."""
        if share < self.warmup:
            return None
        first, last = self.temperature
        return last + (first - last) * (1 - (share - self.warmup) / (1 - self.warmup))


class Rounding(BlockLearner):
    """Learns for each weight of a block whether it is rounded up or down.

    Args:
        spec: the step.
        model: owns the weights.
        names: of the weights.
    """

    def __init__(self, spec: AdaRound, model: QuantizedModel, names: list[str]) -> None:
        self.spec, self.model, self.changes = spec, model, names
        self.numbers: dict[str, Tensor] = {}
        self.lower: dict[str, Tensor] = {}  # the weight rounded down
        self.steps: dict[str, Tensor] = {}  # from there to the weight rounded up; 0 outside of the quantizer's range
        for name in names:
            weight = model.weight(name).detach()
            grid = WeightGrid.of(model.affine(name), weight)
            position = grid.positions(weight)
            floor = position.floor()
            self.numbers[name] = _inverse_rectified(position - floor)
            self.lower[name] = grid.values(floor.clamp(0, grid.last))
            self.steps[name] = grid.step * ((floor >= 0) & (floor < grid.last))
        self.parameters = list(self.numbers.values())
        self.ups: dict[str, Tensor] = {}  # h of the latest forward pass, for its penalty

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """The weight rounded down plus h steps, within the quantizer's range."""
        number = self.numbers.get(name)
        if number is None:
            return self.model.quantized(name, "", weight)
        self.ups[name] = rectified_sigmoid(number)
        return self._value(name, self.ups[name])

    def _value(self, name: str, up: Tensor) -> Tensor:
        return torch.addcmul(self.lower[name], up, self.steps[name])

    def penalty(self, share: float) -> Tensor | float:
        """``weight · Σ 1 - |2h - 1|^β`` over all weights."""
        beta, ups = self.spec.beta(share), self.ups
        self.ups = {}
        if beta is None or not self.numbers:
            return 0.0
        every = [ups[name] if name in ups else rectified_sigmoid(number) for name, number in self.numbers.items()]
        terms = [(1 - (2 * up - 1).abs() ** beta).sum() for up in every]
        return self.spec.weight * torch.stack(terms).sum()

    @torch.no_grad()
    def finish(self) -> None:
        """Rounds each weight up or down, whichever its h is closer to."""
        for name, number in self.numbers.items():
            value = self._value(name, (rectified_sigmoid(number) >= 0.5).float())
            self.model.weight(name).copy_(self.model.quantizers[name](value))  # exactly what the quantizer decodes


def rectified_sigmoid(number: Tensor) -> Tensor:
    """``clamp(sigmoid(v) (ζ - γ) + γ, 0, 1)``."""
    return (number.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def _inverse_rectified(share: Tensor) -> Tensor:
    """The v whose rectified sigmoid is ``share`` in 0..1."""
    return ((share - LOW) / (HIGH - LOW)).logit()
