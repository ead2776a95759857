"""The back-end as one function: places quantizers, then runs the recipe's steps. And a check without images."""

from pathlib import Path

import torch
from torch import Tensor

from spdfq.backends.base import Calibration, check_calibrated_by
from spdfq.backends.budget.allocation import bits_within, check_budget
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import label_warnings, override_bits, place
from spdfq.recipe import Quantization
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


def quantize(
    teacher: Teacher, images: Tensor, spec: Quantization, runtime: Runtime, folder: Path | None = None
) -> QuantizedModel:
    """A fake-quantized copy of the teacher's network; the teacher is not changed.

    Args:
        teacher: the float model.
        images: ``[n, C, H, W]``, normalised for the teacher.
        spec: the recipe's quantization section.
        runtime: device, precision and seed streams.
        folder: where long steps store their state, so that a killed call can continue.

    Raises:
        DataError: there are no images, they do not fit the teacher, or they are not normalised.
        RecipeError: an override matches no site, or the budget cannot be reached.
        SpdfqError: a step fails.
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
    with runtime.own_modes():
        images = images.detach().to(runtime.device, torch.float32, copy=images.is_inference())
        bits = bits_within(spec.budget, teacher, images, spec, runtime, folder) if spec.budget else None
        model = place(teacher, spec, bits)
        for index, step in enumerate(spec.steps):
            step.run(model, Calibration(teacher=teacher, images=images, runtime=runtime, folder=folder, index=index))
    return model


def check_quantization(teacher: Teacher, spec: Quantization) -> list[str]:
    """Checks everything in a quantization section that can be checked without images, and returns warnings.

    Args:
        teacher: the float model; its weights do not matter.
        spec: the recipe's quantization section.

    Raises:
        RecipeError: an override matches no site, the budget cannot be reached, or steps cannot run on this model or in
            this order.
    """
    model = place(teacher, spec)
    if spec.budget:
        example = torch.zeros(1, *teacher.input_size, device=teacher.device)
        check_budget(model, spec.budget, override_bits(teacher, spec, model.sites), example)
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
    return label_warnings(model, spec)
