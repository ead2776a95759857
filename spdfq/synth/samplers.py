"""Samplers: which classes an image shows and where (multi-semantic reinforcement, arXiv 2412.16553, section 3.3)."""

from typing import ClassVar, Literal, get_args

import torch
from attrs import define, evolve, field, frozen, validators
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.registry import samplers

Box = tuple[int, int, int, int]
CropLayout = Literal["cells", "split"]
ClassDraw = Literal["random", "balanced"]
SMALLEST_SIDE = 4


@define(eq=False, kw_only=True)
class CropPlan:
    """The labelled regions of a group of images.

    Args:
        boxes: ``[M, 4]`` top, left, height, width in pixels.
        owners: ``[M]`` image of each region.
        labels: ``[M]`` class of each region.
        every: the regions are forwarded as views of their own every so many iterations; 0 is never.
        redraw: their boxes are drawn anew every so many iterations; 0 is never.
    """

    boxes: Tensor
    owners: Tensor
    labels: Tensor
    every: int = 1
    redraw: int = 0
    _maps: dict = field(factory=dict, init=False, repr=False)

    def due(self, iteration: int) -> bool:
        """Whether the regions are forwarded in this iteration."""
        return self.every > 0 and iteration % self.every == 0

    def views(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Each region cropped and resized bilinearly, sampling clamped to its box; differentiable.

        Args:
            images: ``[B, C, H, W]``.
            size: height and width of the result.

        Returns:
            ``[M, C, *size]``, equal to `torch.nn.functional.interpolate` of each slice; a pixel outside the box has
            weight exactly zero.
        """
        owners, rows, columns = self._maps_to(images, size)
        # index_select rather than images[owners]: its gradient is added up in a fixed order, and faster
        return rows @ images.index_select(0, owners) @ columns.mT

    def label_mask(self, count: int, classes: int) -> Tensor:
        """``[count, classes]`` boolean: the classes each image shows."""
        mask = torch.zeros(count, classes, dtype=torch.bool)
        mask[self.owners, self.labels] = True
        return mask

    def _maps_to(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        key = (tuple(images.shape[-2:]), size, images.device, images.dtype)
        if key not in self._maps:
            top, left, height, width = self.boxes.T
            exact = torch.promote_types(images.dtype, torch.float32)
            rows = _resize_matrices(top.to(exact), height.to(exact), images.shape[-2], size[0])
            columns = _resize_matrices(left.to(exact), width.to(exact), images.shape[-1], size[1])
            self._maps[key] = (self.owners.to(images.device), rows.to(images), columns.to(images))
        return self._maps[key]


def _resize_matrices(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """``[M, 1, size, full]``: bilinear weights of each output row over the input rows of a box."""
    start, length = start.unsqueeze(1), length.unsqueeze(1)
    # `interpolate` rounds the scale, then once more after a fused multiply and add; exact weights differ by 1e-5
    source = ((length / size).double() * (torch.arange(size) + 0.5) - 0.5).to(length.dtype).clamp(min=0)
    source = torch.minimum(source, length - 1)
    below = source.floor()
    above = torch.minimum(below + 1, length - 1)
    weights = torch.zeros(len(start), size, full, dtype=length.dtype)
    weights.scatter_add_(2, (start + below).long().unsqueeze(2), (1 - (source - below)).unsqueeze(2))
    weights.scatter_add_(2, (start + above).long().unsqueeze(2), (source - below).unsqueeze(2))
    return weights.unsqueeze(1)


def draw_labels(count: int, num_classes: int, classes: ClassDraw, generator: torch.Generator) -> Tensor:
    """``[count]`` classes: each drawn by itself, or ``balanced``, none twice before all were drawn once, and so on."""
    if classes == "random":
        return torch.randint(num_classes, (count,), generator=generator)
    rounds = [torch.randperm(num_classes, generator=generator) for _ in range(-(-count // num_classes))]
    return torch.cat(rounds)[:count]


@samplers.register("whole_image")
@frozen
class WholeImageSampler:
    """One class for each image, shown by the whole of it; none where the model has no classes.

    Args:
        classes: drawn at ``random``, as published, or ``balanced``, none twice in a group before all were drawn once.
    """

    needs_classes: ClassVar[bool] = False

    classes: ClassDraw = field(default="random", validator=validators.in_(get_args(ClassDraw)), kw_only=True)

    def sample(self, count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> CropPlan:
        """A plan with one region, the whole image, for each of ``count`` images of ``size``; without classes, none."""
        if not num_classes:
            nothing = torch.zeros(0, dtype=torch.long)
            return CropPlan(boxes=nothing.view(0, 4), owners=nothing, labels=nothing, every=0)
        boxes = torch.tensor([[0, 0, *size]]).repeat(count, 1)
        labels = draw_labels(count, num_classes, self.classes, generator)
        return CropPlan(boxes=boxes, owners=torch.arange(count), labels=labels, every=0)


@samplers.register("multi_semantic", paper="arXiv:2412.16553")
@frozen
class MultiSemanticSampler:
    """Multi-semantic reinforcement (MSR): 1 to 4 disjoint patches of an image, each with a class of its own.

    Args:
        max_patches: most patches in one image (4 in the paper).
        layout: ``cells`` takes cells of a 2×2 grid; ``split`` halves the image until it has enough parts, so that the
            patches tile it (unpublished).
        jitter: how far, in sides of what is cut, a cut may lie from the middle (unpublished).
        every: forward the crops every so many iterations (unpublished).
        redraw: draw where the patches of an image are anew every so many iterations, their number and classes kept; 0
            keeps them for the whole run (unpublished).
        classes: drawn at ``random``, as published, or ``balanced``, none twice in a group before all were drawn once.
    """

    needs_classes: ClassVar[bool] = True

    max_patches: int = field(default=4, validator=[validators.ge(1), validators.le(4)])
    layout: CropLayout = field(default="cells", validator=validators.in_(get_args(CropLayout)), kw_only=True)
    jitter: float = field(default=0.1, validator=[validators.ge(0.0), validators.le(0.3)], kw_only=True)
    every: int = field(default=1, validator=validators.ge(1), kw_only=True)
    redraw: int = field(default=0, validator=validators.ge(0), kw_only=True)
    classes: ClassDraw = field(default="random", validator=validators.in_(get_args(ClassDraw)), kw_only=True)

    def sample(self, count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> CropPlan:
        """Draw a plan for ``count`` images of ``size`` pixels, ``num_classes`` classes to choose from.

        Raises:
            SpdfqError: images too small to be cut twice along each axis.
        """
        if min(size) < SMALLEST_SIDE:
            raise SpdfqError(f"sampler multi_semantic: images of {size[0]}x{size[1]} are too small; use whole_image")
        boxes: list[Box] = []
        owners: list[int] = []
        for image in range(count):
            patches = int(torch.randint(1, self.max_patches + 1, (), generator=generator))
            boxes += self._boxes(patches, size, generator)
            owners += [image] * patches
        labels = draw_labels(len(boxes), num_classes, self.classes, generator)
        return CropPlan(
            boxes=torch.tensor(boxes),
            owners=torch.tensor(owners),
            labels=labels,
            every=self.every,
            redraw=self.redraw,
        )

    def redrawn(self, plan: CropPlan, size: tuple[int, int], generator: torch.Generator) -> CropPlan:
        """A plan of `sample` with other boxes: as many in each image, of the same classes."""
        counts = torch.bincount(plan.owners).tolist()
        boxes = [box for patches in counts for box in self._boxes(patches, size, generator)]
        return evolve(plan, boxes=torch.tensor(boxes))

    def _boxes(self, patches: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        draw = self._cells if self.layout == "cells" else self._parts
        return draw(patches, size, generator)

    def _cells(self, patches: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        y, x = (self._cut(side, generator) for side in size)
        cells = [(0, 0, y, x), (0, x, y, size[1] - x), (y, 0, size[0] - y, x), (y, x, size[0] - y, size[1] - x)]
        order = torch.randperm(4, generator=generator)[:patches].tolist()
        return [cells[index] for index in sorted(order)]

    def _parts(self, patches: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        parts: list[Box] = [(0, 0, *size)]
        while len(parts) < patches:
            largest = max(range(len(parts)), key=lambda index: parts[index][2] * parts[index][3])
            parts += self._halves(parts.pop(largest), generator)
        return parts

    def _halves(self, box: Box, generator: torch.Generator) -> list[Box]:
        top, left, height, width = box
        rows_first = height > width or (height == width and bool(torch.rand((), generator=generator) < 0.5))
        cut = self._cut(height if rows_first else width, generator)
        if rows_first:
            return [(top, left, cut, width), (top + cut, left, height - cut, width)]
        return [(top, left, height, cut), (top, left + cut, height, width - cut)]

    def _cut(self, side: int, generator: torch.Generator) -> int:
        offset = (2 * float(torch.rand((), generator=generator)) - 1) * self.jitter
        return min(max(round(side * (0.5 + offset)), 1), side - 1)
