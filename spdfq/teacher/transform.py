"""From an image file's pixels to a teacher's input."""

from collections.abc import Callable
from typing import Any

from attrs import frozen
from torch import Tensor

from spdfq.errors import DataError, shown

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's modes of 8 bits, by the channels of a model."""


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
        import numpy as np
        from PIL import Image

        if not isinstance(image, Image.Image):
            raise DataError(f"expected a PIL image, got {shown(image)}; open it with PIL.Image.open(path)")
        if image.format == "PNG" and image.mode.startswith("I"):  # 16 bits, and 65,535 is white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255
            raise DataError(f"{image.mode} pixels instead of 8 bits per channel; convert it first")
        if self.mode.endswith("A") and not image.has_transparency_data:
            raise DataError(f"no alpha channel, but the model takes {len(self.mode)} channels: {self.mode}")
        return self.steps(image.convert(self.mode))
