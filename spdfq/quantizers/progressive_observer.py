"""An observer that searches both ends of a range together, from coarse to fine."""

import torch
from attrs import field, frozen
from einops import rearrange, repeat
from torch import Tensor

from spdfq.quantizers.observers import Observer, RangedQuantizer
from spdfq.quantizers.option_checks import check_count, check_smallest_factor
from spdfq.quantizers.statistics import KEPT_PER_ROW, Range, Statistics
from spdfq.registry import observers

_JUDGED_VALUES = 2**17


@observers.register("progressive", paper="arXiv:2407.12951")
@frozen(kw_only=True)
class ProgressiveObserver(Observer):
    """Both ends of the range (so scale and zero point), searched together from coarse to fine, for each channel.

    Each end is shrunk by a factor of its own. First all pairs of a coarse grid of factors are tried. Then all pairs of
    neighbours at half the distance are tried around the best few, and so on. Both ends share one factor if no value is
    negative, or if only one end matters to the quantizer. Errors of values are measured on about 2**17 samples (at
    least 2**10 of each row, if there are so many).

    Paper: AdaLog, arXiv:2407.12951 (fast progressive combining search, which refines the scale alone).

    Args:
        steps: number of factors of each end to try first, evenly spaced from 1 down to ``smallest``; at least 2.
        smallest: the smallest factor of the first grid, between 0 and 1; refinements go down to half of it.
        kept: number of best pairs that the search continues around (unpublished for ranges).
        refinements: how often the distance is halved.
    """

    steps: int = field(default=6, validator=check_count)
    smallest: float = field(default=0.3, validator=check_smallest_factor)
    kept: int = field(default=3, validator=check_count)
    refinements: int = field(default=3, validator=check_count)

    def range_of(self, seen: Statistics, quantizer: RangedQuantizer) -> Range:
        """The range for everything that was observed, judged by a part of the sample."""
        wanted = max(_JUDGED_VALUES // len(seen.samples), KEPT_PER_ROW)
        return self.choose(seen.thinned(wanted), seen.low, seen.high, quantizer)

    def choose(self, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer) -> Range:
        """The best pair of each row of ``samples`` ``[C, n]``."""
        one_factor = quantizer.one_ended or bool((low >= 0).all())
        grid = torch.linspace(1.0, self.smallest, self.steps, device=low.device, dtype=low.dtype)
        distance = (1.0 - self.smallest) / (self.steps - 1)
        offsets = distance * torch.tensor([0.0, -0.5, 0.5], device=low.device, dtype=low.dtype)
        factors = repeat(_pairs(grid, one_factor), "pairs ends -> pairs ends c", c=len(low))
        for _ in range(self.refinements):
            best = self._best(factors, samples, low, high, quantizer, self.kept)
            moved = best + rearrange(_pairs(offsets, one_factor), "moves ends -> moves 1 ends 1")
            factors = rearrange(moved, "moves kept ends c -> (moves kept) ends c").clamp(self.smallest / 2, 1.0)
            offsets = offsets / 2
        lower, upper = self._best(factors, samples, low, high, quantizer, 1)[0]
        return low * lower, high * upper

    @staticmethod
    def _best(
        factors: Tensor, samples: Tensor, low: Tensor, high: Tensor, quantizer: RangedQuantizer, kept: int
    ) -> Tensor:
        """The best ``[kept, 2, C]`` of the pairs ``factors`` ``[K, 2, C]``, row by row; among equals the first."""
        errors = [quantizer.error(samples, quantizer.fitted(low * lower, high * upper)) for lower, upper in factors]
        order = torch.stack(errors).sort(dim=0, stable=True).indices[:kept]
        return factors.gather(0, repeat(order, "kept c -> kept ends c", ends=2))


def _pairs(values: Tensor, equal: bool) -> Tensor:
    """All pairs ``[K, 2]`` of values for the lower and the upper end, or only the pairs of equal values."""
    return repeat(values, "k -> k ends", ends=2) if equal else torch.cartesian_prod(values, values)
