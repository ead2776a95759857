"""A loss of one's own, registered through the entry-point group ``spdfq.components``."""

from attrs import define
from torch import Tensor

from spdfq.losses import Loss, LossInputs
from spdfq.registry import losses


@losses.register("brightness")
@define(kw_only=True)
class BrightnessLoss(Loss):
    """Mean squared distance of the images to one brightness.

    Args:
        weight: factor of this loss.
        level: brightness aimed at, in normalised pixel units.
    """

    level: float = 0.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        return (inputs.images - self.level).square().mean()
