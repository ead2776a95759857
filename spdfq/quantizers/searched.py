"""The base class of quantizers that choose one more number than the range, such as a base or a shift."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer
from spdfq.quantizers.observers import Observer
from spdfq.quantizers.statistics import Statistics

_JUDGED_VALUES = 2**17
# a long list of candidates is searched from coarse to fine: every sixth one, then the neighbours of the best three
_COARSE_STEP, _KEPT = 6, 3


@define(eq=False, slots=False, kw_only=True)
class SearchedQuantizer(Quantizer):
    """Base class: chooses a number (a base, a shift) by least error, besides the range.

    The number is chosen for the whole observed range, then the range for that number, then the number again for that
    range.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    def __attrs_pre_init__(self) -> None:
        super().__attrs_pre_init__()
        self._choice: float | None = None

    @property
    @abstractmethod
    def choices(self) -> Sequence[float]:
        """The candidates for the number, in order."""

    @property
    @abstractmethod
    def default_choice(self) -> float:
        """The number to use before one was chosen."""

    @abstractmethod
    def fitted_with(self, choice: float, low: Tensor, high: Tensor) -> Parameters:
        """The parameters for a number and the ranges ``low``, ``high`` ``[C]``."""

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """The parameters for the ranges ``low``, ``high`` float32 ``[C]`` and the number chosen so far."""
        return self.fitted_with(self.default_choice if self._choice is None else self._choice, low, high)

    def fit(self, seen: Statistics, observer: Observer) -> Parameters:
        """The parameters for everything that was observed."""
        samples = seen.thinned(max(_JUDGED_VALUES // len(seen.samples), 1))
        try:
            self._choice = self._best(samples, seen.low, seen.high)
            low, high = observer.range_of(seen, self)
            return self.fitted_with(self._best(samples, low, high), low, high)
        finally:
            self._choice = None

    def _best(self, samples: Tensor, low: Tensor, high: Tensor) -> float:
        """The number of least error for these ranges."""
        if len(self.choices) <= _KEPT * _COARSE_STEP:
            return self._ordered(self.choices, samples, low, high)[0]
        coarse = self._ordered(self.choices[::_COARSE_STEP], samples, low, high)[:_KEPT]
        centres = [self.choices.index(choice) for choice in coarse]
        near = [n for n in range(len(self.choices)) if any(abs(n - centre) < _COARSE_STEP for centre in centres)]
        return self._ordered([self.choices[n] for n in near], samples, low, high)[0]

    def _ordered(self, choices: Sequence[float], samples: Tensor, low: Tensor, high: Tensor) -> list[float]:
        """The numbers, from the least error to the largest."""
        errors = [self.error(samples, self.fitted_with(choice, low, high)).sum() for choice in choices]
        return [choices[index] for index in torch.stack(errors).argsort(stable=True).tolist()]
