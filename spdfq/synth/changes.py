"""What an augmentation does to the images of one iteration, and to maps on their token grid."""

from typing import Literal

import torch
from attrs import evolve, field, frozen, validators
from einops import rearrange
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.losses.frequency import frequency_split
from spdfq.recipe.structure import Checked
from spdfq.runtime.arguments import check_tensor
from spdfq.synth.crops import CropPlan


@frozen(kw_only=True)
class Moment(Checked):
    """When an augmentation is drawn, and for which images.

    Args:
        iteration: counted from 0.
        iterations: number of iterations of the whole run.
        count: B, number of images.
        size: ``(C, h, w)`` of an image.

    Raises:
        SpdfqError: a number out of range, or an iteration that is not one of ``iterations``.
    """

    iteration: int = field(default=0, validator=validators.ge(0))
    iterations: int = field(default=1, validator=validators.ge(1))
    count: int = field(default=1, validator=validators.ge(1))
    size: tuple[int, int, int] = (3, 224, 224)

    def __attrs_post_init__(self) -> None:
        if self.iteration >= self.iterations:
            raise ValueError(f"iteration is {self.iteration}, but there are {self.iterations}; give iterations too")

    def stage(self, stages: int) -> int:
        """Index of the current stage if the run is divided into this many stages of equal length."""
        return self.iteration * stages // self.iterations


@frozen
class Change(Checked):
    """Base class of what an augmentation drew. The base class itself changes nothing."""

    def apply(self, images: Tensor) -> Tensor:
        """The changed images ``[B, C, h, w]``, differentiable.

        Raises:
            SpdfqError: images of another shape, or another number of them than the change was drawn for.
        """
        return images

    def placed(self, images: Tensor) -> "Change":
        """The same change, with what it needs where the images are, so that `apply` copies nothing.

        Args:
            images: ``[B, C, h, w]``; their values are not read.
        """
        return self

    def follow(self, maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
        """Move maps on the token grid the way `apply` moves the images.

        Args:
            maps: ``[B, heads, *grid]``.
            size: height and width of the images in pixels.
            nearest: round movements to whole tokens instead of interpolating between tokens.

        Returns:
            Maps of the same shape.
        """
        return maps


@frozen(kw_only=True)
class Move(Change):
    """Images mirrored, then rolled.

    Args:
        flip: whether to mirror left to right: one answer for all images, or one for each, also as ``[B]`` boolean.
        shift: rows and columns to roll by, in pixels.
    """

    flip: bool | tuple[bool, ...] | Tensor = False
    shift: tuple[int, int] = (0, 0)

    def apply(self, images: Tensor) -> Tensor:
        """The moved images ``[B, C, h, w]``."""
        _check_images(images, None if isinstance(self.flip, bool) else len(self.flip))
        images = self._mirrored(images)
        return images if self.shift == (0, 0) else images.roll(self.shift, (-2, -1))

    def placed(self, images: Tensor) -> "Move":
        """The same movement, with the answers for each image where the images are."""
        if isinstance(self.flip, bool):
            return self
        return evolve(self, flip=torch.as_tensor(self.flip, device=images.device))

    def follow(self, maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
        """Maps mirrored and rolled like the images; see `Change.follow`."""
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
        chosen = rearrange(torch.as_tensor(self.flip, device=x.device), "b -> b 1 1 1")
        return torch.where(chosen, x.flip(-1), x)


@frozen(kw_only=True, eq=False)
class Affine(Change):
    """Each channel of each image multiplied by a scale, then shifted by an offset.

    Args:
        scale: ``[B, C]``.
        offset: ``[B, C]``, in normalised pixel units.
    """

    scale: Tensor
    offset: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """The changed images ``[B, C, h, w]``."""
        _check_images(images, len(self.scale))
        if self.scale.shape != images.shape[:2]:
            raise SpdfqError(f"this change was drawn for {self.scale.shape[1]} channels, not for {images.shape[1]}")
        scale, offset = (rearrange(part, "b c -> b c 1 1").to(images) for part in (self.scale, self.offset))
        return images * scale + offset

    def placed(self, images: Tensor) -> "Affine":
        """The same change, with its tensors where the images are."""
        return evolve(self, scale=self.scale.to(images), offset=self.offset.to(images))


@frozen(kw_only=True, eq=False)
class Crop(Change):
    """One box of each image, resized to the full size. Maps on the token grid cannot follow it.

    Args:
        boxes: ``[B, 4]`` top, left, height and width in pixels.
    """

    boxes: Tensor
    _plan: CropPlan = field(init=False, repr=False)

    @_plan.default
    def _one_for_each(self) -> CropPlan:
        no_labels = self.boxes.new_zeros(len(self.boxes))
        owners = torch.arange(len(self.boxes), device=self.boxes.device)
        return CropPlan(boxes=self.boxes, owners=owners, labels=no_labels)

    def apply(self, images: Tensor) -> Tensor:
        """The boxes, resized bilinearly to ``[B, C, h, w]``."""
        _check_images(images, len(self.boxes))
        return self._plan.views(images, (images.shape[-2], images.shape[-1]))

    def placed(self, images: Tensor) -> "Crop":
        """The same boxes, and where their pixels lie, where the images are."""
        self._plan.place(images, (images.shape[-2], images.shape[-1]))
        return self

    def follow(self, maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
        """Always raises SpdfqError: most tokens of a crop are not tokens of the whole image."""
        raise SpdfqError("synthesis.augmentations: maps on the token grid cannot follow a crop; leave the crop out")


@frozen(kw_only=True)
class Frequencies(Change):
    """Only the low or only the high frequencies of the images; the mean of each channel stays.

    Args:
        radius: where low frequencies end, as a share of the highest frequency along an axis.
        keep: which side to keep.
    """

    radius: float
    keep: Literal["low", "high"]

    def apply(self, images: Tensor) -> Tensor:
        """The filtered images ``[B, C, h, w]``."""
        low, high = frequency_split(images, self.radius)
        return (low if self.keep == "low" else high + images.mean((-2, -1), keepdim=True)).to(images.dtype)


def _check_images(images: Tensor, count: int | None) -> None:
    """Refuse images of another shape or number than a change was drawn for; ``None`` fits any number."""
    check_tensor("images", images, "B, C, h, w")
    if count is not None and len(images) != count:
        raise SpdfqError(f"this change was drawn for {count} images, not for {len(images)}; give Moment their count")


def apply_all(changes: tuple[Change, ...], images: Tensor) -> Tensor:
    """Apply all changes in order to images ``[B, C, h, w]``."""
    for change in changes:
        images = change.apply(images)
    return images


def follow_all(changes: tuple[Change, ...], maps: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
    """Move maps ``[B, heads, *grid]`` along with all changes in order; see `Change.follow`."""
    for change in changes:
        maps = change.follow(maps, size, nearest)
    return maps
