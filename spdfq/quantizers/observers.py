"""Observers: they choose the range of a quantizer from the values it observed."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from attrs import Attribute, field, frozen
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.quantizers.option_checks import check_count, check_smallest_factor
from spdfq.quantizers.statistics import Range, Statistics
from spdfq.recipe.structure import Checked
from spdfq.registry import observers
from spdfq.runtime.arguments import check_tensor


class RangedQuantizer(Protocol):
    """All that an observer knows of the quantizer that it chooses a range for; every `Quantizer` fits."""

    @property
    def one_ended(self) -> bool:
        """Whether only one end of a range matters."""

    def fitted(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """The quantizer's parameters for the ranges ``low``, ``high`` float32 ``[C]``."""

    def error(self, samples: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The error ``[C]`` of the quantizer with these parameters; ``samples`` are float32 ``[C, n]``."""


class Observer(Checked, ABC):
    """Base class: chooses the range of a quantizer from the values it observed."""

    def range_of(self, seen: Statistics, quantizer: RangedQuantizer) -> Range:
        """The range ``low``, ``high`` ``[C]`` for everything that was observed."""
        return self.choose(seen.samples, seen.low, seen.high, quantizer)

    @abstractmethod
    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer) -> Range:
        """The range of each row.

        Args:
            samples: float32 ``[C, n]``, a sample of the observed values; C = 1 per tensor.
            low: float32 ``[C]``, the exact minimum of each row.
            high: float32 ``[C]``, the exact maximum of each row.
            quantizer: ``quantizer.error(samples, quantizer.fitted(low, high))`` is the error of a candidate.

        Returns:
            New ``low`` and ``high``, float32 ``[C]`` each.

        Raises:
            SpdfqError: an argument of another type or shape.
        """


def least_error(candidates: list[Range], samples: Tensor, quantizer: RangedQuantizer) -> Range:
    """The best candidate of each row, by ``quantizer.error`` on ``samples`` ``[C, n]``; among equals the first."""
    check_tensor("samples", samples, "C, n")
    if not hasattr(quantizer, "fitted"):
        raise SpdfqError(f"quantizer must be a quantizer such as UniformQuantizer(), got {type(quantizer).__name__}")
    for low, high in candidates:
        check_tensor("low", low, "C")
        check_tensor("high", high, "C")
    errors = [quantizer.error(samples, quantizer.fitted(low, high)) for low, high in candidates]
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    lows, highs = (torch.stack(side).gather(0, best)[0] for side in zip(*candidates, strict=True))
    return lows, highs


@observers.register("minmax")
@frozen(kw_only=True)
class MinMaxObserver(Observer):
    """The whole observed range, exactly."""

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer) -> Range:
        """``low`` and ``high`` unchanged."""
        return low, high


def check_momentum(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Attrs validator: the weight of earlier batches."""
    if not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must be at least 0 and below 1, such as 0.9, not {value!r}")


@observers.register("running_minmax", paper="arXiv:1712.05877")
@frozen(kw_only=True)
class RunningMinMaxObserver(Observer):
    """The moving average of the ranges of all batches, so that outliers of single batches count little.

    A batch is what the step ``calibrate`` passes forward at once. With all images in one batch this is ``minmax``.

    Paper: Jacob et al., arXiv:1712.05877, section 3.1.

    Args:
        momentum: the weight of the earlier batches, at least 0 and below 1; the new batch has the rest.
    """

    momentum: float = field(default=0.9, validator=check_momentum)

    def range_of(self, seen: Statistics, quantizer: RangedQuantizer) -> Range:
        """The moving averages ``[C]``; they start with the first batch."""
        (low, high), *later = seen.batches
        for next_low, next_high in later:
            low, high = next_low.lerp(low, self.momentum), next_high.lerp(high, self.momentum)
        return low, high

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer) -> Range:
        """``low`` and ``high`` unchanged, as for a single batch."""
        return low, high


def check_percentiles(_: Any, attribute: "Attribute[tuple[float, ...]]", value: tuple[float, ...]) -> None:
    """Attrs validator: upper percentiles as fractions."""
    if not value or not all(0.5 < fraction <= 1 for fraction in value):
        raise ValueError(f"{attribute.name} must be fractions above 0.5 and up to 1, such as 0.999, not {value!r}")


def percentile_ranges(samples: Tensor, fractions: tuple[float, ...]) -> list[Range]:
    """For each p the quantiles 1 - p and p ``[C]`` of rows ``[C, n]``, linear between neighbours; p is above 0.5.

    Only the outermost values of a row are sorted, as many as the smallest p needs: `torch.quantile` refuses more than
    2**24 values.
    """
    check_tensor("samples", samples, "C, n")
    last = samples.shape[1] - 1
    reach = min(int((1 - min(fractions)) * last) + 3, last + 1)
    lowest = samples.topk(reach, largest=False).values
    highest = samples.topk(reach).values.flip(1)

    def quantile(end: Tensor, first: int, fraction: float) -> Tensor:
        position = fraction * last
        below = int(position)
        above = min(below + 1, last)
        return end[:, below - first].lerp(end[:, above - first], position - below)

    return [(quantile(lowest, 0, 1 - p), quantile(highest, last + 1 - reach, p)) for p in fractions]


@observers.register("percentile_mse", paper="arXiv:2212.08254")
@frozen(kw_only=True)
class PercentileMseObserver(Observer):
    """The pair of percentiles p and 1 - p of least mean squared error, for each channel.

    If there are too few samples to resolve p, the percentile is interpolated between the two outermost samples and
    comes close to the extreme of the sample.

    Paper: RepQ-ViT, arXiv:2212.08254.

    Args:
        percentiles: the candidates for p, as fractions above 0.5 and up to 1.
    """

    percentiles: tuple[float, ...] = field(default=(0.999, 0.9999, 0.99999), validator=check_percentiles)

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer) -> Range:
        """The best candidate of each row of ``samples`` ``[C, n]``."""
        return least_error(percentile_ranges(samples, self.percentiles), samples, quantizer)


@observers.register("grid_mse")
@frozen(kw_only=True)
class GridMseObserver(Observer):
    """The observed range shrunk by the factor of least mean squared error, for each channel.

    Args:
        steps: number of factors to try, evenly spaced from 1 down to ``smallest``; at least 2.
        smallest: the smallest factor, between 0 and 1.
    """

    steps: int = field(default=80, validator=check_count)
    smallest: float = field(default=0.2, validator=check_smallest_factor)

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer) -> Range:
        """The best candidate of each row; among equals the widest."""
        factors = torch.linspace(1.0, self.smallest, self.steps, dtype=torch.float32, device="cpu").tolist()
        return least_error([(low * factor, high * factor) for factor in factors], samples, quantizer)
