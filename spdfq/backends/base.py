"""What every step of a back-end is, and what it is given."""

from collections.abc import Sequence
from pathlib import Path

from attrs import define, frozen
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import WEIGHT
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


@frozen(eq=False, kw_only=True)
class Calibration:
    """What a step works with.

    Args:
        teacher: the float model.
        images: ``[n, C, H, W]``, normalised, on the teacher's device.
        runtime: precision, seed streams and progress.
        folder: where a long step keeps its state, so that a killed run goes on; ``None`` keeps nothing.
        index: position of the step in the recipe, part of its seed stream and file names.
    """

    teacher: Teacher
    images: Tensor
    runtime: Runtime
    folder: Path | None = None
    index: int = 0

    def state_file(self, name: str) -> Path | None:
        """The file a step keeps its state in."""
        return self.folder / f"step-{self.index}-{name}.safetensors" if self.folder else None


BOTH, NEITHER = frozenset({"weights", "activations"}), frozenset[str]()


@define(kw_only=True)
class Step:
    """Base class of back-end steps.

    A child says in ``calibrates`` whose ranges it chooses, all of ``weights`` or all of ``activations``: before a step
    that works with them, and at the end of a recipe, none may be missing.
    """

    @property
    def calibrates(self) -> frozenset[str]:
        """What has a range afterwards: ``weights``, ``activations``, both or neither."""
        return BOTH

    def check(self, model: QuantizedModel, before: Sequence["Step"]) -> None:
        """Refuse what is seen to fail before anything is computed.

        Args:
            model: placed, not calibrated.
            before: the steps that come first.

        Raises:
            SpdfqError: the step cannot work on this model, or needs another one before it.
        """

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Change the quantized model in place."""
        raise TypeError(f"{type(self).__name__} does not define run")


def check_calibrated_by(steps: Sequence[Step], model: QuantizedModel) -> None:
    """Raises SpdfqError where quantizers of the model have no range after these steps."""
    needed = {"weights" if model.sites[name].kind == WEIGHT else "activations" for name in model.quantizers}
    if missing := needed.difference(*(step.calibrates for step in steps)):
        what = " and ".join(sorted(missing))
        raise SpdfqError(f"nothing chooses the ranges of {what}; put {{ type = 'calibrate' }} first in the steps")
