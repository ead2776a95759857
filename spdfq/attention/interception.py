"""The one tap on attention's products: every transformer that calls `scaled_dot_product_attention` is seen here."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from spdfq.errors import ModelError

# queries x keys up to which explicit products keep up with the fused kernel on a CPU, forward and backward; the fused
# one is slow there in bfloat16: benchmarks/attention.py
_EXPLICIT_LIMIT_CPU = 65 * 65
_EXPLICIT_LIMIT_CPU_BFLOAT16 = 200 * 200
SOFTMAX_FUNCTIONS = frozenset({torch.softmax, Tensor.softmax, F.softmax})
PRODUCT_FUNCTIONS = frozenset(
    {torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
)


class AttentionMode(TorchFunctionMode):
    """Hands each scaled-dot-product attention call to `attend`; every other function goes to `other`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Compute the attention output ``[..., N_q, d]`` from its operands."""
        raise TypeError(f"{type(self).__name__} does not say how to attend")

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute any other function."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return self.other(func, args, kwargs or {})
        return self.attend(*_operands(*args, **(kwargs or {})))


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
    """The operands of a `scaled_dot_product_attention` call, its mask and scale made explicit."""
    if dropout_p:
        raise ModelError("attention with dropout cannot be tapped; put the model into evaluation mode")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, change: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Softmax rows ``[..., N_q, N_k]`` in float32; the mask (boolean or additive) is applied before the softmax.

    ``change`` is applied to the scores before the mask. Seen by an outer `record_attention`, like torch's own
    functions: so a quantized model's attention is recorded.
    """
    if has_torch_function((query, key)):
        return handle_torch_function(attention_probabilities, (query, key), query, key, mask, scale, change)
    scores = attention_scores(query, key, scale)
    return masked(change(scores) if change else scores, mask).softmax(-1)


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled products ``[..., N_q, N_k]`` of queries and keys, in float32."""
    with torch.autocast(query.device.type, enabled=False):
        return query.float() * scale @ key.float().mT


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a boolean (true = keep) or additive mask applied."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention output by the faster way: explicit products for few tokens on a CPU, the fused kernel elsewhere."""
    limit = _EXPLICIT_LIMIT_CPU_BFLOAT16 if query.dtype == torch.bfloat16 else _EXPLICIT_LIMIT_CPU
    few = query.shape[-2] * key.shape[-2] <= limit
    if query.device.type == "cpu" and few:
        return explicit_attention(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention output by two products, the softmax between them in float32."""
    scores = masked(query * scale @ key.mT, mask)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Set timm's ``fused_attn`` flags, so that attention goes through one function; restored on exit."""
    flagged: list[tuple[Any, Any]] = [
        (module, module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")
    ]
    try:
        for module, _ in flagged:
            module.fused_attn = True
        yield
    finally:
        for module, flag in flagged:
            module.fused_attn = flag


@contextmanager
def module_names(model: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the modules whose ``forward`` runs, innermost last (leaf modules are left out)."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                enter = module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
                hooks.callback(enter.remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield stack
