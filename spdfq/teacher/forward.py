"""One forward pass of a teacher's module: evaluation mode, what the module returns, and which part of it is used."""

import copy
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.errors import ModelError, SpdfqError, first_line, is_out_of_memory
from spdfq.runtime.shared_modules import held

_one_by_one = threading.RLock()  # two calls that replace the buffers of one module would not both put them back


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode; on exit, the mode of every submodule is restored."""
    with held((part, "training", False) for part in module.modules()):
        yield module.eval()


def device_of(module: nn.Module) -> torch.device:
    """Device of the parameters."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@frozen
class TakeOutput:
    """A forward hook: the module returns one field of a dict, tuple or object instead of all of it."""

    key: str | int

    def __call__(self, module: nn.Module, inputs: Any, returned: Any) -> Any:
        """The field; a tensor is returned as it is."""
        return returned if isinstance(returned, Tensor) else _fields(returned)[self.key]


def returning_tensor(
    module: nn.Module, name: str, size: tuple[int, int, int], classes: int, output: str | int | None
) -> tuple[nn.Module, str | int | None]:
    """A module that returns logits or features as a tensor, found by one forward pass of one image.

    A module that returns a tensor is returned as it is. Of another one the result is a shallow copy: it has the same
    parts, weights and names, and a hook that takes one field of what the module returns.

    Args:
        module: on any device; its modes and buffers, and torch's random state, do not change.
        name: of the model, for errors.
        size: ``(C, H, W)`` of an image.
        classes: number of logits; 0 for features of any number.
        output: name or position of the field; ``None`` takes the only one that holds such a tensor.

    Returns:
        The module, and the field that is taken; ``None`` for a module that returns a tensor.

    Raises:
        ModelError: the forward pass fails, no field or several fields fit, or the tensor does not have one row of
            ``classes`` numbers.
    """
    returned = _one_image(module, name, size)
    if isinstance(returned, Tensor):
        _check_rows(returned, name, classes)
        return module, _taken(module)
    key = _key(_fields(returned), type(returned).__name__, name, classes, output)
    adapted = copy.copy(module)
    for attribute, value in vars(module).items():
        if attribute.startswith("_forward"):
            setattr(adapted, attribute, copy.copy(value))  # so that the module itself gets no hook
    adapted.register_forward_hook(TakeOutput(key))
    return adapted, key


def _taken(module: nn.Module) -> str | int | None:
    """The field that a module takes already, because it comes from another teacher."""
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, TakeOutput)]
    return hooks[0].key if hooks else None


@torch.no_grad()
def _one_image(module: nn.Module, name: str, size: tuple[int, int, int]) -> Any:
    """What the module returns for one image, which it must not change."""
    device = device_of(module)
    image = torch.linspace(-1, 1, math.prod(size), dtype=torch.float32, device=device).reshape(1, *size)
    given = image.clone()
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
    try:
        with _one_by_one, torch.random.fork_rng([device] if device.type == "cuda" else []), evaluation_mode(module):
            returned = torch.func.functional_call(module, buffers, (image,))
    except SpdfqError:
        raise
    except Exception as error:  # each architecture fails with its own error
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name}: cannot run on one image {_by(size)} ({first_line(error)}); it must take images [B, C, H, W] "
            "alone, of the input_size (C, H, W)"
        ) from error
    if not torch.equal(image, given):
        raise ModelError(
            f"{name}: changes the images that it is given, in place, which would change yours; begin its forward with "
            "images = images.clone()"
        )
    return returned


def _fields(returned: Any) -> dict[Any, Any]:
    """The named or numbered parts of what a module returns."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, (tuple, list)):
        return dict(enumerate(returned)) | getattr(returned, "_asdict", dict)()
    return dict(getattr(returned, "__dict__", {}))


def _key(fields: dict[Any, Any], kind: str, name: str, classes: int, output: str | int | None) -> str | int:
    """The field that holds the logits or features."""
    what = f"logits [1, {classes}]" if classes else "features [1, D]"
    parts = ", ".join(f"{key}: {_described(value)}" for key, value in fields.items()) or "no fields"
    if output is not None:
        if not isinstance(fields.get(output), Tensor):
            raise ModelError(f"{name}: output={output!r} is no tensor of the {kind} it returns ({parts})")
        _check_rows(fields[output], name, classes)
        return output
    fitting: list[str | int] = [key for key, value in fields.items() if _fits(value, classes)]
    if not fitting:
        raise ModelError(f"{name}: returns {kind} ({parts}) for one image, without {what} in floating point")
    if len({id(fields[key]) for key in fitting}) > 1:
        raise ModelError(
            f"{name}: returns {kind} with several tensors that could be its {what} ({parts}); name the right one, for "
            f"example Teacher(..., output={fitting[0]!r})"
        )
    return fitting[0]


def _fits(value: Any, classes: int) -> bool:
    rows = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2 and len(value) == 1
    return rows and (not classes or value.shape[1] == classes)


def _check_rows(returned: Tensor, name: str, classes: int) -> None:
    if _fits(returned, classes):
        return
    if _fits(returned, 0):
        raise ModelError(
            f"{name}: returns {returned.shape[1]} logits, but the teacher's num_classes is {classes}; they must agree"
        )
    wanted = f"logits [1, {classes}]" if classes else "features [1, D]"
    raise ModelError(f"{name}: returns {_described(returned)} for one image instead of {wanted} in floating point")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
