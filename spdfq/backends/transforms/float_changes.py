"""What the steps share that change the float network but not what it computes: checks, and notes of what they skip."""

from collections.abc import Sequence

from torch import Tensor

from spdfq.backends.base import Step
from spdfq.backends.names import some_of
from spdfq.errors import ModelError, SpdfqError
from spdfq.quantized.model import QuantizedModel

_TOLERANCE = 1e-4


def refuse_after_calibration(step: str, model: QuantizedModel, before: Sequence[Step] = ()) -> None:
    """Raises SpdfqError if a range was chosen, by one of the steps before or at a site of the model."""
    chosen = any(other.calibrates or other.replaces_quantizers for other in before)
    if chosen or any(quantizer.frozen for quantizer in model.quantizers.values()):
        raise SpdfqError(f"{step}: changes the tensors whose ranges were chosen before; put it before 'calibrate'")


def check_same_output(step: str, after: Tensor, before: Tensor) -> None:
    """Raises ModelError if the output changed by more than rounding."""
    gap = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
    if not gap <= _TOLERANCE:
        raise ModelError(
            f"{step}: the float output changed by {gap:.1e} of its maximum, so the network computes in a way that the "
            "step does not see; leave the step out"
        )


class Kept:
    """What a step does not change, grouped by reason.

    Args:
        what: what is kept, such as ``the stream``.
        changed: what the step would have done, such as ``rotated``.
    """

    def __init__(self, what: str, changed: str) -> None:
        self._what, self._changed = what, changed
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, *names: str) -> None:
        """Adds modules that are kept for a reason."""
        if names:
            self._names.setdefault(reason, []).extend(name or "the network" for name in names)

    def lines(self) -> list[str]:
        """One line for each reason."""
        found = []
        for reason, names in self._names.items():
            found.append(f"{self._what} of {some_of(names)}: not {self._changed}, {reason}")
        return found
