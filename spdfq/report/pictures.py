"""PNG pictures of the calibration images and of their attention, and a CSV file of the losses."""

import csv
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

    from spdfq.synth.base import SyntheticImages
    from spdfq.teacher import Teacher

Array = np.ndarray[Any, Any]

SHOWN = 64
_COLUMNS = 8
_TILE = 112
_GUTTER = 3
_GAP = 28
_LABELS = 76
_LINE = 26
INK = (124, 124, 130, 255)

# from deep blue to pale yellow, in steps of 10 to 12 units of CIE lightness
_HEAT = np.array(
    [
        (13, 3, 74),
        (57, 8, 106),
        (109, 14, 121),
        (162, 26, 116),
        (208, 57, 96),
        (244, 96, 64),
        (251, 153, 71),
        (252, 202, 110),
        (254, 247, 145),
    ]
)


def write_pictures(folder: Path, images: "SyntheticImages", teacher: "Teacher") -> list[str]:
    """Write ``synthetic.png``, and ``attention.png`` and ``losses.csv`` for images that have attention maps and losses.

    Args:
        folder: an existing folder; older files of these names are replaced or removed.
        images: images ``[n, C, H, W]``, normalised for the teacher; three channels are shown as RGB, others as grey.
        teacher: its mean and standard deviation convert the images to pixels.

    Returns:
        Names of the files written.
    """
    for name in ("attention.png", "losses.csv"):
        (folder / name).unlink(missing_ok=True)
    shown = _pixels(images, teacher)
    _contact_sheet(shown).save(folder / "synthetic.png", optimize=True)
    written = ["synthetic.png"]
    if images.prior.numel():
        _attention_sheet(shown, images).save(folder / "attention.png", optimize=True)
        written.append("attention.png")
    if images.curves.numel():
        _write_losses(folder / "losses.csv", images)
        written.append("losses.csv")
    return written


def heat(values: Array) -> Array:
    """Colours uint8 ``[..., 3]`` for values ``[...]`` in 0..1."""
    anchors = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, anchors, channel) for channel in _HEAT.T]
    return np.stack(channels, -1).round().astype(np.uint8)


def _pixels(images: "SyntheticImages", teacher: "Teacher") -> Array:
    """Pixels uint8 ``[n, H, W, 1 or 3]`` of the images that are shown."""
    return to_bytes(teacher.denormalise(images.images[:SHOWN].float()))


def to_bytes(pixels: "Tensor") -> Array:
    """Pixels uint8 ``[n, H, W, 1 or 3]`` of pixels ``[n, C, H, W]`` in 0..1; unless there are three channels, grey."""
    if pixels.shape[1] != 3:
        pixels = reduce(pixels, "n c h w -> n 1 h w", "mean")
    return rearrange((pixels * 255).round().byte(), "n c h w -> n h w c").numpy()


def to_rgb(picture: Array) -> Array:
    """A picture ``[h, w, 1 or 3]`` with three channels."""
    return repeat(picture, "h w c -> h w (repeats c)", repeats=3 // picture.shape[-1])


def _enlarged(picture: Array) -> Array:
    """A picture ``[h, w, ...]``, magnified by the whole number that brings it closest to the size of a tile."""
    factor = max(1, round(_TILE / max(picture.shape[:2])))
    return repeat(picture, "h w ... -> (h rows) (w columns) ...", rows=factor, columns=factor)


def _contact_sheet(pictures: Array) -> Image.Image:
    """All pictures in a grid; the gaps are transparent, or white for viewers without transparency."""
    tiles = [_enlarged(picture) for picture in pictures]
    height, width, channels = tiles[0].shape
    columns = _columns(len(tiles))
    rows = -(-len(tiles) // columns)
    size = (rows * (height + _GUTTER) - _GUTTER, columns * (width + _GUTTER) - _GUTTER)
    sheet = np.full((*size, channels + 1), 255, np.uint8)
    sheet[..., -1] = 0
    for index, tile in enumerate(tiles):
        top, left = (index // columns) * (height + _GUTTER), (index % columns) * (width + _GUTTER)
        sheet[top : top + height, left : left + width, :channels] = tile
        sheet[top : top + height, left : left + width, -1] = 255
    return Image.fromarray(sheet)


def _columns(count: int) -> int:
    """The number of columns, at most 8, that leaves the fewest empty places in the last row."""
    choices = range(min(count, _COLUMNS), min(count, _COLUMNS // 2), -1)
    return min(choices, key=lambda columns: -count % columns, default=count)


def _attention_sheet(pictures: Array, images: "SyntheticImages") -> Image.Image:
    """A row for each block and a column for each image: its prior beside the attention it reached.

    The background is transparent and the text grey, so that it is readable on light and dark pages.
    """
    prior, reached = images.prior.numpy(), images.reached.numpy()
    place = _Places(*_enlarged(prior[0, 0]).shape)
    sheet = Image.new("RGBA", place.size(*prior.shape[:2]))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    write = partial(draw.text, fill=INK, font=font)
    for column, picture in enumerate(pictures[: len(prior)]):
        left = place.left(column)
        sheet.paste(_fitted(picture, (place.width, place.height)), (left + (place.pair - place.width) // 2, 0))
        for side, text in enumerate(("prior", "reached")):
            middle = left + place.width / 2 + side * (place.width + _GUTTER)
            write((middle, place.top(0) - _LINE / 2), text, anchor="mm")
        for row, maps in enumerate(zip(prior[column], reached[column], strict=True)):
            sheet.paste(_pair(*maps), (left, place.top(row)))
    for row in range(prior.shape[1]):
        write((0, place.top(row) + place.height / 2), f"block {images.first_block + row}", anchor="lm")
    return sheet


class _Places:
    """Positions on the attention sheet, for tiles of one size."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.pair = 2 * width + _GUTTER

    def left(self, column: int) -> int:
        return _LABELS + column * (self.pair + _GAP)

    def top(self, row: int) -> int:
        return self.height + _LINE + _GAP // 2 + row * (self.height + _GAP // 2)

    def size(self, columns: int, rows: int) -> tuple[int, int]:
        return self.left(columns) - _GAP, self.top(rows) - _GAP // 2


def _fitted(picture: Array, size: tuple[int, int]) -> Image.Image:
    thumbnail = Image.fromarray(to_rgb(picture))
    smaller = thumbnail.width > size[0]
    return thumbnail.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def _pair(prior: Array, reached: Array) -> Image.Image:
    """Both maps, each divided by its sum, on one colour scale from zero to the larger maximum."""
    shares = [values / max(float(values.sum()), 1e-12) for values in (prior, reached)]
    peak = max(float(values.max()) for values in shares)
    tiles = [heat(_enlarged(values / max(peak, 1e-12))) for values in shares]
    sheet = Image.new("RGBA", (2 * tiles[0].shape[1] + _GUTTER, tiles[0].shape[0]))
    for side, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (side * (tile.shape[1] + _GUTTER), 0))
    return sheet


def _write_losses(path: Path, images: "SyntheticImages") -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(("group", "iteration", *images.columns))
        for group, curve in enumerate(images.curves.tolist()):
            for iteration, values in enumerate(curve):
                table.writerow((group, iteration, *(f"{value:.6g}" for value in values)))
