"""Makes the quantized student of an adversarial synthesis, by the recipe's own quantization section."""

from collections.abc import Callable
from typing import cast

from attrs import define, evolve
from torch import Tensor, nn

from spdfq.backends.base import Calibration, Step, run_step
from spdfq.backends.calibrate import Calibrate
from spdfq.errors import SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import place
from spdfq.recipe import Quantization
from spdfq.runtime import Runtime, silent
from spdfq.runtime.runtime import ALONE
from spdfq.teacher import Teacher


@define(eq=False)
class QuantizedStudent:
    """A quantized model whose weights can be trained and whose ranges can be chosen again.

    Args:
        module: the quantized model.
        steps: the steps that choose its ranges, with their positions in the recipe.
        teacher: the float model that the student is compared with.
        runtime: device, precision and seed streams.
    """

    module: QuantizedModel
    steps: list[tuple[int, Step]]
    teacher: Teacher
    runtime: Runtime

    @property
    def network(self) -> nn.Module:
        """The network inside, with the teacher's module names."""
        return self.module.network

    def weights(self) -> dict[str, nn.Parameter]:
        """The quantized parameters by name."""
        return {name: self.module.weight(name) for name in self.module.weight_names()}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, and the tensors of the quantizers, by name and not copied."""
        return self.module.tensors()

    def calibrate(self, images: Tensor) -> None:
        """Chooses every range again, for images ``[B, C, h, w]``."""
        for index, step in self.steps:
            step.run(self.module, _inputs(index, images, self.teacher, self.runtime))


def student_section(spec: Quantization) -> Quantization:
    """The section without the steps after those that calibrate all sites: a student does not run them."""
    seen: set[str] = set()
    for index, step in enumerate(spec.steps):
        if isinstance(step, Calibrate):
            seen.add(step.sites)
        if "all" in seen or {"weights", "activations"} <= seen:
            return evolve(spec, steps=spec.steps[: index + 1])
    return spec


def student_factory(teacher: Teacher, spec: Quantization, runtime: Runtime) -> Callable[[Tensor], QuantizedStudent]:
    """A function that makes a student for given images ``[B, C, h, w]``: a copy of the teacher, placed and calibrated.

    It places quantizers as the section says, and runs the section's steps until every quantizer has a range.

    Raises:
        SpdfqError: when a student is made: no step calibrates it, or a step fails.
    """
    quiet = evolve(runtime, progress=silent, ranks=ALONE)  # each process has groups of its own

    def make(images: Tensor) -> QuantizedStudent:
        model, done, compared = place(teacher, spec), [], teacher
        for index, step in enumerate(student_section(spec).steps):
            compared = run_step(step, model, _inputs(index, images, compared, quiet))
            if not step.in_float:
                done.append((index, cast(Step, step)))
            if all(quantizer.frozen for quantizer in model.quantizers.values()):
                return QuantizedStudent(model, done, compared, quiet)
        raise SpdfqError("synthesis.student: no step of quantization.steps calibrates it; put 'calibrate' first")

    return make


def _inputs(index: int, images: Tensor, teacher: Teacher, runtime: Runtime) -> Calibration:
    return Calibration(teacher=teacher, images=images, runtime=runtime, index=index)
