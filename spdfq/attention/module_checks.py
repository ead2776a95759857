"""Modules whose forward pass cannot be watched: what they hide, and what to give instead."""

from typing import Any

import torch
from torch import Tensor, nn

from spdfq.errors import ModelError


def watchable(module: nn.Module) -> nn.Module:
    """A module whose forward pass can be watched and differentiated: that inside a compiled or replicated one.

    Raises:
        ModelError: a part of it hides its functions, or a weight has no values or gradients; the message names it.
    """
    inner = uncompiled_module(module)
    while isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = uncompiled_module(inner.module)
    for name, part in inner.named_modules():
        refuse_hidden(inner, name, part)
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        if why := _unusable(tensor):
            raise ModelError(f"{type(inner).__name__}: {name} {why}")
    return inner


def uncompiled_module(module: nn.Module) -> Any:
    """The module that `torch.compile` was given, if it made this one."""
    return getattr(module, "_orig_mod", module)


def refuse_hidden(module: nn.Module, name: str, part: nn.Module) -> None:
    """Raise ModelError if the functions that a part of a module calls cannot be seen.

    Args:
        module: for the message.
        name: of the part in it; empty for the module itself.
        part: the part.
    """
    if isinstance(part, torch.jit.ScriptModule):
        why = "is scripted or traced, which hides its functions; give the nn.Module that it was made from"
    elif "_orig_mod" in part._modules:
        why = "was made by torch.compile, which hides its functions; give its _orig_mod, or compile it in place: "
        why += f"{name or 'module'}.compile()"
    elif _is_exported(part):
        why = "is an exported graph, which hides its functions; give the nn.Module that it was made from"
    elif type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        why = "is already quantized; give the float module"
    else:
        return
    raise ModelError(f"{type(module).__name__}: {f'{name} ' if name else ''}{why}")


def _is_exported(part: nn.Module) -> bool:
    """Whether a part runs a graph of operators below the level of torch's functions."""
    graph = vars(part).get("_graph", vars(part).get("graph"))
    return isinstance(graph, torch.fx.Graph) and any(isinstance(n.target, torch._ops.OpOverload) for n in graph.nodes)


def _unusable(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "is on the meta device, without values; load the weights before"
    if tensor.is_inference():
        return "was made under torch.inference_mode, without gradients; give copy.deepcopy(module)"
    return ""
