"""The arithmetic of attention: scores, probabilities and outputs."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

# largest queries x keys for which explicit products are as fast as the fused kernel on a CPU, forward and backward; the
# fused kernel is slow there in bfloat16; measured by benchmarks/attention.py
_EXPLICIT_LIMIT_CPU = 65 * 65
_EXPLICIT_LIMIT_CPU_BFLOAT16 = 200 * 200


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, change: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Softmax over the keys, in float32.

    Like torch's own functions, this one is seen by an enclosing `record_attention`. That is how the attention of a
    quantized model is recorded.

    Args:
        query: ``[..., q, d]``.
        key: ``[..., k, d]``.
        mask: boolean (true keeps a score) or additive; applied before the softmax.
        scale: factor of the scores.
        change: applied to the scores before the mask.

    Returns:
        ``[..., q, k]``, each row summing to 1.
    """
    if has_torch_function((query, key)):
        return handle_torch_function(attention_probabilities, (query, key), query, key, mask, scale, change)
    scores = attention_scores(query, key, scale)
    return masked(change(scores) if change else scores, mask).softmax(-1)


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled products ``[..., q, k]`` of queries and keys, in float32."""
    with torch.autocast(query.device.type, enabled=False):
        return query.float() * scale @ key.float().mT


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a boolean (true keeps a score) or additive mask applied."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention output ``[..., q, d]``: explicit products for few tokens on a CPU, the fused kernel otherwise."""
    if explicit_is_faster(query, key):
        return explicit_attention(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def explicit_is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether explicit products are as fast as the fused kernel, forward and backward: for few tokens on a CPU."""
    limit = _EXPLICIT_LIMIT_CPU_BFLOAT16 if query.dtype == torch.bfloat16 else _EXPLICIT_LIMIT_CPU
    return query.device.type == "cpu" and query.shape[-2] * key.shape[-2] <= limit


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention output ``[..., q, d]`` by two products, with a softmax in float32 between them."""
    scores = masked(query * scale @ key.mT, mask)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
