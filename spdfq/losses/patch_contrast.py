"""Patch contrast: neighbouring patches become either similar or clearly different (CLAMP-ViT)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from attrs import define, field, validators
from einops import rearrange
from torch import Tensor

from spdfq.attention import ATTENTION_OUTPUTS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses
from spdfq.runtime.arguments import check_size, check_tensor

# four of the eight neighbours; the other four are the same pairs in the opposite direction
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
_NEIGHBOURS = 2 * len(_DIRECTIONS)


def patch_contrast(features: Tensor, grid: tuple[int, int], positives: int = 4, temperature: float = 0.1) -> Tensor:
    """InfoNCE of each patch within its 3×3 neighbourhood, mean over patches and images (arXiv 2407.05266).

    The ``positives`` neighbours with the largest cosine similarity are the positives; the others are the negatives:
    ``mean over positives of −log(e^{s/τ} / (e^{s/τ} + Σ_negatives e^{s'/τ}))``. A patch without negatives (in a corner)
    adds nothing. Only neighbours are compared, so the cost grows with n and not with n².

    Args:
        features: ``[B, n, d]``: n = h·w patches row by row, without the class token.
        grid: ``(h, w)``.
        positives: how many neighbours are positives, 1 to 7.
        temperature: τ.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: another shape, n is not h·w, positives or temperature are out of range, or the grid is so small
            that no patch has a negative.
    """
    check_tensor("features", features, "B, n, d")
    check_size("grid", grid)
    if type(positives) is not int or not 1 <= positives < _NEIGHBOURS or not 0 < temperature < math.inf:
        raise SpdfqError(f"expected 1 to 7 positives and a temperature above 0, got {positives!r} and {temperature!r}")
    if features.shape[1] != grid[0] * grid[1]:
        raise SpdfqError(f"{features.shape[1]} patches are not a grid of {grid[0]}x{grid[1]}")
    _refuse_small(grid, positives)
    unit = F.normalize(at_least_float32(features), dim=-1)
    scores = _neighbour_similarities(rearrange(unit, "b (h w) d -> b h w d", h=grid[0])) / temperature
    near, order = scores.topk(positives, dim=-1)
    negatives = scores.scatter(-1, order, -math.inf).logsumexp(-1, keepdim=True)
    exists = near.isfinite()
    terms = torch.where(exists, F.softplus(negatives - near.masked_fill(~exists, 0)), 0)
    return (terms.sum(-1) / exists.sum(-1).clamp(min=1)).mean()


def _refuse_small(grid: tuple[int, int], positives: int) -> None:
    if min(grid[0], 3) * min(grid[1], 3) - 1 <= positives:
        raise SpdfqError(
            f"no patch of a {grid[0]}x{grid[1]} grid has more than {positives} neighbours, so none has a negative; "
            "lower positives"
        )


def _neighbour_similarities(unit: Tensor) -> Tensor:
    """``[B, h, w, 8]`` products of each patch with its neighbours; −∞ beyond the border.

    Args:
        unit: ``[B, h, w, d]`` vectors of length 1.
    """
    batch, height, width, _ = unit.shape
    scores = unit.new_full((_NEIGHBOURS, batch, height, width), -math.inf)
    for index, (down, right) in enumerate(_DIRECTIONS):
        patches, neighbours = _with_neighbour(down, right), _with_neighbour(-down, -right)
        product = (unit[patches] * unit[neighbours]).sum(-1)
        scores[(2 * index, *patches)] = product
        scores[(2 * index + 1, *neighbours)] = product
    return rearrange(scores, "neighbours b h w -> b h w neighbours")


def _with_neighbour(down: int, right: int) -> tuple[slice, slice, slice]:
    """Index of the patches ``[B, h, w]`` that have a neighbour this far down and to the right."""

    def side(step: int) -> slice:
        return slice(None, -step) if step > 0 else slice(-step, None)

    return slice(None), side(down), side(right)


@losses.register("patch_contrast", paper="arXiv:2407.05266")
@define(kw_only=True)
class PatchContrastLoss(Loss):
    """Patch-level contrast of attention outputs within 3×3 neighbourhoods, mean over blocks.

    The feature of a patch is the concatenation of its heads. In windowed attention, neighbourhoods end at the border of
    the window.

    Args:
        weight: factor of this loss.
        positives: how many of a patch's eight neighbours are positives: the most similar ones.
        temperature: temperature of the InfoNCE (unpublished).
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_OUTPUTS})

    positives: int = field(default=4, validator=[validators.ge(1), validators.lt(_NEIGHBOURS)])
    temperature: float = field(default=0.1, validator=[validators.gt(0.0), validators.lt(math.inf)])

    def check(self, attention: AttentionRecord, pruned: bool) -> None:
        """Refuse token pruning, which removes neighbours, and grids so small that no patch has a negative."""
        if pruned:
            raise SpdfqError(
                "compares patches with their neighbours, which token pruning leaves out; use one or the other"
            )
        for outputs, grid in zip(attention.attention_outputs, attention.grids, strict=True):
            _refuse_small(_query_grid(grid, outputs.shape[-2] - attention.prefix), self.positives)

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        record = self.recorded(inputs)
        terms = []
        for outputs, grid in zip(record.attention_outputs, record.grids, strict=True):
            features = rearrange(outputs[:, :, record.prefix :].float(), "b heads n d -> b n (heads d)")
            terms.append(
                patch_contrast(features, _query_grid(grid, features.shape[1]), self.positives, self.temperature)
            )
        return torch.stack(terms).mean()


def _query_grid(grid: tuple[int, int], queries: int) -> tuple[int, int]:
    """The grid of the queries, which is finer than that of the keys if keys are pooled (PVT v2)."""
    factor = max(1, math.isqrt(queries // (grid[0] * grid[1])))
    return grid[0] * factor, grid[1] * factor
