"""Attention maps as small pictures for the report: what a loss aims at, and what was reached."""

import torch
import torch.nn.functional as F
from attrs import frozen
from einops import rearrange
from torch import Tensor

_SHOWN_IMAGES = 4


@frozen(eq=False)
class MapPictures:
    """Maps of the first images' first head.

    Args:
        prior: ``[m, l, h, w]``: the maps that a loss aims at, of l blocks.
        reached: ``[m, l, h, w]``: the attention that was reached.
        first_block: index of the first of these blocks.
    """

    prior: Tensor
    reached: Tensor
    first_block: int


def map_pictures(maps: list[Tensor], grids: list[tuple[int, int]], images: Tensor) -> Tensor:
    """Pictures of the first images' first head, all at the finest grid of any block.

    Args:
        maps: for each block ``[B, heads, h*w]``, or ``[B*windows, heads, h*w]`` with windows folded into the batch.
        grids: for each block the token grid ``(h, w)`` of an image or of a window.
        images: ``[B, C, H, W]``; only their shape is read.

    Returns:
        float32 ``[m, l, h, w]`` on the CPU.
    """
    tiled = [tile(block[:, 0], grid, images) for block, grid in zip(maps, grids, strict=True)]
    finest = max((block.shape[-2:] for block in tiled), key=lambda size: size[0] * size[1])
    fitted = [F.interpolate(rearrange(block[:_SHOWN_IMAGES], "b h w -> b 1 h w"), tuple(finest)) for block in tiled]
    return torch.cat(fitted, 1).float().cpu()


def tile(maps: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """Put the windows of each image side by side.

    Args:
        maps: ``[B*rows*columns, h*w]``, the windows of an image row by row.
        grid: token grid ``(h, w)`` of a window.
        images: ``[B, C, H, W]``; their aspect decides how many rows and columns of windows there are.

    Returns:
        ``[B, rows*h, columns*w]``.
    """
    count = len(maps) // len(images)
    likely = (count * images.shape[-2] * grid[1] / (images.shape[-1] * grid[0])) ** 0.5
    rows = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - likely))
    pattern = "(b rows columns) (h w) -> b (rows h) (columns w)"
    return rearrange(maps, pattern, b=len(images), rows=rows, h=grid[0], w=grid[1])
