"""A search over both ends of a range, from coarse to fine."""

from typing import TYPE_CHECKING

import torch
from attrs import field, frozen
from torch import Tensor

from spdfq.quantizers.observers import KEPT_PER_ROW, Observer, Range, Statistics, check_smallest, check_steps
from spdfq.registry import observers

if TYPE_CHECKING:
    from spdfq.quantizers.base import Quantizer

_JUDGED = 2**17


@observers.register("progressive", paper="arXiv:2407.12951")
@frozen(kw_only=True)
class ProgressiveObserver(Observer):
    """Both ends of the range (so scale and zero point), searched together from coarse to fine, for each channel.

    Each end is shrunk by a factor of its own. All pairs of a coarse grid of factors are tried; around the best few, all
    pairs of neighbours at half the distance, and so on. Where nothing lies below zero, or the quantizer is one-ended,
    both share one factor. Errors of values are those of about 2**17 samples (2**10 of each row at
    least, if there are so many).

    Paper: AdaLog, arXiv:2407.12951 (fast progressive combining search, which refines the scale alone).

    Args:
        steps: how many factors of each end are tried first, evenly from 1 down to ``smallest``; at least 2.
        smallest: the smallest factor of the first grid, between 0 and 1; refinements go down to half of it.
        kept: around how many the search goes on (unpublished for ranges).
        refinements: how often the distance is halved.
    """

    steps: int = field(default=6, validator=check_steps)
    smallest: float = field(default=0.3, validator=check_smallest)
    kept: int = field(default=3, validator=check_steps)
    refinements: int = field(default=3, validator=check_steps)

    def range_of(self, seen: Statistics, quantizer: "Quantizer") -> Range:
        """The range for all that was observed, judged by a part of it."""
        return self.choose(
            seen.thinned(max(_JUDGED // len(seen.samples), KEPT_PER_ROW)), seen.low, seen.high, quantizer
        )

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer") -> Range:
        """The best pair of each row of ``samples`` ``[C, n]``."""
        one_sided = quantizer.one_ended or bool((low >= 0).all())
        grid = torch.linspace(1.0, self.smallest, self.steps, device=low.device)
        around = (1.0 - self.smallest) / (self.steps - 1) * torch.tensor([0.0, -0.5, 0.5], device=low.device)
        factors = _pairs(grid, one_sided)[:, :, None].expand(-1, -1, len(low))
        for _ in range(self.refinements):
            best = self._best(factors, samples, low, high, quantizer, self.kept)
            moves = _pairs(around, one_sided)[:, None, :, None]
            factors = (best + moves).flatten(0, 1).clamp(self.smallest / 2, 1.0)
            around = around / 2
        lower, upper = self._best(factors, samples, low, high, quantizer, 1)[0]
        return low * lower, high * upper

    @staticmethod
    def _best(factors: Tensor, samples: Tensor, low: Tensor, high: Tensor, quantizer: "Quantizer", kept: int) -> Tensor:
        """The best few ``[kept, 2, C]`` of pairs of factors ``[K, 2, C]``, row by row; of equals the first."""
        errors = [quantizer.error(samples, quantizer.fitted(low * lower, high * upper)) for lower, upper in factors]
        order = torch.stack(errors).sort(dim=0, stable=True).indices[:kept]
        return factors.gather(0, order[:, None].expand(-1, 2, -1))


def _pairs(values: Tensor, one_sided: bool) -> Tensor:
    """All pairs ``[K, 2]`` for the lower and the upper end; where one end is all there is, equal ones."""
    return torch.stack([values, values], dim=1) if one_sided else torch.cartesian_prod(values, values)
