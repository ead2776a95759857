"""What follows from the tensors of a frozen quantizer alone: computed once instead of in every call."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """The last value that was computed from some tensors.

    It is computed again when a tensor was replaced or changed in place. A change through ``tensor.data`` goes unseen,
    as it does in autograd. A copy starts empty.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Tensor], list[Any], Value] | None = None

    def of(self, tensors: list[Tensor], make: Callable[[], Value], device: torch.device | None = None) -> Value:
        """``make()``, which must depend on these tensors and this device alone and is called without autograd."""
        if is_traced() or any(tensor.is_inference() for tensor in tensors):  # the latter do not count their changes
            return make()
        state = [device, *((tensor._version, tensor.dtype, tensor.device) for tensor in tensors)]
        last = self._last
        if last is None or last[1] != state or any(a is not b for a, b in zip(last[0], tensors, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                self._last = last = (tensors, state, make())
        return last[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remembered[Value]":
        return Remembered()


def is_traced() -> bool:
    """Whether the code is being exported or compiled, so that numbers read from tensors would become constants."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
