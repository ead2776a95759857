"""Quantizers with one more number to choose than the range."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer
from spdfq.quantizers.observers import Observer, Statistics

_JUDGED = 2**17
_APART, _KEPT = 6, 3


@define(eq=False, slots=False, kw_only=True)
class SearchedQuantizer(Quantizer):
    """Base class: besides the range, a number (a base, a shift) is chosen by least error.

    The number is chosen for the whole observed range, then the range for it, then the number again for that range.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    def __attrs_pre_init__(self) -> None:
        super().__attrs_pre_init__()
        self._choice: float | None = None

    @property
    @abstractmethod
    def choices(self) -> Sequence[float]:
        """What the number can be."""

    @property
    @abstractmethod
    def usual(self) -> float:
        """What the number is before it was chosen."""

    @abstractmethod
    def chosen(self, low: Tensor, high: Tensor, choice: float) -> Parameters:
        """The parameters for ranges ``low``, ``high`` ``[C]`` and a number."""

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """The parameters for ranges ``low``, ``high`` float32 ``[C]``."""
        return self.chosen(low, high, self.usual if self._choice is None else self._choice)

    def fit(self, seen: Statistics, observer: Observer) -> Parameters:
        """The parameters for what was observed: number, range and number again, in turn."""
        samples = seen.thinned(max(_JUDGED // len(seen.samples), 1))
        try:
            self._choice = self._best(samples, seen.low, seen.high)
            low, high = observer.range_of(seen, self)
            return self.chosen(low, high, self._best(samples, low, high))
        finally:
            self._choice = None

    def _best(self, samples: Tensor, low: Tensor, high: Tensor) -> float:
        """The best of all numbers; where there are many, of those around the best of a few."""
        few = _KEPT * _APART
        if len(self.choices) <= few:
            return self._ordered(self.choices, samples, low, high)[0]
        first = self._ordered(self.choices[::_APART], samples, low, high)[:_KEPT]
        around = [self.choices.index(choice) for choice in first]
        near = [n for n in range(len(self.choices)) if any(abs(n - index) < _APART for index in around)]
        return self._ordered([self.choices[n] for n in near], samples, low, high)[0]

    def _ordered(self, choices: Sequence[float], samples: Tensor, low: Tensor, high: Tensor) -> list[float]:
        """Numbers from the least error to the largest."""
        errors = [self.error(samples, self.chosen(low, high, choice)).sum() for choice in choices]
        return [choices[index] for index in torch.stack(errors).argsort(stable=True).tolist()]
