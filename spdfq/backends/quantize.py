"""The back-end as one function: place quantizers, then run the recipe's steps; and what can be checked before."""

from pathlib import Path

import torch
from torch import Tensor

from spdfq.backends.base import Calibration, check_calibrated_by
from spdfq.backends.budget.budget import check_budget
from spdfq.backends.budget.sensitivity import bits_within
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import beside_the_label, overridden, place
from spdfq.recipe import Quantization
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


def quantize(
    teacher: Teacher, images: Tensor, spec: Quantization, runtime: Runtime, folder: Path | None = None
) -> QuantizedModel:
    """A fake-quantized copy of the teacher's network; the teacher is not touched.

    Args:
        teacher: the float model.
        images: ``[n, C, H, W]``, normalised for the teacher.
        spec: the recipe's quantization section.
        runtime: device, precision and seed streams.
        folder: where long steps keep their state, so that a killed call can be taken up again.

    Raises:
        DataError: there are no images, or they do not fit the teacher or are no normalised ones.
        RecipeError: an override matches no site, or the budget cannot be reached.
        SpdfqError: what a step raises.
    """
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != teacher.input_size:
        wanted = "x".join(map(str, teacher.input_size))
        raise DataError(
            f"images of shape {tuple(images.shape)} do not fit {teacher.name}; it needs [n, {wanted}], n > 0"
        )
    if not images.is_floating_point():
        raise DataError(
            f"images are {images.dtype}, so they are not normalised; give teacher.normalise(pixels in 0..1)"
        )
    teacher.module.to(runtime.device)
    images = images.to(runtime.device, torch.float32)
    bits = bits_within(spec.budget, teacher, images, spec, runtime, folder) if spec.budget else None
    model = place(teacher, spec, bits)
    for index, step in enumerate(spec.steps):
        step.run(model, Calibration(teacher=teacher, images=images, runtime=runtime, folder=folder, index=index))
    return model


def check_quantization(teacher: Teacher, spec: Quantization) -> list[str]:
    """Check everything in a quantization section that can be checked without images, and return the warnings.

    Args:
        teacher: the float model; its weights do not matter.
        spec: the recipe's quantization section.

    Raises:
        RecipeError: an override that matches no site, a budget that cannot be reached, or steps that cannot run on this
            model or in this order.
    """
    model = place(teacher, spec)
    if spec.budget:
        example = torch.zeros(1, *teacher.input_size, device=teacher.device)
        check_budget(model, spec.budget, overridden(teacher, spec, model.sites), example)
    problems = []
    for index, step in enumerate(spec.steps):
        try:
            step.check(model, spec.steps[:index])
        except SpdfqError as error:
            problems.append(f"quantization.steps.{index}: {error}")
    if problems:
        raise RecipeError(problems)
    try:
        check_calibrated_by(spec.steps, model)
    except SpdfqError as error:
        raise RecipeError([f"quantization.steps: {error}"]) from None
    return beside_the_label(model, spec)
