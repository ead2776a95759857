"""Attention priors alignment (APA): pull each head's attention towards its own random map."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, get_args

import torch
from attrs import define
from einops import rearrange, repeat
from torch import Tensor

from spdfq.attention import CLASS_ATTENTION, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses.attention_maps import MapPictures, map_pictures
from spdfq.losses.base import Loss, LossInputs
from spdfq.losses.priors import GaussianMixturePrior, Prior
from spdfq.recipe.structure import component
from spdfq.registry import losses
from spdfq.runtime import Draws
from spdfq.runtime.arguments import check_alike, check_generator, check_whole

Blocks = Literal["deep", "all"]
Scale = Literal["mass", "sum", "max"]


def draw_priors(
    record: AttentionRecord, prior: Prior, generator: torch.Generator | Draws, start: int = 0
) -> list[Tensor]:
    """Draw a prior map for each image, block and head of a record; the maps stay the same while a group is optimised.

    Args:
        record: with ``class_attention``.
        prior: distribution of the maps.
        generator: draws one block after the other; `Draws` gives each block a generator of its own, as a run does
            (``draws.scoped("attention_prior")``).
        start: index of the first block that gets maps.

    Returns:
        For each block ``[B, heads, h*w]``, each map summing to 1, on the device of the attention; empty before
        ``start``.

    Raises:
        SpdfqError: no class attention was recorded, or an argument of another type.
    """
    if not isinstance(record, AttentionRecord) or not record.class_attention:
        raise SpdfqError(
            "there is no class_attention in the record; call the model inside `with record_attention(model) as record:`"
        )
    if not isinstance(prior, Prior):
        found = f"the class {prior.__name__}" if isinstance(prior, type) else repr(prior)
        raise SpdfqError(f"prior must be a prior such as GaussianMixturePrior(), got {found}")
    check_whole("start", start, 0)
    return [
        _drawn(record, prior, generator, block) if block >= start else row.new_zeros(0)
        for block, row in enumerate(record.class_attention)
    ]


def _drawn(record: AttentionRecord, prior: Prior, generator: torch.Generator | Draws, block: int) -> Tensor:
    row = record.class_attention[block]
    source = generator.generator("prior", block) if isinstance(generator, Draws) else generator
    check_generator(source)
    maps = prior.sample(row.shape[0] * row.shape[1], record.grids[block], source)
    return rearrange(maps.to(row.device), "(b heads) k -> b heads k", heads=row.shape[1])


def attention_prior_loss(attention: list[Tensor], prior: list[Tensor], start: int, scale: Scale = "sum") -> Tensor:
    """Mean squared distance of attention rows to their priors; deeper blocks weigh more.

    ``Σ_{l≥start} (l+1)/L · Σ_heads mean_{B,K}(A − P)²`` with ``L = len(attention)`` (arXiv 2412.16553, section 3.2).

    Args:
        attention: a ``[B, heads, K]`` tensor for each block.
        prior: tensors of the same shapes, for example those of `draw_priors`; entries before ``start`` are not read.
        start: index of the first block used, counted from 0; the deep half starts at ``L // 2``.
        scale: ``sum`` takes the maps as they are. ``mass`` multiplies each by the sum of its attention row, detached:
            the part of the attention that goes to patches (as `AttentionPriorLoss` does by default). ``max`` makes its
            peak 1.

    Returns:
        A scalar.

    Raises:
        SpdfqError: the lists differ in length, the shapes of a block differ, there is no block ``start``, or another
            ``scale``.
    """
    if scale not in get_args(Scale):
        raise SpdfqError(f"scale must be one of {', '.join(map(repr, get_args(Scale)))}, got {scale!r}")
    if not isinstance(attention, (list, tuple)) or not isinstance(prior, (list, tuple)):
        raise SpdfqError("attention and prior must be lists of tensors: record.class_attention and draw_priors(...)")
    if len(attention) != len(prior):
        raise SpdfqError(f"{len(attention)} blocks of attention but {len(prior)} of priors; give one prior for each")
    if type(start) is not int or not 0 <= start < len(attention):
        raise SpdfqError(f"start must be a block index of 0 to {len(attention) - 1}, got {start!r}")
    for block in range(start, len(attention)):
        check_alike(f"attention of block {block}", attention[block], "its prior", prior[block], "B, heads, K")
    terms = []
    for _, alike in groupby(range(start, len(attention)), lambda block: attention[block].shape):
        blocks = list(alike)
        rows, maps = (torch.stack([tensors[block] for block in blocks]) for tensors in (attention, prior))
        distances = (rows - _scaled(maps, rows, scale)).square().mean((1, 3)).sum(1)
        depths = torch.arange(blocks[0] + 1, blocks[-1] + 2, dtype=rows.dtype, device=rows.device) / len(attention)
        terms.append(depths * distances)
    return torch.cat(terms).sum()


def _scaled(maps: Tensor, rows: Tensor, scale: Scale) -> Tensor:
    if scale == "mass":
        return maps * rows.detach().sum(-1, keepdim=True)
    return maps if scale == "sum" else maps / maps.amax(-1, keepdim=True)


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
    blocks: Blocks = "deep"
    scale: Scale = "mass"
    follow: bool = True

    @property
    def follows_images(self) -> bool:
        """Whether the maps move along with the images."""
        return self.follow

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group. The maps are drawn in its first iteration and then kept."""
        self.given(inputs, "draws")
        attention = self.recorded(inputs).class_attention
        start = self.start(len(attention))
        maps = self._maps(inputs, range(start, len(attention)))
        return attention_prior_loss(attention, [*attention[:start], *maps], start, self.scale)

    def start(self, blocks: int) -> int:
        """Index of the first block used."""
        return blocks // 2 if self.blocks == "deep" else 0

    def maps(self, inputs: LossInputs, block: int) -> Tensor:
        """Prior maps ``[B, heads, K]`` of a block, each summing to 1, moved along with this iteration's images."""
        return self._maps(inputs, [block])[0]

    def _maps(self, inputs: LossInputs, blocks: Sequence[int]) -> list[Tensor]:
        maps = [self._drawn(inputs, block) for block in blocks]
        windowed = any(len(inputs.attention.class_attention[block]) != len(inputs.images) for block in blocks)
        if not windowed and self.follow:
            maps = _followed(inputs, maps, [inputs.attention.grids[block] for block in blocks])
        return maps if inputs.tokens is None else [_at_tokens(each, inputs.tokens) for each in maps]

    def _drawn(self, inputs: LossInputs, block: int) -> Tensor:
        row = inputs.attention.class_attention[block]
        draws: Draws = self.given(inputs, "draws")
        maps: Tensor = draws.keep(("prior", block), lambda: _drawn(inputs.attention, self.prior, draws, block))
        if maps.shape[:2] != row.shape[:2]:
            raise SpdfqError(
                f"attention_prior: these draws are those of {maps.shape[0]} images or windows and {maps.shape[1]} "
                f"heads, not of {row.shape[0]} and {row.shape[1]}; give another group of images its own Draws"
            )
        return maps

    def pictures(self, inputs: LossInputs) -> MapPictures:
        """The prior maps of the blocks used, and the attention that was reached there."""
        rows, grids = inputs.attention.class_attention, inputs.attention.grids
        first = self.start(len(rows))
        priors = self._maps(inputs, range(first, len(rows)))
        return MapPictures(
            prior=map_pictures(priors, grids[first:], inputs.images),
            reached=map_pictures(rows[first:], grids[first:], inputs.images),
            first_block=first,
        )


def _followed(inputs: LossInputs, maps: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
    """The maps, moved along with this iteration's images; those of one grid together."""
    followed: list[Tensor] = []
    for grid, alike in groupby(zip(grids, maps, strict=True), lambda pair: pair[0]):
        blocks = [block for _, block in alike]
        moved = inputs.follow(rearrange(torch.cat(blocks, 1), "b heads (h w) -> b heads h w", h=grid[0]))
        followed += rearrange(moved, "b heads h w -> b heads (h w)").split([block.shape[1] for block in blocks], 1)
    return followed


def _at_tokens(maps: Tensor, tokens: Tensor) -> Tensor:
    """The maps at the remaining tokens ``[B, K]``, rescaled to sum to 1."""
    kept = maps.gather(-1, repeat(tokens, "b k -> b heads k", heads=maps.shape[1]))
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
