"""The labelled crops of a group of images, and how they are cut out and resized."""

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor

from spdfq.recipe.structure import Checked

Size = tuple[int, int]


@define(eq=False, kw_only=True)
class CropPlan(Checked):
    """Where the labelled crops of a group of images lie.

    Args:
        boxes: ``[crops, 4]`` top, left, height and width in pixels.
        owners: ``[crops]`` index of the image that each crop is cut from.
        labels: ``[crops]`` class of each crop.
        every: interval, in iterations, at which the teacher sees the crops; 0 means never.
        redraw: interval, in iterations, at which the boxes are drawn again; 0 means never.
    """

    boxes: Tensor
    owners: Tensor
    labels: Tensor
    every: int = 1
    redraw: int = 0
    _matrices: dict = field(factory=dict, init=False, repr=False)

    def due(self, iteration: int) -> bool:
        """Whether the teacher sees the crops in this iteration."""
        return self.every > 0 and iteration % self.every == 0

    def views(self, images: Tensor, size: Size) -> Tensor:
        """Cut out each crop and resize it bilinearly; differentiable.

        Args:
            images: ``[B, C, H, W]``.
            size: height and width of the result.

        Returns:
            ``[crops, C, *size]``, equal to `torch.nn.functional.interpolate` of each box. Pixels outside a box have a
            weight of exactly zero.
        """
        owners, rows, columns = self._resize_to(images, size)
        # index_select instead of images[owners]: faster, and its gradient is summed in a fixed order
        return rows @ images.index_select(0, owners) @ columns.mT

    def label_mask(self, count: int, classes: int) -> Tensor:
        """``[count, classes]`` boolean: which classes each image shows."""
        mask = torch.zeros(count, classes, dtype=torch.bool)
        mask[self.owners, self.labels] = True
        return mask

    def _resize_to(self, images: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Owners, and the matrices that resize rows and columns; computed once for each kind of image."""
        key = (tuple(images.shape[-2:]), size, images.device, images.dtype)
        if key not in self._matrices:
            top, left, height, width = self.boxes.T
            exact = torch.promote_types(images.dtype, torch.float32)
            rows = _resize_matrices(top.to(exact), height.to(exact), images.shape[-2], size[0])
            columns = _resize_matrices(left.to(exact), width.to(exact), images.shape[-1], size[1])
            self._matrices[key] = (self.owners.to(images.device), rows.to(images), columns.to(images))
        return self._matrices[key]


def _resize_matrices(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """``[crops, 1, size, full]``: bilinear weights of each output row over the input rows of a box."""
    start, length = rearrange(start, "crops -> crops 1"), rearrange(length, "crops -> crops 1")
    # `interpolate` rounds the scale, then rounds again after a fused multiply-add; exact weights differ by 1e-5
    source = ((length / size).double() * (torch.arange(size) + 0.5) - 0.5).to(length.dtype).clamp(min=0)
    source = torch.minimum(source, length - 1)
    below = source.floor()
    above = torch.minimum(below + 1, length - 1)
    weights = torch.zeros(len(start), size, full, dtype=length.dtype)
    weights.scatter_add_(2, (start + below).long().unsqueeze(2), (1 - (source - below)).unsqueeze(2))
    weights.scatter_add_(2, (start + above).long().unsqueeze(2), (source - below).unsqueeze(2))
    return rearrange(weights, "crops size full -> crops 1 size full")
