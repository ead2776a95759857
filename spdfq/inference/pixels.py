"""Images of all kinds as images of 8 bits with the channels that a model takes."""

from typing import Any

import numpy as np
from PIL import Image

from spdfq.errors import DataError, shown

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's modes of 8 bits, by the channels of a model."""


def converted(image: Any, mode: str) -> Image.Image:
    """An image in one of the `MODES`.

    Raises:
        DataError: not a PIL image, or one that does not say which value is white, or has no alpha channel for a mode
            that has one.
    """
    if not isinstance(image, Image.Image):
        raise DataError(f"expected a PIL image, got {shown(image)}; open it with PIL.Image.open(path)")
    if image.format == "PNG" and image.mode.startswith("I"):  # 16 bits, and 65,535 is white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255
        raise DataError(f"{image.mode} pixels instead of 8 bits per channel; convert it first")
    if mode.endswith("A") and not image.has_transparency_data:
        raise DataError(f"no alpha channel, but the model takes {len(mode)} channels: {mode}")
    return image.convert(mode)
