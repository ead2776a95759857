"""Total variation: how much neighbouring pixels differ."""

from attrs import define
from torch import Tensor

from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses


def total_variation(images: Tensor) -> Tensor:
    """Sum of the 2-norms of the four kinds of neighbour differences, over the whole tensor.

    Horizontal, vertical and both diagonals (arXiv 2203.02250). A norm over the group, so its scale grows with the
    square root of the number of pixels.

    Args:
        images: ``[B, C, h, w]``.

    Returns:
        A scalar.
    """
    images = at_least_float32(images)
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    norms = [difference.norm() for difference in differences]
    return norms[0] + norms[1] + norms[2] + norms[3]


@losses.register("total_variation", paper="arXiv:2203.02250")
@define(kw_only=True)
class TotalVariationLoss(Loss):
    """Total variation of a group of images, a smoothness prior (weight 0.05 in SPDFQ).

    Args:
        weight: factor of this loss.
    """

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        return total_variation(inputs.images)
