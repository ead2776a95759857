"""A picture with a row of images for each of several runs, to compare methods at a glance."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from spdfq.errors import DataError, writing
from spdfq.report.pictures import INK, save_png, to_bytes, to_rgb

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 96
_GUTTER = 3
_MARGIN = 14
_COUNT = 8


def check_sheet(path: Path) -> None:
    """Raise a DataError if a sheet cannot be written to this path: wrong suffix, no such folder, or a folder."""
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise DataError(f"{path}: the sheet is a .png file in a folder that exists")
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def write_sheet(path: Path, rows: Sequence[tuple[str, "Tensor"]]) -> None:
    """Write a PNG with a row for each run: its name and its first eight images.

    The background is transparent and the text grey, so that it is readable on light and dark pages.

    Args:
        path: a ``.png`` file.
        rows: for each run its name, and pixels ``[n, C, h, w]`` in 0..1; three channels are shown as RGB, others as
            grey.

    Raises:
        DataError: wrong suffix, no such folder, no rows, or a file that cannot be written.
    """
    check_sheet(path)
    if not rows:
        raise DataError(f"{path}: there is no run to show")
    sheet = _sheet([name for name, _ in rows], [_tiles(pixels[:_COUNT]) for _, pixels in rows])
    save_png(path, sheet)


def _sheet(names: list[str], tiles: list[list[Image.Image]]) -> Image.Image:
    font = ImageFont.load_default(size=16)
    labels = _MARGIN + max(int(font.getlength(name)) for name in names)
    step = _TILE + _GUTTER
    size = (labels + step * max(map(len, tiles)) - _GUTTER, step * len(tiles) - _GUTTER)
    sheet = Image.new("RGBA", size)
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(zip(names, tiles, strict=True)):
        draw.text((0, row * step + _TILE / 2), name, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            left, top = labels + column * step, row * step
            sheet.paste(picture, (left + (_TILE - picture.width) // 2, top + (_TILE - picture.height) // 2))
    return sheet


def _tiles(pixels: "Tensor") -> list[Image.Image]:
    """Images scaled to the size of a tile in their own proportions; small images are enlarged without smoothing."""
    found = []
    for picture in to_bytes(pixels):
        image = Image.fromarray(to_rgb(picture))
        scale = _TILE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        found.append(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS))
    return found
