"""Numbers that stand for features in a forward pass: each is given once, so a value tells which feature it is."""

from typing import Any

import torch
from attrs import define, field
from torch import Tensor

_BITS = 23  # so many numbers of this form are exact in float32
_TOLERANCE = 1e-5


@define(eq=False)
class Signatures:
    """Signatures: numbers between -2 and 2, one for each feature, all of them different.

    Args:
        owners: owner and index of each number.
    """

    owners: dict[float, tuple[Any, int]] = field(factory=dict)
    _given: int = 0

    def new(self, owner: Any, count: int) -> Tensor:
        """The numbers of an owner's features 0 to ``count`` - 1, float32 ``[count]``."""
        size = 1 << _BITS
        numbers = torch.arange(self._given, self._given + count, dtype=torch.int64, device="cpu")
        self._given += count
        # two products with odd numbers and a shift permute the numbers below `size`
        mixed = numbers * 5184471 % size
        mixed = (mixed ^ (mixed >> 11)) * 2654435 % size
        values = ((2 * mixed + 1 - size).double() / (size // 2)).float()  # never 0 or 1
        self.owners |= {value: (owner, index) for index, value in enumerate(values.tolist())}
        return values

    def find(self, values: Tensor) -> list[tuple[Any, int]] | None:
        """The owner and index of each value of ``[n]``; ``None`` if one is unknown."""
        found = [self.owners.get(value) for value in values.float().tolist()]
        return None if None in found else [each for each in found if each is not None]


def axis_of(tensor: Tensor, signature: Tensor) -> int | None:
    """The axis along which a tensor consists of the signature only, counted from the end; ``None`` for no such axis."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    signature = signature.to(tensor)
    for axis, length in enumerate(tensor.shape):
        if length == len(signature):
            gap = (tensor.movedim(axis, -1) - signature).abs().max()
            if bool(gap < _TOLERANCE):
                return axis - tensor.ndim
    return None


def spread(signature: Tensor, like: Tensor, axis: int) -> Tensor:
    """A tensor of a shape and type that consists of the signature along an axis, counted from the end."""
    shape = [len(signature)] + [1] * (-axis - 1)
    return signature.to(like).reshape(shape).expand(like.shape).clone()


def replaced(value: Any, others: dict[int, Tensor]) -> Any:
    """Nested arguments with some tensors replaced, by id."""
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    if isinstance(value, dict):
        return {key: replaced(item, others) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(replaced(item, others) for item in value)
    return value
