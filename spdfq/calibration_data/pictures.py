"""A folder of 8-bit PNG pictures of calibration images, and what the rounding to 8 bits loses."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from spdfq.calibration_data.arrays import Array
from spdfq.errors import DataError, writing
from spdfq.inference.pixels import MODES

DESCRIPTION = "images.json"
_OWN = re.compile(r"images\.json|\d{5,}\.png")
_WHITE = 255
_REMEDY = "write it again: spdfq images RUN --to FOLDER"


@frozen
class Rounding:
    """What pictures of 8 bits lose, in normalised units: those of the model's input.

    Args:
        largest: the largest change of a value.
        mean: the mean change of a value.
        clipped: share of the values that lie below black or above white, in percent; they become black or white.
    """

    largest: float
    mean: float
    clipped: float


def write_pictures(folder: Path, images: Array, mean: Array, std: Array) -> Rounding:
    """Write a picture for each image and ``images.json``, all of them or none.

    Raises:
        DataError: the folder holds something else, no picture has so many channels, or there is no room.
    """
    channels = images.shape[1]
    if channels not in MODES:
        raise DataError(
            f"{folder}: pictures have 1 to 4 channels, these images {channels}; write a file: --to FILE.npz"
        )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; choose another folder")
    if folder.is_dir() and (other := [path.name for path in folder.iterdir() if not _OWN.fullmatch(path.name)]):
        raise DataError(f"{folder}: holds other files ({min(other)}); choose another folder")
    pixels = _plane(images, mean, std)
    codes = np.clip(np.rint(pixels * _WHITE), 0, _WHITE).astype(np.uint8)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(new, ignore_errors=True)
        try:
            _fill(new, codes, mean, std)
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    change = np.abs(_normalised(codes, mean, std) - images)
    # float32 does not bring back 0 and 1 exactly
    outside = np.mean((pixels < -1e-5) | (pixels > 1 + 1e-5))
    return Rounding(float(change.max()), float(change.mean()), 100 * float(outside))


def read_pictures(folder: Path) -> dict[str, Any]:
    """The images float32 ``[n, C, H, W]`` of a folder of pictures, normalised, with mean and std.

    Raises:
        DataError: no such folder, or a picture that is missing, damaged or of another size.
    """
    from PIL import Image

    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        mean, std = (np.asarray(described[name], dtype=np.float32) for name in ("mean", "std"))
        height, width = described["size"]
        names, mode = _names(described["images"]), MODES[len(mean)]
    except FileNotFoundError:
        raise DataError(f"{folder}: has no {DESCRIPTION}; {_REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DESCRIPTION}: damaged ({error}); {_REMEDY}") from None
    codes = []
    for name in names:
        try:
            with Image.open(folder / name) as picture:
                picture.load()
        except OSError as error:  # also what Pillow raises for a damaged file
            raise DataError(f"{folder / name}: cannot be read ({error}); {_REMEDY}") from None
        if picture.mode != mode or picture.size != (width, height):
            raise DataError(
                f"{folder / name}: is {picture.mode} of {picture.width} × {picture.height} pixels, expected {mode} of "
                f"{width} × {height}; {_REMEDY}"
            )
        codes.append(np.asarray(picture).reshape(height, width, -1).transpose(2, 0, 1))
    return {"images": _normalised(np.stack(codes), mean, std), "mean": mean, "std": std}


def _names(count: int) -> list[str]:
    return [f"{index:05d}.png" for index in range(count)]


def _fill(folder: Path, codes: NDArray[np.uint8], mean: Array, std: Array) -> None:
    from PIL import Image

    folder.mkdir()
    for name, code in zip(_names(len(codes)), codes, strict=True):
        pixels = code.transpose(1, 2, 0)
        Image.fromarray(pixels.squeeze(2) if len(code) == 1 else pixels).save(folder / name)
    described = {
        "images": len(codes),
        "size": list(codes.shape[2:]),
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _plane(images: Array, mean: Array, std: Array) -> Array:
    """Pixels in 0..1."""
    return images * std[:, None, None] + mean[:, None, None]


def _normalised(codes: NDArray[np.uint8], mean: Array, std: Array) -> Array:
    return np.asarray((codes / np.float32(_WHITE) - mean[:, None, None]) / std[:, None, None], dtype=np.float32)
