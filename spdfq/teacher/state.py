"""What a module consists of, read without its state dict, whose hooks may rename, drop or change what it holds."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spdfq.errors import ModelError


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a shared one has its first name.

    Raises:
        ModelError: as `check_dense`.
    """
    found: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        for leaf, buffer in part.named_buffers(recurse=False):
            if leaf not in part._non_persistent_buffers_set:
                found[f"{prefix}.{leaf}" if prefix else leaf] = buffer
    for name, tensor in found.items():
        check_dense(name, tensor)
    return found


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises ModelError for a parameter or buffer whose numbers are not all in memory, or not as they are."""
    if is_lazy(tensor):
        raise ModelError(f"{name}: has no shape yet; call the module once before you hand it over")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ModelError(f"{name}: is sparse or quantized; convert it to an ordinary tensor, or remove it")


def extra_states(module: nn.Module) -> dict[str, Any]:
    """What submodules return from ``get_extra_state``, by module name: tensors, or data that JSON holds unchanged.

    Raises:
        ModelError: an extra state is something else.
    """
    found = {}
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            found[name] = part.get_extra_state()
            if not isinstance(found[name], Tensor) and not _survives_json(found[name]):
                raise ModelError(
                    f"{name or type(part).__name__}: get_extra_state returns a {type(found[name]).__name__} that only "
                    "pickle can store; return a tensor, or numbers, text, lists and dicts with text as keys"
                )
    return found


def _survives_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
