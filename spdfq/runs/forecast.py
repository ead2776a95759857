"""How long the rest of a run will take, from the stages that have finished."""

from collections.abc import Mapping, Sequence

from attrs import define, field

# a forward pass with simulated quantization costs a few plain ones; only the time left that is shown depends on it
_SIMULATED = 3.0


@define
class Forecast:
    """Seconds expected of the stages of a run.

    Args:
        names: of all stages in order. A control's are ``NAME: images``, ``NAME: quantize`` and ``NAME: evaluate``.
        quick: names of the controls whose images take no time: noise and real images.
        alike: controls whose images are made by the same kind of source as the run's own, and their share of its work.
        seconds: of the stages that have finished.
    """

    names: Sequence[str]
    quick: frozenset[str] = frozenset()
    alike: Mapping[str, float] = field(factory=dict)
    seconds: dict[str, float] = field(factory=dict)

    def expected(self, name: str) -> float | None:
        """Seconds that a stage will take; ``None`` if nothing is known."""
        control, _, stage = name.rpartition(": ")
        if control in self.quick and stage == "images":
            return 0.0
        if control and stage == "images":
            known = control in self.alike and stage in self.seconds
            return self.alike[control] * self.seconds[stage] if known else None
        if stage in self.seconds:
            return self.seconds[stage]
        if stage == "evaluate" and "teacher" in self.seconds:
            return _SIMULATED * self.seconds["teacher"]
        return None

    def later(self, name: str) -> float | None:
        """Seconds that all stages after one will take; ``None`` if one of them is not known."""
        rest = [self.expected(other) for other in self.names[self.names.index(name) + 1 :]]
        return None if None in rest else sum(seconds for seconds in rest if seconds is not None)
