"""`torch.nn.functional.multi_head_attention_forward`, taken apart into functions that a function mode can see."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from spdfq.attention.operations import attend, attention_probabilities
from spdfq.errors import ModelError


def attention_with_probabilities(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention output ``[..., q, d]`` and its probabilities ``[..., q, k]``; seen by an enclosing function mode.

    Args:
        query: ``[..., q, d]``.
        key: ``[..., k, d]``.
        value: ``[..., k, d]``.
        mask: boolean (true keeps a score) or additive.
        scale: factor of the scores.
    """
    if has_torch_function((query, key, value)):
        operands = (query, key, value)
        return handle_torch_function(attention_with_probabilities, operands, *operands, mask, scale)
    return attend(query, key, value, mask, scale), attention_probabilities(query, key, mask, scale).to(value.dtype)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result of `torch.nn.functional.multi_head_attention_forward`, which takes the same arguments.

    It calls `F.linear` on ``[b, n, d]`` and `F.scaled_dot_product_attention` on ``[b, heads, n, d]``, so both see the
    images first, whatever the layout of the arguments.

    Raises:
        ModelError: dropout is on, or keys or values are given ready-made.
    """
    if training and dropout_p:
        raise ModelError("attention with dropout cannot be intercepted; put the model into evaluation mode")
    if static_k is not None or static_v is not None:
        raise ModelError("multi_head_attention_forward: static_k and static_v are not supported; leave them out")
    batched = query.ndim == 3
    if not batched:
        query, key, value = _each(lambda states: states[:, None], query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    query, key, value = _each(lambda states: states.transpose(0, 1), query, key, value)
    batch, keys = query.shape[0], key.shape[1]  # len() would fix the number of images of an exported program
    causal = is_causal and key_padding_mask is None and not need_weights  # as in torch, the hint replaces the mask
    mask = None if causal else _joined_mask(attn_mask, key_padding_mask, batch, query.dtype)
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        query, key, value = _projected((query, key, value), weights, in_proj_bias)
    else:
        assert in_proj_weight is not None
        query, key, value = _packed_projection(query, key, value, in_proj_weight, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        key, value = (
            torch.cat([states, bias.expand(batch, 1, -1)], 1) for states, bias in ((key, bias_k), (value, bias_v))
        )
    if add_zero_attn:
        key, value = (F.pad(states, (0, 0, 0, 1)) for states in (key, value))
    if mask is not None:
        mask = F.pad(mask, (0, key.shape[1] - keys))
    query, key, value = (
        rearrange(states, "b n (heads d) -> b heads n d", heads=num_heads) for states in (query, key, value)
    )
    probabilities = None
    if need_weights:
        output, probabilities = attention_with_probabilities(query, key, value, mask, query.shape[-1] ** -0.5)
        probabilities = probabilities.mean(1) if average_attn_weights else probabilities
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    output = F.linear(rearrange(output, "b heads n d -> b n (heads d)"), out_proj_weight, out_proj_bias)
    if not batched:
        return output[0], None if probabilities is None else probabilities[0]
    return output.transpose(0, 1), probabilities


def _each(change: Callable[[Tensor], Tensor], *states: Tensor) -> list[Tensor]:
    """The changed states; those that are the same tensor stay the same tensor."""
    made = {id(tensor): change(tensor) for tensor in states}
    return [made[id(tensor)] for tensor in states]


def _packed_projection(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by one weight ``[3*d, d]``: in one product for each different input."""
    if query is key and key is value:
        together = F.linear(query, weight, bias)
        first, second, third = together.chunk(3, -1)
        return first, second, third
    if key is value:
        width = query.shape[-1]
        own, shared = weight.split([width, 2 * width])
        biases = (None, None) if bias is None else bias.split([width, 2 * width])
        key, value = F.linear(key, shared, biases[1]).chunk(2, -1)
        return F.linear(query, own, biases[0]), key, value
    return _projected((query, key, value), weight.chunk(3), bias)


def _projected(
    states: tuple[Tensor, ...], weights: tuple[Tensor, ...], bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    biases = (None, None, None) if bias is None else bias.chunk(3)
    first, second, third = (F.linear(*each) for each in zip(states, weights, biases, strict=True))
    return first, second, third


def _joined_mask(attention: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """The sum of a mask ``[q, k]`` or ``[b*heads, q, k]`` and one of padded keys ``[b, k]``; true hides a key."""
    masks = []
    if attention is not None:
        added = _additive(attention, dtype)
        masks.append(added if added.ndim == 2 else rearrange(added, "(b heads) q k -> b heads q k", b=batch))
    if padding is not None:
        masks.append(rearrange(_additive(padding, dtype), "b k -> b 1 1 k"))
    return torch.stack(torch.broadcast_tensors(*masks)).sum(0) if len(masks) > 1 else next(iter(masks), None)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
