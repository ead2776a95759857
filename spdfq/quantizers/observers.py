"""What is kept of observed values, and the observers that choose a range by it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import cached_property
from itertools import count
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from attrs import Attribute, define, field, frozen
from torch import Tensor

from spdfq.errors import DataError
from spdfq.registry import observers

if TYPE_CHECKING:
    from spdfq.quantizers.base import Quantizer

KEPT_VALUES = 2**20
KEPT_PER_ROW = 2**10
Range = tuple[Tensor, Tensor]


class Statistics:
    """The exact extremes of every row, and an even sub-sample of about 2**20 values (at least 2**10 of each row).

    ``low``, ``high`` are float32 ``[C]``, ``samples`` ``[C, n]``; ``batches`` has the extremes of each batch. The
    batches of a row form one stream of which every ``stride``-th value is kept; the stride grows by a constant factor
    whenever the sample is full. So the sample is deterministic and weighs all batches alike.

    Args:
        rows: the first batch, ``[C, n]``; it is not added.
        period: how many of the values of a row belong to one image; where it is left out, all of them.
    """

    def __init__(self, rows: Tensor, period: int | None = None) -> None:
        channels, length = rows.shape
        self.low = rows.new_full([channels], torch.inf)
        self.high = rows.new_full([channels], -torch.inf)
        self.batches: list[Range] = []
        self.samples = rows.new_empty([channels, 0])
        self._period = period or length  # of one image, so that the size of the batches does not matter
        self._factor = self._stride_from(2)
        self._limit = max(KEPT_VALUES // channels, KEPT_PER_ROW * self._factor)
        self._seen, self._stride = 0, 1

    def add(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Takes in ``rows`` ``[C, n]`` with their extremes ``low``, ``high`` ``[C]``."""
        if len(rows) != len(self.low):
            raise DataError(f"observed {len(self.low)} channels before and {len(rows)} now; check the channel axis")
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.batches.append((low, high))
        self._make_room(self._seen + rows.shape[1])
        start = -self._seen % self._stride
        self.samples = torch.cat([self.samples, rows[:, start :: self._stride]], dim=1)
        self._seen += rows.shape[1]

    def thinned(self, wanted: int) -> Tensor:
        """About so many samples of each row, evenly: ``[C, n]``, less than twice as many."""
        return self.samples[:, :: self._stride_from(max(self.samples.shape[1] // wanted, 1))]

    def moved(self, by: Tensor) -> "Statistics":
        """What would have been kept, had ``by`` float32 ``[C]`` been taken off every value."""
        other = copy(self)
        other.low, other.high, other.samples = self.low - by, self.high - by, self.samples - by[:, None]
        other.batches = [(low - by, high - by) for low, high in self.batches]
        return other

    def _stride_from(self, least: int) -> int:
        # a stride that shared a divisor with the feature count would look at some features only
        return next(stride for stride in count(least) if gcd(stride, self._period) == 1)

    def _make_room(self, total: int) -> None:
        while -(-total // self._stride) > self._limit:
            self._stride *= self._factor
            self.samples = self.samples[:, :: self._factor]


@define(eq=False, slots=False)
class Product:
    """What an observed tensor is multiplied into, for judging quantizers by its output.

    Args:
        operand: the tensor, of any shape.
        output: the output as a function of it.
        channels: axis of the output that belongs to the operand's first one, where there is such an axis.
    """

    operand: Tensor
    output: Callable[[Tensor], Tensor]
    channels: int | None = None

    @cached_property
    def expected(self) -> Tensor:
        """The output of the operand as it is, float32."""
        return self.output(self.operand).float()

    def error(self, quantized: Tensor, channels: int | None) -> Tensor:
        """Mean squared error of the output, ``[1]``; ``[channels]`` where asked for and the output has such an axis."""
        square = (self.output(quantized.to(self.operand.dtype)).float() - self.expected).square()
        if channels is None or self.channels is None or square.shape[self.channels] != channels:
            return square.mean()[None]
        return square.movedim(self.channels, 0).flatten(1).mean(dim=1)


class Observer(ABC):
    """Chooses the range a quantizer works in from what was observed."""

    def range_of(self, seen: Statistics, quantizer: "Quantizer") -> Range:
        """The range ``low``, ``high`` ``[C]`` for all that was observed."""
        return self.choose(seen.samples, seen.low, seen.high, quantizer)

    @abstractmethod
    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer") -> Range:
        """The range of each row.

        Args:
            samples: float32 ``[C, n]``, a sub-sample of the observed values; C = 1 per tensor.
            low: float32 ``[C]``, the exact minimum of each row.
            high: float32 ``[C]``, the exact maximum of each row.
            quantizer: scores a candidate by ``quantizer.error(samples, quantizer.fitted(low, high))``.

        Returns:
            New ``low`` and ``high``, float32 ``[C]`` each.
        """


def least_error(candidates: list[Range], samples: Tensor, quantizer: "Quantizer") -> Range:
    """Of ranges ``[C]`` each, row by row the one of least `Quantizer.error` on ``samples`` ``[C, n]``."""
    errors = [quantizer.error(samples, quantizer.fitted(low, high)) for low, high in candidates]
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    lows, highs = (torch.stack(side).gather(0, best)[0] for side in zip(*candidates, strict=True))
    return lows, highs


def percentiles(samples: Tensor, fractions: tuple[float, ...]) -> list[Range]:
    """For each p the quantiles 1 - p and p ``[C]`` of rows ``[C, n]``, linear between neighbours; p is above 0.5.

    Only both ends of a row are sorted, as far as the smallest p reaches; torch.quantile refuses more than 2**24 values.
    """
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


@observers.register("minmax")
@frozen(kw_only=True)
class MinMaxObserver(Observer):
    """The whole observed range, exactly."""

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer") -> Range:
        """``low`` and ``high`` unchanged."""
        return low, high


def check_momentum(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Attrs validator: the weight of what came before."""
    if not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must be at least 0 and below 1, such as 0.9, not {value!r}")


@observers.register("running_minmax", paper="arXiv:1712.05877")
@frozen(kw_only=True)
class RunningMinMaxObserver(Observer):
    """The moving average of each batch's range: outliers of single batches count little.

    Batches are what `calibrate` passes forward at once; with all images in one batch it is ``minmax``.

    Paper: Jacob et al., arXiv:1712.05877, section 3.1.

    Args:
        momentum: the weight of the batches before, at least 0 and below 1; the new batch has the rest.
    """

    momentum: float = field(default=0.9, validator=check_momentum)

    def range_of(self, seen: Statistics, quantizer: "Quantizer") -> Range:
        """The averages ``[C]``, beginning with the first batch."""
        (low, high), *later = seen.batches
        for next_low, next_high in later:
            low, high = next_low.lerp(low, self.momentum), next_high.lerp(high, self.momentum)
        return low, high

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer") -> Range:
        """``low`` and ``high`` unchanged: those of a single batch."""
        return low, high


def check_percentiles(_: Any, attribute: "Attribute[tuple[float, ...]]", value: tuple[float, ...]) -> None:
    """Attrs validator: upper percentiles as fractions."""
    if not value or not all(0.5 < fraction <= 1 for fraction in value):
        raise ValueError(f"{attribute.name} must be fractions above 0.5 and up to 1, such as 0.999, not {value!r}")


@observers.register("percentile_mse", paper="arXiv:2212.08254")
@frozen(kw_only=True)
class PercentileMseObserver(Observer):
    """The pair of percentiles p and 1 - p of least mean squared error, for each channel.

    With fewer samples than resolve p the percentile is interpolated from the two outermost samples, so it comes close
    to the sample's extremes.

    Paper: RepQ-ViT, arXiv:2212.08254.

    Args:
        percentiles: the candidates for p, as fractions above 0.5 and up to 1.
    """

    percentiles: tuple[float, ...] = field(default=(0.999, 0.9999, 0.99999), validator=check_percentiles)

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer") -> Range:
        """The best candidate of each row of ``samples`` ``[C, n]``."""
        return least_error(percentiles(samples, self.percentiles), samples, quantizer)


def check_steps(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Attrs validator: how many candidates."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise ValueError(f"{attribute.name} must be a whole number of candidates, 2 or more, not {value!r}")


def check_smallest(_: Any, attribute: "Attribute[float]", value: float) -> None:
    """Attrs validator: a share of the range."""
    if not 0 < value < 1:
        raise ValueError(f"{attribute.name} must lie between 0 and 1, a share of the observed range, not {value!r}")


@observers.register("grid_mse")
@frozen(kw_only=True)
class GridMseObserver(Observer):
    """The observed range shrunk by the factor of least mean squared error, for each channel.

    Args:
        steps: how many factors are tried, evenly from 1 down to ``smallest``; at least 2.
        smallest: the smallest factor, between 0 and 1.
    """

    steps: int = field(default=80, validator=check_steps)
    smallest: float = field(default=0.2, validator=check_smallest)

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer") -> Range:
        """The best candidate of each row; among equals the widest."""
        factors = torch.linspace(1.0, self.smallest, self.steps).tolist()
        return least_error([(low * factor, high * factor) for factor in factors], samples, quantizer)
