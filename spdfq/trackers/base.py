"""The base class of trackers, and what they are given."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field, frozen

from spdfq.extras import require
from spdfq.recipe.structure import Checked


@frozen
class Tracked:
    """A finished run.

    Args:
        name: of the run.
        folder: of the run.
        recipe: as plain data.
        values: the results by name: accuracies in percent, seconds of the stages, sizes in bytes.
        curves: the losses of the synthesis by name, one number for each iteration, the mean over all groups; empty for
            images without an optimisation.
        pictures: PNG files by name.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    values: dict[str, float]
    curves: dict[str, list[float]] = field(factory=dict)
    pictures: dict[str, Path] = field(factory=dict)

    def steps(self) -> Iterator[dict[str, float]]:
        """The losses of each iteration by name."""
        for numbers in zip(*self.curves.values(), strict=True):
            yield dict(zip(self.curves, numbers, strict=True))


@define(kw_only=True)
class Tracker(Checked, ABC):
    """Base class of trackers. A child defines `track`, which ``packages`` it needs, and which extra has them."""

    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]

    def check(self) -> None:
        """Refuse a tracker whose packages are missing, before anything is computed.

        Raises:
            SpdfqError: one is missing; the message has the command that installs it.
        """
        require("runtime.tracker", self.packages, self.extra)

    @abstractmethod
    def track(self, run: Tracked) -> None:
        """Send or write the results of a run."""
