"""The back-end as one function: places quantizers, then runs the recipe's steps. And a check without images."""

import warnings
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from spdfq.backends.base import Calibration, check_calibrated_by, run_step
from spdfq.backends.budget.allocation import bits_within, check_budget
from spdfq.backends.inputs import Inputs
from spdfq.errors import DataError, RecipeError, SpdfqError, shown
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import attention_warnings, label_warnings, override_bits, place
from spdfq.recipe import Quantization
from spdfq.runtime import Runtime
from spdfq.runtime.runtime import ALONE
from spdfq.teacher import Teacher

# in widths of the range of pixels: standard normal noise stays nearer even for a model with std 1
_FAR = 10


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
        DataError: there are no images, they do not fit the teacher, or they are not normalised; or the folder holds the
            state of other work.
        RecipeError: an override matches no site, or the budget cannot be reached.
        SpdfqError: a step fails.
    """
    check_images(teacher, images)
    teacher.module.to(runtime.device)
    with runtime.own_modes():
        images = images.detach().to(runtime.device, torch.float32, copy=images.is_inference())
        bits = runtime.ranks.first(lambda: _bits(teacher, images, spec, runtime, folder))
        model, inputs = place(teacher, spec, bits), Inputs(teacher, images, runtime)
        for index, step in enumerate(spec.steps):
            section = evolve(spec, steps=spec.steps[: index + 1])
            given = Calibration(
                teacher=teacher,
                images=images,
                runtime=runtime,
                folder=folder,
                index=index,
                section=section,
                inputs=inputs,
            )
            teacher = run_step(step, model, given)
    return model


def _bits(
    teacher: Teacher, images: Tensor, spec: Quantization, runtime: Runtime, folder: Path | None
) -> dict[str, int] | None:
    """The width of each site within the section's budget; ``None`` without one."""
    alone = evolve(runtime, ranks=ALONE)  # the first process measures, and the others wait
    return bits_within(spec.budget, teacher, images, spec, alone, folder) if spec.budget else None


def check_images(teacher: Teacher, images: Any) -> None:
    """Check that calibration images fit the teacher and are normalised; warn if they may not be.

    Raises:
        DataError: not a float tensor ``[n, C, H, W]``, not finite, or far outside the teacher's range of pixels.
    """
    if not isinstance(images, Tensor):
        remedy = {"ndarray": "torch.from_numpy(images)", "SyntheticImages": "its .images"}.get(type(images).__name__)
        raise DataError(f"images: expected a tensor, got {shown(images)}; give {remedy or 'one tensor [n, C, H, W]'}")
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != teacher.input_size:
        wanted = "x".join(map(str, teacher.input_size))
        raise DataError(
            f"images of shape {tuple(images.shape)} do not fit {teacher.name}; it needs [n, {wanted}], n > 0"
        )
    if not images.is_floating_point():
        raise DataError(
            f"images are {images.dtype}, so they are not normalised; give teacher.normalise(pixels in 0..1)"
        )
    if wrong := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise DataError(f"images: {wrong} of {len(images)} hold NaN or infinite values; leave them out")
    low, high = teacher.pixel_range(images)
    width = high - low
    if ((images < low - _FAR * width) | (images > high + _FAR * width)).any():
        raise DataError(
            f"images: values from {float(images.min()):.4g} to {float(images.max()):.4g} are far outside the range of "
            f"{teacher.name}'s normalised pixels, {float(low.min()):.4g} to {float(high.max()):.4g}; give "
            "teacher.normalise(pixels in 0..1), for pixels in 0..255 divided by 255"
        )
    if images.min() >= 0 and images.max() <= 1 and low.max() < -0.5:
        warnings.warn(
            f"images: all values are in 0..1, but {teacher.name} takes normalised ones, {float(low.min()):.4g} to "
            f"{float(high.max()):.4g}; give teacher.normalise(pixels)",
            stacklevel=5,  # the caller of spdfq.quantize
        )


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
        example = torch.zeros(1, *teacher.input_size, device=teacher.device, dtype=torch.float32)
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
    return attention_warnings(teacher, model) + label_warnings(model, spec)
