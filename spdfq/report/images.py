"""The calibration images with their classes, and a real image beside each, as the page shows them."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from spdfq.errors import reading
from spdfq.report.pictures import tiles_of

CLASSES_FILE, REAL_FILE = "image_classes.json", "real.png"
_FIRST = 16


@frozen
class Picture:
    """A calibration image on the page.

    Args:
        image: PNG in base64.
        real: a real image of the same class; ``None`` without one.
        label: the class that the teacher predicts.
        percent: its probability.
        drawn: the classes that the image was made for, in a sentence; empty if there are none.
    """

    image: str
    real: str | None
    label: str
    percent: str
    drawn: str


@frozen
class Pictures:
    """The calibration images on the page: the first ones, and those that are folded away."""

    first: list[Picture]
    more: list[Picture]

    @property
    def real(self) -> bool:
        """Whether there is a real image beside one of them."""
        return any(each.real for each in self.first + self.more)


def pictures(folder: Path, names: Sequence[str]) -> Pictures | None:
    """The images of a run folder with their classes; ``None`` if the classes or the images are not there.

    Args:
        folder: of the run.
        names: of the classes; empty if nobody knows them.

    Raises:
        DataError: a file is damaged.
    """
    path = folder / CLASSES_FILE
    if not (path.is_file() and (folder / "synthetic.png").is_file()):
        return None
    with reading(path):
        classes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        shown = _encoded(folder / "synthetic.png", len(classes))
        real = _encoded(folder / REAL_FILE, len(classes)) if (folder / REAL_FILE).is_file() else [None] * len(classes)
        found = [
            Picture(image or "", beside, _name(each["class"], names), f"{each['percent']:.0f} %", _drawn(each, names))
            for image, beside, each in zip(shown, real, classes, strict=True)
        ]
    return Pictures(found[:_FIRST], found[_FIRST:])


def _encoded(path: Path, count: int) -> list[str | None]:
    return [None if tile is None else base64.b64encode(tile).decode() for tile in tiles_of(path, count)]


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _drawn(each: dict[str, Any], names: Sequence[str]) -> str:
    drawn = dict.fromkeys(_name(index, names) for index in each["drawn"])
    return f"made for {', '.join(drawn)}" if drawn else ""
