"""Interception of attention during a forward pass.

Nearly every transformer calls `scaled_dot_product_attention`, so one function mode sees the attention of all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from spdfq.attention.module_checks import refuse_hidden
from spdfq.attention.multihead import attention_with_probabilities, multi_head_attention
from spdfq.attention.operations import attention_probabilities
from spdfq.errors import ModelError
from spdfq.runtime.shared_modules import Hook, as_written, held, own_hooks, uncompiled

SOFTMAX_FUNCTIONS = frozenset({torch.softmax, Tensor.softmax, F.softmax})
PRODUCT_FUNCTIONS = frozenset(
    {torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
)


class FunctionMode(TorchFunctionMode):
    """Passes each torch function to `call`. The body of `multi_head_attention_forward` is seen too, not its call."""

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute a function."""
        raise TypeError(f"{type(self).__name__} does not define call")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return self.call(func, args, kwargs or {})
        with self:  # a mode is off while it handles a function
            return multi_head_attention(*args, **(kwargs or {}))


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside the ``with`` block, functions do not pass the innermost function mode."""
    with _pop_mode_temporarily():
        yield


class AttentionMode(FunctionMode):
    """Passes each call of `scaled_dot_product_attention` to `attend`, and every other torch function to `other`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Compute the attention output ``[..., q, d]`` from its operands."""
        raise TypeError(f"{type(self).__name__} does not define attend")

    def attend_with_probabilities(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention output ``[..., q, d]`` and its probabilities ``[..., q, k]``."""
        output = self.attend(query, key, value, mask, scale)
        return output, attention_probabilities(query, key, mask, scale).to(value.dtype)

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute any other function."""
        return func(*args, **kwargs)

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Tell attention from other functions."""
        if func is F.scaled_dot_product_attention:
            return self.attend(*_operands(*args, **kwargs))
        if func is attention_with_probabilities:
            return self.attend_with_probabilities(*args)
        return self.other(func, args, kwargs)


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """The operands of a `scaled_dot_product_attention` call, with an explicit mask and scale."""
    if dropout_p:
        raise ModelError("attention with dropout cannot be intercepted; put the model into evaluation mode")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Set timm's ``fused_attn`` flags, so that attention goes through one function; restore them on exit.

    Compiled code and gradient checkpointing are off meanwhile: neither runs all functions under a function mode.
    """
    parts = list(model.modules())
    flags = [
        (part, "fused_attn", True) for part in parts if "fused_attn" in vars(part) or hasattr(type(part), "fused_attn")
    ]
    with held([*flags, *as_written(parts)]), uncompiled():
        yield


@contextmanager
def module_names(
    model: nn.Module, on_outermost: Callable[[str, tuple], object] = lambda *_: None
) -> Iterator[list[str]]:
    """A stack with the names of the modules whose ``forward`` is running, innermost last; without leaf modules.

    ``on_outermost(name, inputs)`` is called when the first of them begins: the model, or a part that is called alone.
    """
    stack: list[str] = []

    def enter(name: str, _: nn.Module, inputs: tuple) -> None:
        stack.append(name)
        if len(stack) == 1:
            on_outermost(name, inputs)

    def leave(*_: Any) -> None:
        stack.pop()

    hooks: list[Hook] = []
    for name, module in model.named_modules():
        refuse_hidden(model, name, module)
        if next(module.children(), None) is not None:
            hooks.append((module.register_forward_pre_hook, partial(enter, name)))
            hooks.append((partial(module.register_forward_hook, always_call=True), leave))
    with own_hooks(hooks):
        yield stack
