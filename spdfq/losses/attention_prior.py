"""Attention priors alignment (APA): pull each head's attention towards a random map of its own."""

from typing import Any, ClassVar, Literal, get_args

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.attention import CLASS_ATTENTION
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs
from spdfq.losses.priors import GaussianMixturePrior
from spdfq.recipe.structure import component
from spdfq.registry import losses

Blocks = Literal["deep", "all"]
Scale = Literal["mass", "sum", "max"]


def attention_prior_loss(attention: list[Tensor], prior: list[Tensor], start: int) -> Tensor:
    """Mean squared distance of attention rows to their priors, deeper blocks weighing more.

    ``Σ_{l≥start} (l+1)/L · Σ_h mean_{B,K}(A − P)²`` with ``L = len(attention)`` (arXiv 2412.16553, section 3.2).

    Args:
        attention: a ``[B, H, K]`` tensor for each block.
        prior: likewise; entries before ``start`` are not read.
        start: 0-based index of the first block used; the deep half is ``L // 2``.

    Returns:
        A scalar.

    Raises:
        SpdfqError: lists of different length, a block whose shapes differ, or no such block as ``start``.
    """
    if len(attention) != len(prior):
        raise SpdfqError(f"{len(attention)} blocks of attention but {len(prior)} of priors; give one prior for each")
    if not 0 <= start < len(attention):
        raise SpdfqError(f"start must be a block index of 0 to {len(attention) - 1}, got {start}")
    for index in range(start, len(attention)):
        if attention[index].shape != prior[index].shape:
            found = f"attention {list(attention[index].shape)} but prior {list(prior[index].shape)}"
            raise SpdfqError(f"block {index}: {found}; both must be [B, H, K]")
    terms = [
        (index + 1) / len(attention) * (attention[index] - prior[index]).square().mean((0, 2)).sum()
        for index in range(start, len(attention))
    ]
    return torch.stack(terms).sum()


@losses.register("attention_prior", paper="arXiv:2412.16553")
@define(kw_only=True)
class AttentionPriorLoss(Loss):
    """Attention priors alignment (APA): each image, block and head follows a prior map drawn for it.

    Args:
        weight: factor of this loss; ``auto`` balances its gradient against the label loss's.
        prior: what the maps are drawn from.
        blocks: the deep half as published, or all blocks.
        scale: what a map sums to: the ``mass`` its row gives to patch tokens (detached), or 1 (``sum``); ``max`` makes
            its peak 1 (unpublished).
        follow: roll and mirror the maps along with the images (unpublished). Windows stay where they are on the token
            grid while the images move beneath them, so the maps of windowed attention stay as they were drawn.
    """

    needs: ClassVar[frozenset[str]] = frozenset({CLASS_ATTENTION})

    prior: Any = component("prior", default=GaussianMixturePrior)
    blocks: Blocks = field(default="deep", validator=validators.in_(get_args(Blocks)))
    scale: Scale = field(default="mass", validator=validators.in_(get_args(Scale)))
    follow: bool = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group; the maps are drawn in its first iteration and kept."""
        attention = inputs.attention.class_attention
        start = self.start(len(attention))
        targets = [
            self._scaled(self.maps(inputs, block), row) if block >= start else row
            for block, row in enumerate(attention)
        ]
        return attention_prior_loss(attention, targets, start)

    def start(self, blocks: int) -> int:
        """Index of the first block used."""
        return blocks // 2 if self.blocks == "deep" else 0

    def maps(self, inputs: LossInputs, block: int) -> Tensor:
        """Maps ``[B, H, K]`` of a block, each summing to 1, moved along with this iteration's images."""
        row, grid = inputs.attention.class_attention[block], inputs.attention.grids[block]

        def draw() -> Tensor:
            count = row.shape[0] * row.shape[1]
            maps = self.prior.sample(count, grid, inputs.generator("prior", block))
            return maps.to(row.device).view(*row.shape[:2], -1)

        maps = inputs.keep(("prior", block), draw)
        windowed = len(row) != len(inputs.images)
        if not windowed and self.follow:
            maps = inputs.follow(maps.unflatten(-1, grid)).flatten(-2)
        return maps if inputs.tokens is None else _seen(maps, inputs.tokens)

    def _scaled(self, maps: Tensor, row: Tensor) -> Tensor:
        if self.scale == "mass":
            return maps * row.detach().sum(-1, keepdim=True)
        return maps if self.scale == "sum" else maps / maps.amax(-1, keepdim=True)


def _seen(maps: Tensor, tokens: Tensor) -> Tensor:
    """The maps at the tokens that are left, each summing to 1 again."""
    kept = maps.gather(-1, tokens.unsqueeze(1).expand(-1, maps.shape[1], -1))
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
