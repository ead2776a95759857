"""From an image to a model's input, as timm does it for evaluation, in Pillow and NumPy."""

import math
from numbers import Real
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image, ImageOps

from spdfq.errors import DataError, shown
from spdfq.inference.pixels import MODES, converted

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
LARGEST_CROP = 2
"""The largest share of an image that a crop may keep; timm's largest is 1.15."""


@frozen(kw_only=True)
class Preprocessing:
    """Converts a PIL image to the model's channels, resizes, crops and normalises it.

    Args:
        size: height and width of the model's input.
        channels: of the model's input, 1 to 4.
        mean: of each channel, for pixels in 0..1.
        std: of each channel, for pixels in 0..1.
        interpolation: of the resize: one of `INTERPOLATIONS`.
        crop_pct: share of the image that the crop keeps.
        crop_mode: ``center`` keeps the proportions and cuts the longer side; ``squash`` does not keep them;
            ``border`` keeps them and fills the shorter side with the mean.

    Raises:
        DataError: a value that cannot be right; the message begins with the field.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __attrs_post_init__(self) -> None:
        pair = isinstance(self.size, (tuple, list)) and len(self.size) == 2
        _check("size", self.size, pair and all(map(_is_whole, self.size)), "height and width")
        kinds = "1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA), as image files give them"
        _check("channels", self.channels, type(self.channels) is int and self.channels in MODES, kinds)
        for key, values in (("mean", self.mean), ("std", self.std)):
            listed = isinstance(values, (tuple, list)) and len(values) == self.channels and all(map(_is_real, values))
            positive = listed and (key == "mean" or min(values) > 0)
            above = " above 0" if key == "std" else ""
            _check(key, values, positive, f"a number{above} for each of the {self.channels} channels")
        for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            _check(key, getattr(self, key), getattr(self, key) in known, f"one of {', '.join(known)}")
        share = _is_real(self.crop_pct) and 0 < self.crop_pct <= LARGEST_CROP
        _check("crop_pct", self.crop_pct, share, "a share such as 0.875")

    def __call__(self, image: Any) -> NDArray[np.float32]:
        """The model's input for a PIL image, ``[C, H, W]``.

        Raises:
            DataError: not a PIL image, or pixels that the model cannot take.
        """
        cropped = self._cropped(converted(image, MODES[self.channels]))
        pixels = np.asarray(cropped, np.float32).reshape(*self.size, self.channels) / 255
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def _cropped(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to the size; the arithmetic of timm and torchvision."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        fill: tuple[int, ...] = (0,) * self.channels
        if self.crop_mode == "squash":
            scaled = height, width
        elif self.crop_mode == "border":
            scaled = _in_proportion(image, max(image.height / height, image.width / width))
            fill = tuple(round(255 * value) for value in self.mean)
        elif height == width:
            scaled = _shortest_side(image, height)
        else:
            scaled = _in_proportion(image, min(image.height / height, image.width / width))
        return _centre(self._resized(image, scaled), self.size, fill)

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        if (image.height, image.width) == size:
            return image
        return image.resize(size[::-1], Image.Resampling[self.interpolation.upper()])


def _in_proportion(image: Image.Image, ratio: float) -> tuple[int, int]:
    return round(image.height / ratio), round(image.width / ratio)


def _shortest_side(image: Image.Image, side: int) -> tuple[int, int]:
    if image.width <= image.height:
        return int(side * image.height / image.width), side
    return side, int(side * image.width / image.height)


def _centre(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    """The centre of an image, with a border where it is smaller."""
    height, width = size
    across, down = max(width - image.width, 0), max(height - image.height, 0)
    if across or down:
        border = (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2)
        image = ImageOps.expand(image, border, fill[0] if len(fill) == 1 else fill)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _is_whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check(key: str, value: Any, right: bool, wanted: str) -> None:
    if not right:
        raise DataError(f"{key}: expected {wanted}, got {shown(value)}")
