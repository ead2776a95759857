"""What a quantized model is compared with: the same back-end without the steps that learn.

Its network computes what the teacher computes, in the basis of the quantized one: rotated, scaled and reparameterised
alike. Its weights are the float counterparts of the quantized weights.
"""

from attrs import evolve
from torch import Tensor

from spdfq.backends import Calibrate, Calibration, PowerOfTwoFactors, RepQ
from spdfq.backends.base import Step, run_step
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import place
from spdfq.recipe import Quantization
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


def learns(step: Step) -> bool:
    """Whether a step changes what the float network computes, or is not known to keep it."""
    return not (step.in_float or isinstance(step, (Calibrate, PowerOfTwoFactors, RepQ)))


def reference_model(
    teacher: Teacher, images: Tensor, spec: Quantization, runtime: Runtime, bits: dict[str, int]
) -> QuantizedModel:
    """A copy of the teacher's network, transformed and calibrated as a recipe says, on which nothing has learned.

    Args:
        teacher: the float model.
        images: calibration images ``[n, C, H, W]``, normalised, on the teacher's device.
        spec: the recipe's quantization section.
        runtime: device, precision and seeds.
        bits: of the sites; those that the section's overrides name keep theirs.
    """
    model, compared = place(teacher, evolve(spec, budget=None), bits), teacher
    for index, step in enumerate(spec.steps):
        if not learns(step):
            given = Calibration(teacher=compared, images=images, runtime=runtime, index=index)
            compared = run_step(step, model, given)
    if not all(quantizer.frozen for quantizer in model.quantizers.values()):  # a step of a plugin chooses the ranges
        Calibrate().run(model, Calibration(teacher=compared, images=images, runtime=runtime))
    return model
