"""Checks of the fields that describe a teacher's input."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn

from spdfq.errors import ModelError, shown
from spdfq.inference.preprocessing import CROP_MODES, INTERPOLATIONS, LARGEST_CROP
from spdfq.teacher.state import check_dense


def mean_of_channels(values: Any) -> tuple[float, ...]:
    """A teacher's mean as numbers.

    Raises:
        ModelError: not one number from 0 to 1 for each channel.
    """
    mean = _per_channel("mean", values)
    if not all(value >= 0 for value in mean):
        raise ModelError(f"Teacher: mean must be from 0 to 1, got {list(mean)}")
    return mean


def std_of_channels(values: Any) -> tuple[float, ...]:
    """A teacher's standard deviation as numbers.

    Raises:
        ModelError: not one number above 0, and at most 1, for each channel.
    """
    std = _per_channel("std", values)
    if not all(value > 0 for value in std):
        raise ModelError(f"Teacher: std must be above 0, got {list(std)}")
    return std


def _per_channel(what: str, values: Any) -> tuple[float, ...]:
    listed = values.tolist() if hasattr(values, "tolist") else values
    numbers = list(listed) if isinstance(listed, Iterable) else []
    if not numbers or any(isinstance(each, bool) or not isinstance(each, Real) for each in numbers):
        raise ModelError(
            f"Teacher: {what} must have a number for each channel, for example (0.5, 0.5, 0.5), got {shown(values)}"
        )
    if any(each > 1 for each in numbers):
        raise ModelError(
            f"Teacher: {what} is {[float(each) for each in numbers]}, but it is that of pixels in 0..1, so at most 1; "
            "divide a mean and std of pixels in 0..255 by 255"
        )
    return tuple(map(float, numbers))


def check_module(module: Any) -> None:
    """Check that a module is one, in float32 and with weights.

    Raises:
        ModelError: it is not.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"Teacher: module must be an nn.Module, got {shown(module)}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        check_dense(name, tensor)
    parameters = list(module.parameters())
    coarse = {p.dtype for p in parameters if p.is_floating_point()} - {torch.float32}
    if coarse:
        named = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse))
        raise ModelError(f"{type(module).__name__}: has weights in {named}; give Teacher(module.float(), ...)")


def check_description(teacher: Any) -> None:
    """Check a teacher's fields besides the module, mean and std alone.

    Raises:
        ModelError: a field has the wrong type or value, or two contradict each other.
    """
    name, size, classes, crop = teacher.name, teacher.input_size, teacher.num_classes, teacher.crop_pct
    if not isinstance(name, str):
        raise ModelError(f"Teacher: name must be a string, got {shown(name)}")
    if not isinstance(size, tuple) or len(size) != 3 or any(type(side) is not int or side < 1 for side in size):
        raise ModelError(f"{name}: input_size must be three whole numbers (C, H, W), got {shown(size)}")
    if len({len(teacher.mean), len(teacher.std), size[0]}) > 1:
        raise ModelError(
            f"{name}: mean has {len(teacher.mean)} values, std {len(teacher.std)}, the input {size[0]} channels; they "
            "must agree (input_size is (C, H, W))"
        )
    if type(classes) is not int or classes < 0 or classes == 1:
        raise ModelError(
            f"{name}: num_classes must be a whole number, at least 2, or 0 for a backbone without a head, got "
            f"{shown(classes)}"
        )
    real = isinstance(crop, Real) and not isinstance(crop, bool) and math.isfinite(crop)
    if not real or not 0 < crop <= LARGEST_CROP:
        raise ModelError(f"{name}: crop_pct must be a share of the image such as 0.875, got {shown(crop)}")
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if getattr(teacher, key) not in known:
            raise ModelError(f"{name}: {key} must be one of {', '.join(known)}, got {shown(getattr(teacher, key))}")
    output = teacher.output
    if output is not None and (isinstance(output, bool) or not isinstance(output, (str, int))):
        raise ModelError(f"{name}: output must be the name or the position of a field, got {shown(output)}")
