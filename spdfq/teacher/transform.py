"""From an image file's pixels to a teacher's input."""

from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch import Tensor

from spdfq.inference.pixels import converted


@frozen
class ImageTransform:
    """Converts a PIL image to the model's channels, then resizes, crops and normalises it as timm does for evaluation.

    Args:
        mode: Pillow's mode of the model's channels.
        steps: timm's transform.
    """

    mode: str
    steps: Callable[[Any], Tensor]

    def __call__(self, image: Any) -> Tensor:
        """The normalised image ``[C, H, W]``.

        Raises:
            DataError: not a PIL image, or one that does not say which value is white, or has no alpha channel for a
                model that takes one.
        """
        return self.steps(converted(image, self.mode))
