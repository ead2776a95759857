"""Patch contrast: neighbouring patches group into things and their borders, the objective of CLAMP-ViT."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from attrs import define, field, validators
from torch import Tensor

from spdfq.attention import ATTENTION_OUTPUTS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses

# half of the eight neighbours; the other half are the same pairs seen from the other side
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
_NEIGHBOURS = 2 * len(_DIRECTIONS)


def patch_contrast(features: Tensor, grid: tuple[int, int], positives: int = 4, temperature: float = 0.1) -> Tensor:
    """InfoNCE of each patch against its 3×3 neighbourhood, mean over patches and images (arXiv 2407.05266).

    Of a patch's neighbours the ``positives`` of largest cosine similarity are its positives, the others its negatives:
    ``mean over positives of −log(e^{s/τ} / (e^{s/τ} + Σ_negatives e^{s'/τ}))``. A patch without negatives (in a corner)
    adds nothing. Only neighbours are compared, so the cost grows with N and not with N².

    Args:
        features: ``[B, N, D]``, N = h·w patches row by row, class token dropped.
        grid: ``(h, w)``.
        positives: how many neighbours are positives, 1 to 7.
        temperature: τ.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: N is not h·w, or the grid is so small that no patch has a negative.
    """
    if features.shape[1] != grid[0] * grid[1]:
        raise SpdfqError(f"{features.shape[1]} patches are not a grid of {grid[0]}x{grid[1]}")
    _refuse_small(grid, positives)
    unit = F.normalize(at_least_float32(features), dim=-1)
    scores = _neighbour_similarities(unit.unflatten(1, grid)) / temperature
    near, order = scores.topk(positives, dim=-1)
    negatives = scores.scatter(-1, order, -math.inf).logsumexp(-1, keepdim=True)
    there = near.isfinite()
    terms = torch.where(there, F.softplus(negatives - near.masked_fill(~there, 0)), 0)
    return (terms.sum(-1) / there.sum(-1).clamp(min=1)).mean()


def _refuse_small(grid: tuple[int, int], positives: int) -> None:
    if min(grid[0], 3) * min(grid[1], 3) - 1 <= positives:
        raise SpdfqError(
            f"no patch of a {grid[0]}x{grid[1]} grid has more than {positives} neighbours, so none has a negative; "
            "lower positives"
        )


def _neighbour_similarities(unit: Tensor) -> Tensor:
    """``[B, h, w, 8]`` products with the neighbours; −∞ beyond the border."""
    batch, height, width, _ = unit.shape
    scores = unit.new_full((_NEIGHBOURS, batch, height, width), -math.inf)
    for index, (down, right) in enumerate(_DIRECTIONS):
        here, there = _overlap(down, right), _overlap(-down, -right)
        product = (unit[here] * unit[there]).sum(-1)
        scores[(2 * index, *here)] = product
        scores[(2 * index + 1, *there)] = product
    return scores.movedim(0, -1)


def _overlap(down: int, right: int) -> tuple[slice, slice, slice]:
    """The patches that have a neighbour so far down and to the right."""

    def side(step: int) -> slice:
        return slice(None, -step) if step > 0 else slice(-step, None)

    return slice(None), side(down), side(right)


@losses.register("patch_contrast", paper="arXiv:2407.05266")
@define(kw_only=True)
class PatchContrastLoss(Loss):
    """Patch-level contrast of attention outputs inside 3×3 neighbourhoods, mean over blocks.

    Heads lie side by side in a patch's feature. Neighbourhoods of windowed attention end at the window's border.

    Args:
        weight: factor of this loss.
        positives: how many of a patch's eight neighbours, the most similar ones, are positives.
        temperature: of the InfoNCE (unpublished).
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_OUTPUTS})

    positives: int = field(default=4, validator=[validators.ge(1), validators.lt(_NEIGHBOURS)])
    temperature: float = field(default=0.1, validator=[validators.gt(0.0), validators.lt(math.inf)])

    def check(self, attention: AttentionRecord, pruned: bool) -> None:
        """Refuse pruned patches, which leave holes in the neighbourhoods, and grids without a negative."""
        if pruned:
            raise SpdfqError("compares patches with their neighbours, which token pruning leaves out; take one of both")
        for outputs, grid in zip(attention.attention_outputs, attention.grids, strict=True):
            _refuse_small(_unpooled(grid, outputs.shape[-2] - attention.prefix), self.positives)

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        record = inputs.attention
        terms = []
        for outputs, grid in zip(record.attention_outputs, record.grids, strict=True):
            features = outputs[:, :, record.prefix :].float().transpose(1, 2).flatten(2)
            terms.append(patch_contrast(features, _unpooled(grid, features.shape[1]), self.positives, self.temperature))
        return torch.stack(terms).mean()


def _unpooled(grid: tuple[int, int], queries: int) -> tuple[int, int]:
    """The grid of the queries, where that of the keys is pooled (PVT v2)."""
    factor = max(1, math.isqrt(queries // (grid[0] * grid[1])))
    return grid[0] * factor, grid[1] * factor
