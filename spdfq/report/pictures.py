"""PNG pictures of the calibration images and of their attention, and a CSV file of the losses."""

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont

from spdfq.errors import reading

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
_LABELS = 112
_LINE = 36
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

# from blue below zero over a pale grey to red above it, in equal steps of CIE lightness on both sides
_SIGNED = np.array([(24, 84, 160), (130, 167, 205), (240, 240, 237), (222, 143, 119), (176, 42, 36)])


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
    save_png(folder / "synthetic.png", _contact_sheet(shown))
    written = ["synthetic.png"]
    if images.prior.numel():
        save_png(folder / "attention.png", _attention_sheet(shown, images))
        written.append("attention.png")
    if images.curves.numel():
        _write_losses(folder / "losses.csv", images)
        written.append("losses.csv")
    return written


def write_real_images(path: Path, pixels: "list[Tensor | None]") -> None:
    """Write a sheet of real images, each at the place that its calibration image has in ``synthetic.png``.

    Args:
        path: of the PNG file.
        pixels: for each calibration image shown ``[C, H, W]`` in 0..1, or ``None``, which leaves its place empty.
    """
    tiles = [None if each is None else _small(to_bytes(each.unsqueeze(0))[0]) for each in pixels]
    save_png(path, _sheet(tiles))


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a PNG file, completely or not at all.

    Raises:
        DataError: it cannot be written.
    """
    from spdfq.runtime.files import replace_file  # imports torch, which this package does not need otherwise

    replace_file(path, lambda temporary: picture.save(temporary, "PNG", optimize=True))


def tiles_of(path: Path, count: int) -> list[bytes | None]:
    """The pictures of a sheet as PNG files; ``None`` where a place is empty.

    Args:
        path: of a ``synthetic.png`` or ``real.png``.
        count: how many pictures it shows.

    Raises:
        DataError: the file is damaged.
    """
    with reading(path):
        with Image.open(path) as found:
            sheet = found.copy()
        columns = _columns(count)
        width, height = (sheet.width + _GUTTER) // columns, (sheet.height + _GUTTER) // -(-count // columns)
        tiles = []
        for index in range(count):
            left, top = index % columns * width, index // columns * height
            tile = sheet.crop((left, top, left + width - _GUTTER, top + height - _GUTTER))
            file = io.BytesIO()
            tile.convert(tile.mode.removesuffix("A")).save(file, "PNG", optimize=True)
            tiles.append(file.getvalue() if tile.getchannel("A").getbbox() else None)
    return tiles


def heat(values: Array) -> Array:
    """Colours uint8 ``[..., 3]`` for values ``[...]`` in 0..1."""
    return _coloured(values, _HEAT)


def signed_heat(values: Array) -> Array:
    """Colours uint8 ``[..., 3]`` for values ``[...]`` in -1..1: blue below zero, pale at zero, red above it."""
    return _coloured((values + 1) / 2, _SIGNED)


def _coloured(values: Array, colours: Array) -> Array:
    anchors = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, anchors, channel) for channel in colours.T]
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
    return _sheet([_enlarged(picture) for picture in pictures])


def _small(picture: Array) -> Array:
    """A picture ``[h, w, c]`` at the size of a tile at most, or magnified to it."""
    if max(picture.shape[:2]) <= _TILE:
        return _enlarged(picture)
    scale = _TILE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    small = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    return np.asarray(small.resize(size, Image.Resampling.LANCZOS)).reshape(size[1], size[0], -1)


def _sheet(tiles: Sequence[Array | None]) -> Image.Image:
    """Tiles of one shape in a grid; ``None`` leaves a place empty."""
    height, width, channels = next(tile.shape for tile in tiles if tile is not None)
    columns = _columns(len(tiles))
    rows = -(-len(tiles) // columns)
    size = (rows * (height + _GUTTER) - _GUTTER, columns * (width + _GUTTER) - _GUTTER)
    sheet = np.full((*size, channels + 1), 255, np.uint8)
    sheet[..., -1] = 0
    for index, tile in enumerate(tiles):
        if tile is None:
            continue
        top, left = (index // columns) * (height + _GUTTER), (index % columns) * (width + _GUTTER)
        sheet[top : top + height, left : left + width, :channels] = tile
        sheet[top : top + height, left : left + width, -1] = 255
    return Image.fromarray(sheet)


def _columns(count: int) -> int:
    """The number of columns, at most 8, that leaves the fewest empty places in the last row."""
    choices = range(min(count, _COLUMNS), min(count, _COLUMNS // 2), -1)
    return min(choices, key=lambda columns: -count % columns, default=count)


def _attention_sheet(pictures: Array, images: "SyntheticImages") -> Image.Image:
    """A row for each block and a column for each image: its prior, the attention it reached, and the difference.

    The background is transparent and the text grey, so that it is readable on light and dark pages.
    """
    prior, reached = images.prior.numpy(), images.reached.numpy()
    place = _Places(*_enlarged(prior[0, 0]).shape)
    sheet = Image.new("RGBA", place.size(*prior.shape[:2]))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=24)
    write = partial(draw.text, fill=INK, font=font)
    for column, picture in enumerate(pictures[: len(prior)]):
        left = place.left(column)
        sheet.paste(_fitted(picture, (place.width, place.height)), (left + (place.group - place.width) // 2, 0))
        for side, text in enumerate(("prior", "reached", "difference")):
            middle = left + place.width / 2 + side * (place.width + _GUTTER)
            write((middle, place.top(0) - _LINE / 2), text, anchor="mm")
        for row, maps in enumerate(zip(prior[column], reached[column], strict=True)):
            sheet.paste(_maps(*maps), (left, place.top(row)))
    for row in range(prior.shape[1]):
        write((0, place.top(row) + place.height / 2), f"block {images.first_block + row}", anchor="lm")
    return sheet


class _Places:
    """Positions on the attention sheet, for tiles of one size."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.group = 3 * width + 2 * _GUTTER

    def left(self, column: int) -> int:
        return _LABELS + column * (self.group + _GAP)

    def top(self, row: int) -> int:
        return self.height + _LINE + _GAP // 2 + row * (self.height + _GAP // 2)

    def size(self, columns: int, rows: int) -> tuple[int, int]:
        return self.left(columns) - _GAP, self.top(rows) - _GAP // 2


def _fitted(picture: Array, size: tuple[int, int]) -> Image.Image:
    thumbnail = Image.fromarray(to_rgb(picture))
    smaller = thumbnail.width > size[0]
    return thumbnail.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def _maps(prior: Array, reached: Array) -> Image.Image:
    """Both maps, each divided by its sum, on one colour scale from zero to the larger maximum; and their difference."""
    wanted, found = (values / max(float(values.sum()), 1e-12) for values in (prior, reached))
    peak = max(float(wanted.max()), float(found.max()), 1e-12)
    tiles = [
        heat(_enlarged(wanted / peak)),
        heat(_enlarged(found / peak)),
        signed_heat(_enlarged((found - wanted) / peak)),
    ]
    height, width = tiles[0].shape[:2]
    sheet = Image.new("RGBA", (3 * width + 2 * _GUTTER, height))
    for side, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (side * (width + _GUTTER), 0))
    return sheet


def _write_losses(path: Path, images: "SyntheticImages") -> None:
    from spdfq.runtime.files import write_text

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("group", "iteration", *images.columns))
    for group, curve in enumerate(images.curves.tolist()):
        for iteration, values in enumerate(curve):
            table.writerow((group, iteration, *(f"{value:.6g}" for value in values)))
    write_text(path, text.getvalue())
