"""Samplers: which classes an image shows, and where (multi-semantic reinforcement, arXiv 2412.16553, section 3.3)."""

from typing import Any, ClassVar, Literal

import torch
from attrs import evolve, field, frozen, validators
from torch import Tensor

from spdfq.errors import ComponentError, SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.registry import samplers
from spdfq.runtime.arguments import check_generator, check_size, check_whole
from spdfq.runtime.runtime import uniform
from spdfq.synth.crops import CropLoss, CropPlan

Box = tuple[int, int, int, int]
CropLayout = Literal["cells", "split", "boxes"]
ClassDraw = Literal["random", "balanced"]
SMALLEST_SIDE = 4


@frozen
class Sampler(Checked):
    """Base class of samplers.

    A subclass defines `sample`. It also defines `redrawn` if its plans set ``CropPlan.redraw``.
    """

    needs_classes: ClassVar[bool] = True
    """Whether the crops are useless without classes. If so, a teacher without a head is refused."""

    several_classes: ClassVar[bool] = False
    """Whether an image may show several classes. Such images are known to need soft labels."""

    def sample(self, count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> CropPlan:
        """Draw the crops of a group.

        Args:
            count: number of images.
            size: height and width of the images in pixels.
            num_classes: number of classes to draw from; 0 if the teacher has no head.
            generator: CPU generator. The plan must depend on the arguments and on nothing else.

        Raises:
            SpdfqError: an argument of another type or out of range.
        """
        raise ComponentError(f"{type(self).__name__} does not define sample")

    def redrawn(self, plan: CropPlan, size: tuple[int, int], generator: torch.Generator) -> CropPlan:
        """The same plan with other boxes. The number of crops of each image and their classes must stay."""
        raise ComponentError(f"{type(self).__name__} does not define redrawn")


def _check(count: int, size: tuple[int, int], generator: torch.Generator) -> None:
    check_whole("count", count, 1)
    check_size("size", size)
    check_generator(generator)


def draw_labels(count: int, num_classes: int, classes: ClassDraw, generator: torch.Generator) -> Tensor:
    """Draw ``[count]`` class indices.

    ``random`` draws each one independently. ``balanced`` draws every class once before it draws any class again.

    Raises:
        SpdfqError: there are no classes.
    """
    check_whole("num_classes", num_classes, 1)
    if classes == "random":
        return torch.randint(num_classes, (count,), generator=generator, device="cpu")
    rounds = range(-(-count // num_classes))
    drawn = [torch.randperm(num_classes, generator=generator, device="cpu") for _ in rounds]
    return torch.cat(drawn)[:count]


@samplers.register("whole_image")
@frozen
class WholeImageSampler(Sampler):
    """One class for each image, shown by the whole image; no class if the model has no classes.

    Args:
        classes: ``random`` draws each class independently, as published; ``balanced`` uses every class once in a group
            before it repeats any.
    """

    needs_classes: ClassVar[bool] = False

    classes: ClassDraw = field(default="random", kw_only=True)

    def sample(self, count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> CropPlan:
        """A plan with one crop, the whole image, for each image; an empty plan if there are no classes."""
        _check(count, size, generator)
        check_whole("num_classes", num_classes, 0)
        if not num_classes:
            nothing = torch.zeros(0, dtype=torch.long, device="cpu")
            return CropPlan(boxes=nothing.reshape(0, 4), owners=nothing, labels=nothing, every=0)
        boxes = torch.tensor([[0, 0, *size]], device="cpu").repeat(count, 1)
        labels = draw_labels(count, num_classes, self.classes, generator)
        return CropPlan(boxes=boxes, owners=torch.arange(count, device="cpu"), labels=labels, every=0)


def _area(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(f"expected two shares above 0 and at most 1, the second at least the first, got {list(value)}")


@samplers.register("multi_semantic", paper="arXiv:2412.16553")
@frozen
class MultiSemanticSampler(Sampler):
    """Multi-semantic reinforcement (MSR): 1 to 4 crops of each image, each with its own class; disjoint as published.

    Args:
        max_patches: largest number of crops in one image (4 in the paper).
        layout: ``cells`` takes cells of a 2×2 grid; ``split`` halves the image until it has enough parts, so that the
            crops cover it (unpublished). ``boxes`` takes boxes anywhere, which may overlap (as in arXiv 2511.15411).
        jitter: how far a cut may lie from the middle, as a share of the side that is cut (unpublished).
        area: range of a box's share of the image's area, with ``layout = "boxes"`` and only then (0.4 to 0.7 in arXiv
            2511.15411). A box has the aspect of the image.
        every: interval, in iterations, at which the crops are forwarded (unpublished).
        redraw: interval, in iterations, at which new boxes are drawn; the crops of an image keep their classes;
            0 keeps the boxes for the whole run (unpublished).
        classes: ``random`` draws each class independently, as published; ``balanced`` uses every class once in a group
            before it repeats any.
        crop_loss: what counts as much as the whole image: the crops of an image together (``mean``), or each (``sum``)
            (unpublished).
    """

    several_classes: ClassVar[bool] = True

    max_patches: int = field(default=4, validator=[validators.ge(1), validators.le(4)])
    layout: CropLayout = field(default="cells", kw_only=True)
    jitter: float = field(default=0.1, validator=[validators.ge(0.0), validators.le(0.3)], kw_only=True)
    every: int = field(default=1, validator=validators.ge(1), kw_only=True)
    redraw: int = field(default=0, validator=validators.ge(0), kw_only=True)
    classes: ClassDraw = field(default="random", kw_only=True)
    area: tuple[float, float] | None = field(default=None, validator=validators.optional(_area), kw_only=True)
    crop_loss: CropLoss = field(default="mean", kw_only=True)

    def __attrs_post_init__(self) -> None:
        if (self.layout == "boxes") != (self.area is not None):
            raise ValueError(
                "area is the size of layout = 'boxes': give both, for example area = [0.4, 0.7], or neither"
            )

    def sample(self, count: int, size: tuple[int, int], num_classes: int, generator: torch.Generator) -> CropPlan:
        """Draw the crops of a group; see `Sampler.sample`.

        Raises:
            SpdfqError: the images are too small to be cut twice along each axis, or there are no classes.
        """
        _check(count, size, generator)
        if min(size) < SMALLEST_SIDE:
            raise SpdfqError(f"sampler multi_semantic: images of {size[0]}x{size[1]} are too small; use whole_image")
        boxes: list[Box] = []
        owners: list[int] = []
        for image in range(count):
            crops = int(torch.randint(1, self.max_patches + 1, (), generator=generator, device="cpu"))
            boxes += self._boxes(crops, size, generator)
            owners += [image] * crops
        labels = draw_labels(len(boxes), num_classes, self.classes, generator)
        return CropPlan(
            boxes=torch.tensor(boxes, device="cpu"),
            owners=torch.tensor(owners, device="cpu"),
            labels=labels,
            every=self.every,
            redraw=self.redraw,
            crop_loss=self.crop_loss,
        )

    def redrawn(self, plan: CropPlan, size: tuple[int, int], generator: torch.Generator) -> CropPlan:
        """The same plan with other boxes; see `Sampler.redrawn`."""
        check_size("size", size)
        check_generator(generator)
        counts = torch.bincount(plan.owners).tolist()
        boxes = [box for crops in counts for box in self._boxes(crops, size, generator)]
        return evolve(plan, boxes=torch.tensor(boxes, device="cpu"))

    def _boxes(self, crops: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        draws = {"cells": self._cells, "split": self._parts, "boxes": self._anywhere}
        return draws[self.layout](crops, size, generator)

    def _anywhere(self, crops: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        """Boxes at uniform positions."""
        assert self.area is not None
        low, high = self.area
        boxes: list[Box] = []
        for share, down, right in uniform(generator, crops, 3).tolist():
            scale = (low + (high - low) * share) ** 0.5
            height, width = (max(1, round(side * scale)) for side in size)
            boxes.append((int(down * (size[0] - height + 1)), int(right * (size[1] - width + 1)), height, width))
        return boxes

    def _cells(self, crops: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        """Some cells of a 2×2 grid."""
        y, x = (self._cut(side, generator) for side in size)
        cells = [(0, 0, y, x), (0, x, y, size[1] - x), (y, 0, size[0] - y, x), (y, x, size[0] - y, size[1] - x)]
        order = torch.randperm(4, generator=generator, device="cpu")[:crops].tolist()
        return [cells[index] for index in sorted(order)]

    def _parts(self, crops: int, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        """The image, halved again and again: always the largest part is cut."""
        parts: list[Box] = [(0, 0, *size)]
        while len(parts) < crops:
            largest = max(range(len(parts)), key=lambda index: parts[index][2] * parts[index][3])
            parts += self._halves(parts.pop(largest), generator)
        return parts

    def _halves(self, box: Box, generator: torch.Generator) -> list[Box]:
        """A box cut across its longer side; a square is cut either way."""
        top, left, height, width = box
        cut_rows = height > width or (height == width and bool(uniform(generator) < 0.5))
        cut = self._cut(height if cut_rows else width, generator)
        if cut_rows:
            return [(top, left, cut, width), (top + cut, left, height - cut, width)]
        return [(top, left, height, cut), (top, left + cut, height, width - cut)]

    def _cut(self, side: int, generator: torch.Generator) -> int:
        """Where to cut a side: near its middle, and never at its ends."""
        offset = (2 * float(uniform(generator)) - 1) * self.jitter
        return min(max(round(side * (0.5 + offset)), 1), side - 1)
