"""Checks of arguments that a component is called with: each gives one line instead of an error from inside torch."""

import math
from typing import Any

import torch
from torch import Tensor

from spdfq.errors import SpdfqError, shown


def check_tensor(name: str, value: Any, axes: str) -> None:
    """Refuse what is not a tensor with these axes, given as ``"B, C, h, w"``; ``"..."`` accepts any number of axes.

    Raises:
        SpdfqError: with the shape found.
    """
    if not isinstance(value, Tensor):
        raise SpdfqError(f"{name} must be a tensor [{axes}], got {type(value).__name__}")
    if axes != "..." and value.ndim != axes.count(",") + 1:
        raise SpdfqError(f"{name} must be [{axes}], got {list(value.shape)}")


def check_alike(first: str, one: Any, second: str, other: Any, axes: str) -> None:
    """Refuse two values that are not tensors of one shape with these axes.

    Raises:
        SpdfqError: with the shapes found.
    """
    check_tensor(first, one, axes)
    check_tensor(second, other, axes)
    if one.shape != other.shape:
        raise SpdfqError(f"{first} and {second} must both be [{axes}], got {list(one.shape)} and {list(other.shape)}")


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise SpdfqError(f"{name} must be a whole number from {least} up, got {shown(value)}")


def check_number(name: str, value: Any, least: float) -> None:
    """Refuse what is not a finite number of at least ``least``."""
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise SpdfqError(f"{name} must be a finite number of at least {least}, got {shown(value)}")


def check_size(name: str, value: Any) -> None:
    """Refuse what is not ``(height, width)`` in whole numbers from 1 up."""
    pair = isinstance(value, (tuple, list, torch.Size)) and len(value) == 2
    if not pair or any(type(side) is not int or side < 1 for side in value):
        raise SpdfqError(f"{name} must be (height, width), two whole numbers from 1 up, got {shown(value)}")


def check_generator(value: Any) -> None:
    """Refuse what is not a CPU generator."""
    if not isinstance(value, torch.Generator):
        raise SpdfqError(
            f"generator must be a torch.Generator, such as spdfq.runtime.generator(seed), got {shown(value)}"
        )
    if value.device.type != "cpu":
        raise SpdfqError(f"generator must be on the CPU, so that every device draws the same, not on {value.device}")
