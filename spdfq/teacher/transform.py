"""From an image file's pixels to a teacher's input."""

from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch import Tensor

from spdfq.errors import DataError, shown


@frozen
class ImageTransform:
    """Converts a PIL image to the model's channels, then resizes, crops and normalises it as timm does for evaluation.

    Args:
        mode: Pillow's mode of the model's channels, ``L`` or ``RGB``.
        steps: timm's transform.
    """

    mode: str
    steps: Callable[[Any], Tensor]

    def __call__(self, image: Any) -> Tensor:
        """The normalised image ``[C, H, W]``.

        Raises:
            DataError: not a PIL image, or one with more than 8 bits per channel.
        """
        from PIL.Image import Image

        if not isinstance(image, Image):
            raise DataError(f"expected a PIL image, got {shown(image)}; open it with PIL.Image.open(path)")
        if image.mode.startswith(("I", "F")):  # their range is unknown, and Pillow would clip them at 255
            raise DataError(f"{image.mode} pixels instead of 8 bits per channel; convert it first")
        return self.steps(image.convert(self.mode))
