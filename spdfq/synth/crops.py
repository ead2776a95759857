"""The labelled crops of a group of images, and how they are cut out and resized."""

from typing import Literal

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.runtime.arguments import check_size, check_tensor, check_whole

Size = tuple[int, int]
CropLoss = Literal["mean", "sum"]


@define(eq=False, kw_only=True)
class CropPlan(Checked):
    """Where the labelled crops of a group of images lie.

    Args:
        boxes: ``[crops, 4]`` top, left, height and width in pixels.
        owners: ``[crops]`` index of the image that each crop is cut from.
        labels: ``[crops]`` class of each crop.
        every: interval, in iterations, at which the teacher sees the crops; 0 means never.
        redraw: interval, in iterations, at which the boxes are drawn again; 0 means never.
        crop_loss: what counts as much as the whole image: the crops of an image together (``mean``), or each (``sum``).

    Raises:
        SpdfqError: tensors of another shape, or of different lengths.
    """

    boxes: Tensor
    owners: Tensor
    labels: Tensor
    every: int = 1
    redraw: int = 0
    crop_loss: CropLoss = "mean"
    _placed: dict = field(factory=dict, init=False, repr=False)
    _matrices: dict = field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        check_tensor("owners", self.owners, "crops")
        check_tensor("labels", self.labels, "crops")
        if self.owners.dtype != torch.long or self.labels.dtype != torch.long:
            raise SpdfqError(f"owners and labels must be int64, got {self.owners.dtype} and {self.labels.dtype}")
        lengths = len(self.owners), len(self.labels)
        if self.boxes.shape != (lengths[0], 4) or len(set(lengths)) > 1:
            found = f"{list(self.boxes.shape)}, {lengths[0]} owners and {lengths[1]} labels"
            raise SpdfqError(f"boxes must be [crops, 4], with an owner and a label for each crop, got {found}")

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

        Raises:
            SpdfqError: images of another shape, fewer images than the plan has, or a box that is empty or outside the
                images.
        """
        check_tensor("images", images, "B, C, H, W")
        check_size("size", size)
        owners, rows, columns = self._resize_to(images, size)
        # index_select instead of images[owners]: faster, and its gradient is summed in a fixed order
        return rows @ images.index_select(0, owners) @ columns.mT

    def place(self, images: Tensor, size: Size) -> None:
        """Copy what `views` needs to where the images are, so that it copies nothing; their values are not read.

        Args and errors are those of `views`.
        """
        key = _kind(images, size)
        if key in self._placed:
            return
        self._check_owners(len(images))
        start, sides, full = self.boxes[:, :2], self.boxes[:, 2:], tuple(images.shape[-2:])
        beyond = start + sides > torch.tensor(full, device=start.device)
        if bool(((start < 0) | (sides < 1) | beyond).any()):
            raise SpdfqError(f"a box of the plan is empty or outside the images of {full[0]}x{full[1]}")
        exact, device = torch.promote_types(images.dtype, torch.float32), images.device
        axes = zip(start.to(exact).T, sides.to(exact).T, size, strict=True)
        positions = [[x.to(device) for x in _positions(*axis)] for axis in axes]
        self._placed[key] = self.owners.to(device), positions

    def view_classes(self, count: int) -> list[list[int]]:
        """The classes of each view, for `Target.sample`: of the images first, then of the crops.

        Args:
            count: B, number of images. An image shows the classes of all its crops.
        """
        self._check_owners(count)
        pairs = list(zip(self.owners.tolist(), self.labels.tolist(), strict=True))
        whole = [sorted({label for owner, label in pairs if owner == image}) for image in range(count)]
        return whole + [[label] for _, label in pairs]

    def view_weights(self, count: int) -> Tensor:
        """``[B+M]`` the weight of each view in label losses: 1/B for an image, 1/(B m) for each of its m crops.

        With ``crop_loss = "sum"`` it is 1/B for all views.

        Args:
            count: B, number of images.
        """
        self._check_owners(count)
        if self.crop_loss == "sum":
            return torch.full((count + len(self.owners),), 1 / count, dtype=torch.float32, device="cpu")
        crops = torch.bincount(self.owners, minlength=count)[self.owners]
        return torch.cat([torch.ones(count, dtype=torch.float32, device="cpu"), 1 / crops.float()]) / count

    def _check_owners(self, count: int) -> None:
        check_whole("count", count, 1)
        if len(self.owners) and not 0 <= int(self.owners.min()) <= int(self.owners.max()) < count:
            raise SpdfqError(f"there are {count} images, but the plan has a crop of image {int(self.owners.max())}")

    def _resize_to(self, images: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Owners, and the matrices that resize rows and columns; computed once for each kind of image."""
        key = _kind(images, size)
        if key not in self._matrices:
            self.place(images, size)
            owners, positions = self._placed[key]
            rows, columns = (
                _resize_matrices(axis, full).to(images.dtype)
                for axis, full in zip(positions, images.shape[-2:], strict=True)
            )
            self._matrices[key] = owners, rows, columns
        return self._matrices[key]


def _kind(images: Tensor, size: Size) -> tuple:
    return tuple(images.shape[-2:]), size, images.device, images.dtype


def _positions(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the output rows lie in the input: the rows below and above each, and the share of the one above.

    Args:
        start: ``[crops]`` first input row of each box.
        length: ``[crops]`` its number of rows.
        size: number of output rows.

    Returns:
        ``[crops, size]`` each.
    """
    start, length = rearrange(start, "crops -> crops 1"), rearrange(length, "crops -> crops 1")
    # `interpolate` rounds the scale, then rounds again after a fused multiply-add; exact weights differ by 1e-5
    centres = torch.arange(size, dtype=torch.float64, device=length.device) + 0.5
    source = ((length / size).double() * centres - 0.5).to(length.dtype).clamp(min=0)
    source = torch.minimum(source, length - 1)
    below = source.floor()
    above = torch.minimum(below + 1, length - 1)
    return (start + below).long(), (start + above).long(), source - below


def _resize_matrices(positions: tuple[Tensor, Tensor, Tensor], full: int) -> Tensor:
    """``[crops, 1, size, full]``: bilinear weights of each output row over the input rows; see `_positions`."""
    below, above, share = positions
    weights = torch.zeros(*share.shape, full, dtype=share.dtype, device=share.device)
    weights.scatter_add_(2, below.unsqueeze(2), (1 - share).unsqueeze(2))
    weights.scatter_add_(2, above.unsqueeze(2), share.unsqueeze(2))
    return rearrange(weights, "crops size full -> crops 1 size full")
