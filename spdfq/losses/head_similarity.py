"""Inter-head attention similarity: how similar the attention maps of the heads of a block are (MimiQ)."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, ClassVar

import torch
from attrs import define
from einops import rearrange
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.losses.chunks import chunk_length
from spdfq.registry import losses
from spdfq.runtime.arguments import check_tensor

_C1, _C2 = 0.01**2, 0.03**2
_FLAT = 1e-8


def head_ssim(scores: Tensor) -> Tensor:
    """Structural similarity between the maps of every two heads, for each query (arXiv 2407.20021).

    Each row of scores is scaled to 0..1. The similarity has one window over the whole row, with ``C1 = 0.01²`` and
    ``C2 = 0.03²``. All covariances of a query are one product of centred rows.

    Args:
        scores: ``[B, heads, q, k]`` raw scores of queries over keys, without class tokens.

    Returns:
        ``[B, q, heads, heads]`` in -1..1, ones on the diagonal.

    Raises:
        SpdfqError: another shape.
    """
    check_tensor("scores", scores, "B, heads, q, k")
    maps = rearrange(at_least_float32(scores), "b heads q k -> b q heads k")
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=_FLAT)
    mean = maps.mean(-1)
    centred = maps - mean.unsqueeze(-1)
    covariance = centred @ centred.mT / maps.shape[-1]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    luminance = (2 * _pair_products(mean) + _C1) / (_pair_sums(mean.square()) + _C1)
    return luminance * (2 * covariance + _C2) / (_pair_sums(variance) + _C2)


def _pair_products(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) * x.unsqueeze(-2)


def _pair_sums(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) + x.unsqueeze(-2)


def head_similarity(scores: Tensor) -> Tensor:
    """Mean of the squared structural similarity over all pairs of two heads, queries and images (arXiv 2407.20021).

    Args:
        scores: ``[B, heads, q, k]``; see `head_ssim`.

    Returns:
        A scalar in 0..1.

    Raises:
        SpdfqError: another shape, or fewer than two heads.
    """
    check_tensor("scores", scores, "B, heads, q, k")
    heads = scores.shape[1]
    if heads < 2:
        raise SpdfqError(f"head similarity needs at least 2 heads, got {heads}")
    return _of_queries(scores).mean()


def _of_queries(scores: Tensor) -> Tensor:
    """``[B, q]``: the mean over pairs alone."""
    heads = scores.shape[1]
    squared = head_ssim(scores).square()
    others = squared.sum((-2, -1)) - squared.diagonal(dim1=-2, dim2=-1).sum(-1)
    return others / (heads * (heads - 1))


def recorded_head_similarity(record: AttentionRecord) -> Tensor:
    """`head_similarity` of each recorded attention with at least two heads, ``[blocks]``.

    Raw scores are computed from the recorded queries and keys, a few queries at a time, and again for the gradient. So
    all scores are never in memory at once. Position biases and masks are not included. In windowed attention each
    window counts as an image.

    Raises:
        SpdfqError: every attention has one head.
    """
    _refuse_one_head(record)
    pairs = [
        (query[:, :, record.prefix :], key[:, :, record.prefix :])
        for query, key in zip(record.queries, record.keys, strict=True)
        if query.shape[1] > 1
    ]
    alike = groupby(pairs, lambda pair: (pair[0].shape, pair[1].shape))
    return torch.cat([values for _, blocks in alike for values in _of_blocks(list(blocks))])


def _refuse_one_head(record: AttentionRecord) -> None:
    if all(query.shape[1] < 2 for query in record.queries):
        raise SpdfqError(
            "no attention of this model has two heads or more, so there is nothing to compare; leave the loss out"
        )


def _of_blocks(blocks: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The similarities of blocks with equal shapes, in order; small blocks are computed together."""
    query, key = blocks[0]
    windows, heads, queries, _ = query.shape
    row = heads * key.shape[-2]
    several, together, rows = (
        chunk_length(elements, query.device) for elements in (row * queries * windows, row * queries, row)
    )
    for start in range(0, len(blocks), several):
        some = blocks[start : start + several]
        query, key = (torch.cat(tensors) for tensors in zip(*some, strict=True)) if len(some) > 1 else some[0]
        # split instead of slices: its gradient is one concatenation, while that of each slice is as large as the whole
        parts = [
            _Recomputed.apply(part, keys, len(some))
            for images, keys in zip(query.split(together), key.split(together), strict=True)
            for part in images.split(rows, dim=-2)
        ]
        yield torch.stack(parts).sum(0) / (windows * queries)


def _summed(query: Tensor, key: Tensor, blocks: int) -> Tensor:
    """The similarities ``[blocks]``, summed over queries and images instead of averaged."""
    scores = at_least_float32(query) @ at_least_float32(key).mT
    return _of_queries(scores).view(blocks, -1).sum(1)


class _Recomputed(torch.autograd.Function):
    """`_summed`, computed again for the gradient (torch's checkpoint would load its compiler, which takes seconds)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, blocks: int) -> Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(query, key)
        return _summed(query, key, blocks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            value = _summed(query, key, ctx.blocks)
        return *torch.autograd.grad(value, (query, key), gradient), None


@losses.register("head_similarity", paper="arXiv:2407.20021")
@define(kw_only=True)
class HeadSimilarityLoss(Loss):
    """Dissimilarity of the heads' raw attention maps, ``1 − SSIM²``, mean over blocks, queries and pairs of heads.

    Blocks with one head have no pairs and are left out.

    Args:
        weight: factor of this loss.
        faithful: as in the public code, also count each head with itself, which multiplies the loss of a block with H
            heads by (H − 1)/H.
    """

    needs: ClassVar[frozenset[str]] = frozenset({QUERIES_AND_KEYS})

    faithful: bool = False

    def check(self, attention: AttentionRecord, pruned: bool) -> None:
        """Refuse a model in which every block has one head."""
        _refuse_one_head(attention)

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        record = self.recorded(inputs)
        blocks = 1 - recorded_head_similarity(record)
        if self.faithful:
            heads = [query.shape[1] for query in record.queries if query.shape[1] > 1]
            blocks = torch.stack([block * (count - 1) / count for block, count in zip(blocks, heads, strict=True)])
        return blocks.mean()
