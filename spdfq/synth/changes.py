"""What an augmentation does to the images of one iteration, and what maps on the token grid do with it."""

from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.losses.frequency import frequency_split
from spdfq.synth.samplers import CropPlan

CROPS_ARE_NOT_FOLLOWED = (
    "synthesis.augmentations: neither attention priors nor token pruning can follow random_resized_crop; leave it out, "
    "or set follow = false for the prior"
)


@frozen(kw_only=True)
class Moment:
    """When an augmentation is drawn, and for what.

    Args:
        iteration: counted from 0.
        iterations: of the whole run.
        count: B, how many images.
        size: their ``(C, h, w)``.
    """

    iteration: int = 0
    iterations: int = 1
    count: int = 1
    size: tuple[int, int, int] = (3, 224, 224)

    def stage(self, stages: int) -> int:
        """Which of so many equal stages of the run this is, counted from 0."""
        return self.iteration * stages // self.iterations


@frozen
class Change:
    """Base class of what an augmentation drew; alone it changes nothing."""

    def apply(self, images: Tensor) -> Tensor:
        """The changed images ``[B, C, h, w]``, differentiable."""
        return images

    def follow(self, maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
        """Maps ``[B, H, *grid]`` on the token grid, gone along with images of ``size`` pixels.

        Between tokens they are interpolated, or rounded to the ``nearest`` token.
        """
        return maps


@frozen(kw_only=True)
class Move(Change):
    """Mirrored, then rolled.

    Args:
        flip: mirrored left to right, all images or each by itself.
        shift: rows and columns rolled by, in pixels.
    """

    flip: bool | tuple[bool, ...] = False
    shift: tuple[int, int] = (0, 0)

    def apply(self, images: Tensor) -> Tensor:
        """The moved images ``[B, C, h, w]``."""
        images = self._mirrored(images)
        return images if self.shift == (0, 0) else images.roll(self.shift, (-2, -1))

    def follow(self, maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
        """Maps ``[B, H, *grid]`` mirrored and rolled like the images; see `Change.follow`."""
        maps = self._mirrored(maps)
        for axis in (-2, -1):
            tokens = self.shift[axis] * maps.shape[axis] / size[axis]
            tokens = round(tokens) if nearest else tokens
            whole = int(tokens // 1)
            part = tokens - whole
            maps = maps.roll(whole, axis) if whole else maps
            maps = (1 - part) * maps + part * maps.roll(1, axis) if part else maps
        return maps

    def _mirrored(self, x: Tensor) -> Tensor:
        if isinstance(self.flip, bool):
            return x.flip(-1) if self.flip else x
        chosen = torch.tensor(self.flip).view(-1, 1, 1, 1).to(x.device)
        return torch.where(chosen, x.flip(-1), x)


@frozen(kw_only=True, eq=False)
class Affine(Change):
    """Each channel of each image scaled, then shifted; in normalised pixel units.

    Args:
        scale: ``[B, C]``.
        offset: ``[B, C]``.
    """

    scale: Tensor
    offset: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """The changed images."""
        scale, offset = (part[:, :, None, None].to(images) for part in (self.scale, self.offset))
        return images * scale + offset


@frozen(kw_only=True, eq=False)
class Crop(Change):
    """One box of each image, resized to the whole; nothing on the token grid can follow it.

    Args:
        boxes: ``[B, 4]`` top, left, height, width in pixels.
    """

    boxes: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """The boxes, resized bilinearly."""
        nobody = torch.zeros(len(self.boxes), dtype=torch.long)
        plan = CropPlan(boxes=self.boxes, owners=torch.arange(len(self.boxes)), labels=nobody)
        return plan.views(images, (images.shape[-2], images.shape[-1]))

    def follow(self, maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
        """Refused: see the class."""
        raise SpdfqError(CROPS_ARE_NOT_FOLLOWED)


@frozen(kw_only=True)
class Frequencies(Change):
    """Only the low or the high frequencies of the images; their mean stays.

    Args:
        radius: where the one ends and the other begins, as a share of the highest frequency along an axis.
        keep: which of them.
    """

    radius: float
    keep: Literal["low", "high"]

    def apply(self, images: Tensor) -> Tensor:
        """The filtered images."""
        low, high = frequency_split(images, self.radius)
        return (low if self.keep == "low" else high + images.mean((-2, -1), keepdim=True)).to(images.dtype)


def follow_all(changes: tuple[Change, ...], maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
    """Maps ``[B, H, *grid]`` after all changes in order."""
    for change in changes:
        maps = change.follow(maps, size, nearest)
    return maps


def apply_all(changes: tuple[Change, ...], images: Tensor) -> Tensor:
    """Images after all changes in order."""
    for change in changes:
        images = change.apply(images)
    return images
