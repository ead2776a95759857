"""The base class of back-end steps, and the inputs of a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import attrs
from attrs import define, field, frozen
from torch import Tensor

from spdfq.backends.inputs import Inputs
from spdfq.errors import ComponentError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.recipe import Quantization
from spdfq.recipe.structure import Checked
from spdfq.registry import steps as registered_steps
from spdfq.runtime import Runtime
from spdfq.runtime.shared_modules import copied
from spdfq.runtime.state_key import state_key
from spdfq.teacher import Teacher


@frozen(eq=False, kw_only=True)
class Calibration:
    """The inputs of a step, besides the quantized model.

    Args:
        teacher: the float model.
        images: calibration images ``[n, C, H, W]``, normalised, on the teacher's device.
        runtime: precision, seed streams and progress.
        folder: where a long step stores its state, so that a killed run can continue; ``None`` stores nothing.
        index: position of the step in the recipe; seeds and file names depend on it.
        section: the recipe's section, with the steps up to this one; ``None`` if the step is called without one.
        inputs: what all steps depend on; the teacher, images and runtime above by default.
    """

    teacher: Teacher
    images: Tensor
    runtime: Runtime
    folder: Path | None = None
    index: int = 0
    section: Quantization | None = None
    inputs: Inputs = field()

    @inputs.default
    def _own_inputs(self) -> Inputs:
        return Inputs(self.teacher, self.images, self.runtime)

    def state_file(self, name: str) -> Path | None:
        """The file for the state of a step; ``None`` without a folder."""
        return self.folder / f"step-{self.index}-{name}.safetensors" if self.folder else None

    def state_key(self, step: "Step") -> str:
        """A hash of all that the state of a step depends on, for its files; empty without a folder."""
        return state_key(self.inputs.digest, self.section, self.index, step) if self.folder else ""


BOTH, NEITHER = frozenset({"weights", "activations"}), frozenset[str]()


@define(kw_only=True)
class Step(Checked):
    """Base class of back-end steps: a step changes a quantized model in place.

    A child defines `run`. It says in ``calibrates`` which ranges it chooses, those of all ``weights`` or of all
    ``activations``. Every range must be chosen before a step that needs it, and at the end of a recipe. A step that is
    ``in_float`` changes the float network, before any range is chosen, to one with the same output; the steps after it
    compare with that network. A step that is ``shared`` learns in all processes of a run together; a recipe without one
    is quantized by the first process alone. A step that ``replaces_quantizers`` gives some activations quantizers with
    ranges, whatever ``calibrates`` says. After one that ``fixes_weights`` no step may follow that ``changes_weights``.
    """

    in_float: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    replaces_quantizers: ClassVar[bool] = False
    fixes_weights: ClassVar[bool] = False

    @property
    def calibrates(self) -> frozenset[str]:
        """What has a range after the step: ``weights``, ``activations``, both or neither."""
        return BOTH

    @property
    def changes_weights(self) -> bool:
        """Whether the step changes weights or chooses their ranges."""
        return "weights" in self.calibrates

    def check(self, model: QuantizedModel, before: Sequence["Step"]) -> None:
        """Refuses a model or an order of steps on which the step would fail, before anything is computed.

        A child that defines it calls it too.

        Args:
            model: placed, not calibrated.
            before: the steps that come first.

        Raises:
            SpdfqError: the step cannot work on this model, needs another step before it, or changes weights too late.
        """
        fixing = next((step for step in before if step.fixes_weights), None)
        if fixing and self.changes_weights:
            last = registered_steps.label(fixing)
            raise SpdfqError(
                f"{registered_steps.label(self)}: changes weights that '{last}' before it relies on; put '{last}' last"
            )

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Changes the quantized model in place."""
        raise ComponentError(f"{type(self).__name__} does not define run")


def run_step(step: Step, model: QuantizedModel, calibration: Calibration) -> Teacher:
    """Runs a step, and returns the teacher of the steps after it.

    That is the teacher itself, or after a step that is ``in_float`` a copy of the changed network in float, so that
    the tensors inside of it can be compared with the model's.
    """
    step.run(model, calibration)
    return attrs.evolve(calibration.teacher, module=copied(model.network)) if step.in_float else calibration.teacher


def check_calibrated_by(steps: Sequence[Step], model: QuantizedModel) -> None:
    """Raises SpdfqError if quantizers of the model have no range after these steps."""
    needed = {"weights" if model.sites[name].kind == WEIGHT else "activations" for name in model.quantizers}
    if missing := needed.difference(*(step.calibrates for step in steps)):
        what = " and ".join(sorted(missing))
        raise SpdfqError(f"nothing chooses the ranges of {what}; put {{ type = 'calibrate' }} first in the steps")
