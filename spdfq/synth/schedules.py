"""Schedules of the learning rate during synthesis."""

import math

from attrs import field, frozen, validators

from spdfq.errors import ComponentError, SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.registry import schedules
from spdfq.runtime.arguments import check_whole


@frozen(kw_only=True)
class Schedule(Checked):
    """Base class of schedules. A subclass defines `factor`."""

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate in an iteration, 0 to 1.

        Args:
            iteration: counted from 0.
            iterations: number of iterations of the run.

        Raises:
            SpdfqError: there is no such iteration.
        """
        raise ComponentError(f"{type(self).__name__} does not define factor")

    def restarts(self, iteration: int, iterations: int) -> bool:
        """Whether the optimizer forgets its moments before this iteration."""
        return False


def _check(iteration: int, iterations: int) -> None:
    check_whole("iteration", iteration, 0)
    if iteration >= iterations:
        raise SpdfqError(f"iteration is {iteration}, but there are {iterations}")


@schedules.register("constant")
@frozen(kw_only=True)
class Constant(Schedule):
    """A constant learning rate."""

    def factor(self, iteration: int, iterations: int) -> float:
        """Always 1."""
        _check(iteration, iterations)
        return 1.0


@schedules.register("warmup_cosine", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class WarmupCosine(Schedule):
    """Rounds of linear warm-up and cosine decay; each round starts with a fresh optimizer.

    Args:
        rounds: number of rounds (2 in PSAQ-ViT).
        warmup: share of a round that warms up (100 of 500 iterations in PSAQ-ViT).
        floor: share of the learning rate at which the cosine ends.
    """

    rounds: int = field(default=1, validator=validators.ge(1))
    warmup: float = field(default=0.2, validator=[validators.ge(0.0), validators.lt(1.0)])
    floor: float = field(default=0.0, validator=[validators.ge(0.0), validators.le(1.0)])

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate, taken in the middle of the iteration."""
        _check(iteration, iterations)
        done = (iteration + 0.5) * self.rounds / iterations % 1
        if done < self.warmup:
            return done / self.warmup
        falling = 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        return self.floor + (1 - self.floor) * falling

    def restarts(self, iteration: int, iterations: int) -> bool:
        """Whether a new round begins."""
        return iteration > 0 and self._round(iteration, iterations) > self._round(iteration - 1, iterations)

    def _round(self, iteration: int, iterations: int) -> int:
        return (2 * iteration + 1) * self.rounds // (2 * iterations)
