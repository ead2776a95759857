"""Total variation: how much neighbouring pixels differ."""

import math
from typing import Any

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses

# the group that the targets of PSAQ-ViT are for: 32 images of 3x224x224
_PUBLISHED_PIXELS = 32 * 3 * 224 * 224


def total_variation(images: Tensor, diagonal: float = 1.0) -> Tensor:
    """Sum of the 2-norms of the four kinds of neighbour differences, over the whole tensor.

    Horizontal, vertical and both diagonals (arXiv 2203.02250). A norm over the group, so its scale grows with the
    square root of the number of pixels.

    Args:
        images: ``[B, C, h, w]``.
        diagonal: factor of the two diagonal norms.

    Returns:
        A scalar.
    """
    images = at_least_float32(images)
    straight = (images[..., :, 1:] - images[..., :, :-1]).norm() + (images[..., 1:, :] - images[..., :-1, :]).norm()
    main = (images[..., 1:, 1:] - images[..., :-1, :-1]).norm()
    other = (images[..., 1:, :-1] - images[..., :-1, 1:]).norm()
    return straight + diagonal * (main + other)


def _range(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not 0 <= value[0] <= value[1] < math.inf:
        raise ValueError(f"expected two numbers of at least 0, the second at least the first, got {list(value)}")


def _positive(_: Any, __: Any, value: tuple[int, int, int, int]) -> None:
    if min(value) < 1:
        raise ValueError(f"expected four whole numbers from 1 up, got {list(value)}")


@losses.register("total_variation", paper="arXiv:2203.02250")
@define(kw_only=True)
class TotalVariationLoss(Loss):
    """Total variation of a group of images, a smoothness prior, or its distance from a target.

    SPDFQ and PSAQ-ViT weigh it by 0.05; PSAQ-ViT has ``target = [2500, 3000]``. SMI has ``weight = 1e-4`` and
    ``augmented = false``, MimiQ ``weight = 2.5e-5``, ``diagonal = 0.7071`` and ``augmented = false``.

    Args:
        weight: factor of this loss.
        diagonal: factor of the diagonal differences (1/√2 in MimiQ, 1 elsewhere).
        target: range that a target is drawn from once for each group, for 32 images of 3×224×224, scaled to the group's
            own pixels by the square root of their number; the loss is then the distance from the target.
        faithful: take the target as it is whatever the size, as the public code does.
        augmented: of the images as the teacher saw them, or before they were augmented.
        for_group: ``[B, C, h, w]`` of the group that ``weight`` is for. On images of another size the loss is scaled by
            the square root of the ratio of their pixels, so that it pulls as hard on a pixel; in a group of other
            length by that of the inverse ratio of images, so that it keeps its share beside losses that are means over
            the group. Left out, it is not scaled.
    """

    diagonal: float = field(default=1.0, validator=[validators.ge(0.0), validators.lt(math.inf)])
    target: tuple[float, float] | None = field(default=None, validator=validators.optional(_range))
    faithful: bool = False
    augmented: bool = True
    for_group: tuple[int, int, int, int] | None = field(default=None, validator=validators.optional(_positive))

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        return self._distance(inputs) * self._pull(inputs.images)

    def _distance(self, inputs: LossInputs) -> Tensor:
        images = inputs.images if self.augmented or inputs.originals is None else inputs.originals
        variation = total_variation(images, self.diagonal)
        return variation if self.target is None else (variation - self._target(inputs)).abs()

    def _target(self, inputs: LossInputs) -> float:
        assert self.target is not None
        low, high = self.target
        share = inputs.keep("target", lambda: torch.rand((), generator=inputs.generator("target")).item())
        scale = 1 if self.faithful else math.sqrt(inputs.images.numel() / _PUBLISHED_PIXELS)
        return scale * (low + (high - low) * share)

    def _pull(self, images: Tensor) -> float:
        if not self.for_group:
            return 1.0
        count, *size = self.for_group
        return math.sqrt(images[0].numel() / math.prod(size) * count / len(images))
