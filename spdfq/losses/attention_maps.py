"""Attention priors beside the attention that was reached, as small pictures for the report."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spdfq.losses.attention_prior import AttentionPriorLoss
from spdfq.losses.base import LossInputs

_SHOWN_IMAGES = 4


def prior_pictures(loss: AttentionPriorLoss, inputs: LossInputs) -> tuple[Tensor, Tensor, int]:
    """Of the first images' first head: priors and reached attention ``[m, blocks, h, w]``, and the first block."""
    record = inputs.attention
    first = loss.start(len(record.class_attention))
    blocks = range(first, len(record.class_attention))
    prior = _pictures([loss.maps(inputs, block) for block in blocks], inputs, blocks)
    reached = _pictures([record.class_attention[block] for block in blocks], inputs, blocks)
    return prior, reached, first


def _pictures(maps: list[Tensor], inputs: LossInputs, blocks: range) -> Tensor:
    """All blocks at the finest grid, windows put side by side."""
    grids = inputs.attention.grids
    tiled = [tile(m[:, 0], grids[block], inputs.images) for m, block in zip(maps, blocks, strict=True)]
    finest = max((m.shape[-2:] for m in tiled), key=lambda size: size[0] * size[1])
    fitted = [F.interpolate(m[:_SHOWN_IMAGES].unsqueeze(1), tuple(finest)) for m in tiled]
    return torch.cat(fitted, 1).float().cpu()


def tile(maps: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """Windows ``[B*n*m, h*w]``, row by row, to ``[B, n*h, m*w]``; n and m follow from the images' aspect."""
    count = len(maps) // len(images)
    likely = (count * images.shape[-2] * grid[1] / (images.shape[-1] * grid[0])) ** 0.5
    rows = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - likely))
    columns = count // rows
    windows = maps.view(len(images), rows, columns, *grid)
    return windows.transpose(2, 3).reshape(len(images), rows * grid[0], columns * grid[1])
