"""Attention priors alignment (APA): pull each head's attention towards its own random map."""

from typing import Any, ClassVar, Literal, get_args

import torch
from attrs import define, field, validators
from einops import rearrange, repeat
from torch import Tensor

from spdfq.attention import CLASS_ATTENTION
from spdfq.errors import SpdfqError
from spdfq.losses.attention_maps import MapPictures, map_pictures
from spdfq.losses.base import Loss, LossInputs
from spdfq.losses.priors import GaussianMixturePrior
from spdfq.recipe.structure import component
from spdfq.registry import losses

Blocks = Literal["deep", "all"]
Scale = Literal["mass", "sum", "max"]


def attention_prior_loss(attention: list[Tensor], prior: list[Tensor], start: int) -> Tensor:
    """Mean squared distance of attention rows to their priors; deeper blocks weigh more.

    ``Σ_{l≥start} (l+1)/L · Σ_heads mean_{B,K}(A − P)²`` with ``L = len(attention)`` (arXiv 2412.16553, section 3.2).

    Args:
        attention: a ``[B, heads, K]`` tensor for each block.
        prior: tensors of the same shapes; entries before ``start`` are not read.
        start: index of the first block used, counted from 0; the deep half starts at ``L // 2``.

    Returns:
        A scalar.

    Raises:
        SpdfqError: the lists differ in length, the shapes of a block differ, or there is no block ``start``.
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
    """Attention priors alignment (APA): each image, block and head follows a prior map that is drawn for it.

    Args:
        weight: factor of this loss; ``auto`` balances its gradient against the label loss's.
        prior: distribution that the maps are drawn from.
        blocks: the ``deep`` half of the blocks, as published, or ``all`` blocks.
        scale: what a map sums to: the ``mass`` that its row gives to patch tokens (detached), or 1 (``sum``); ``max``
            makes its peak 1 (unpublished).
        follow: roll and mirror the maps along with the images (unpublished). Maps of windowed attention never follow,
            because windows stay in place on the token grid while the images move.
    """

    needs: ClassVar[frozenset[str]] = frozenset({CLASS_ATTENTION})
    has_pictures: ClassVar[bool] = True

    prior: Any = component("prior", default=GaussianMixturePrior)
    blocks: Blocks = field(default="deep", validator=validators.in_(get_args(Blocks)))
    scale: Scale = field(default="mass", validator=validators.in_(get_args(Scale)))
    follow: bool = True

    @property
    def follows_images(self) -> bool:
        """Whether the maps move along with the images."""
        return self.follow

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group. The maps are drawn in its first iteration and then kept."""
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
        """Prior maps ``[B, heads, K]`` of a block, each summing to 1, moved along with this iteration's images."""
        row, grid = inputs.attention.class_attention[block], inputs.attention.grids[block]

        def draw() -> Tensor:
            batch, heads = row.shape[:2]
            maps = self.prior.sample(batch * heads, grid, inputs.generator("prior", block))
            return rearrange(maps.to(row.device), "(b heads) k -> b heads k", heads=heads)

        maps = inputs.keep(("prior", block), draw)
        windowed = len(row) != len(inputs.images)
        if not windowed and self.follow:
            moved = inputs.follow(rearrange(maps, "b heads (h w) -> b heads h w", h=grid[0]))
            maps = rearrange(moved, "b heads h w -> b heads (h w)")
        return maps if inputs.tokens is None else _at_tokens(maps, inputs.tokens)

    def pictures(self, inputs: LossInputs) -> MapPictures:
        """The prior maps of the blocks used, and the attention that was reached there."""
        rows, grids = inputs.attention.class_attention, inputs.attention.grids
        first = self.start(len(rows))
        priors = [self.maps(inputs, block) for block in range(first, len(rows))]
        return MapPictures(
            prior=map_pictures(priors, grids[first:], inputs.images),
            reached=map_pictures(rows[first:], grids[first:], inputs.images),
            first_block=first,
        )

    def _scaled(self, maps: Tensor, row: Tensor) -> Tensor:
        if self.scale == "mass":
            return maps * row.detach().sum(-1, keepdim=True)
        return maps if self.scale == "sum" else maps / maps.amax(-1, keepdim=True)


def _at_tokens(maps: Tensor, tokens: Tensor) -> Tensor:
    """The maps at the remaining tokens ``[B, K]``, rescaled to sum to 1."""
    kept = maps.gather(-1, repeat(tokens, "b k -> b heads k", heads=maps.shape[1]))
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
