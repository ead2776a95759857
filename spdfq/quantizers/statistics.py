"""What a quantizer remembers of the values it observed: exact extremes and an even sample."""

from copy import copy
from itertools import count
from math import gcd

import torch
from torch import Tensor

from spdfq.errors import DataError

KEPT_VALUES = 2**20
KEPT_PER_ROW = 2**10
Range = tuple[Tensor, Tensor]
"""The lower and the upper end of the range of each channel, float32 ``[C]`` each."""


class Statistics:
    """The exact extremes of every row, and an even sample of about 2**20 values (at least 2**10 of each row).

    ``low`` and ``high`` are float32 ``[C]``, ``samples`` is ``[C, n]``, and ``batches`` holds the extremes of each
    batch. The values of a row form one stream across batches; every ``stride``-th value of it is kept. Whenever the
    sample is full, the stride grows by a constant factor. So the sample is deterministic, and all batches have the same
    weight.

    Args:
        rows: the first batch, ``[C, n]``; it is not added.
        period: number of values of a row that belong to one image; by default all of them.
    """

    def __init__(self, rows: Tensor, period: int | None = None) -> None:
        channels, length = rows.shape
        self.low = rows.new_full([channels], torch.inf)
        self.high = rows.new_full([channels], -torch.inf)
        self.batches: list[Range] = []
        self.samples = rows.new_empty([channels, 0])
        self._period = period or length  # of one image: the sample must not depend on the batch size
        self._factor = self._stride_from(2)
        self._limit = max(KEPT_VALUES // channels, KEPT_PER_ROW * self._factor)
        self._seen, self._stride = 0, 1

    def add(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Adds ``rows`` ``[C, n]`` with their extremes ``low``, ``high`` ``[C]``."""
        if len(rows) != len(self.low):
            raise DataError(f"observed {len(self.low)} channels before and {len(rows)} now; check the channel axis")
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.batches.append((low, high))
        self._make_room(self._seen + rows.shape[1])
        start = -self._seen % self._stride
        self.samples = torch.cat([self.samples, rows[:, start :: self._stride]], dim=1)
        self._seen += rows.shape[1]

    def thinned(self, wanted: int) -> Tensor:
        """An even part of the sample: ``[C, n]``, with n from ``wanted`` up to less than twice as many."""
        return self.samples[:, :: self._stride_from(max(self.samples.shape[1] // wanted, 1))]

    def shifted(self, by: Tensor) -> "Statistics":
        """The statistics of the same values with ``by`` float32 ``[C]`` subtracted from each channel."""
        other = copy(self)
        other.low, other.high, other.samples = self.low - by, self.high - by, self.samples - by[:, None]
        other.batches = [(low - by, high - by) for low, high in self.batches]
        return other

    def _stride_from(self, least: int) -> int:
        # a stride that shares a divisor with the number of features would sample some features only
        return next(stride for stride in count(least) if gcd(stride, self._period) == 1)

    def _make_room(self, total: int) -> None:
        while -(-total // self._stride) > self._limit:
            self._stride *= self._factor
            self.samples = self.samples[:, :: self._factor]
