"""Files that list images and their classes: ``name class`` lines, and the solution file of Kaggle's ImageNet."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from spdfq.data.base import MOST_CLASSES
from spdfq.data.imagenet import synsets
from spdfq.errors import DataError, MissingDataError

_KAGGLE = "ImageId,PredictionString"
_SYNSET = re.compile(r"n\d{8}")
_CLASSES = "the classes of a file must be numbers from 0 on, or all synsets of ImageNet-1k (n01751748)"
_WANTED = "expected 'name class' on each line, or Kaggle's LOC_val_solution.csv"


@frozen
class Labels:
    """Images and their classes.

    Args:
        items: name and label of each image, in the file's order.
        classes: number of classes; ``None`` if the file has numbers, which do not say how many there are.
    """

    items: tuple[tuple[str, int], ...]
    classes: int | None


def read_labels(path: Path) -> Labels:
    """Read a file of labels.

    Raises:
        DataError: it is missing or has another format; the message names the first wrong line.
    """
    lines = _lines(path)
    numbers: bool | None = None
    items: dict[str, int] = {}
    for line, name, label in _kaggle(path, lines) if lines[0] == _KAGGLE else _plain(path, lines):
        if name in items:
            raise _wrong(path, line, f"{name} is listed twice; remove one of the lines")
        numbers = label.isdecimal() if numbers is None else numbers
        items[name] = _number(path, line, label) if numbers else _position(path, line, label)
    return Labels(tuple(items.items()), None if numbers else len(synsets()))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingDataError(f"image_list: {path}: no such file; give labels = 'path/to/labels.txt'")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"image_list: {path}: not a text file; {_WANTED}") from None
    if not any(map(str.strip, lines)):
        raise DataError(f"image_list: {path}: is empty; {_WANTED}")
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise _wrong(path, number, f"holds a zero byte, so it is not text; {_WANTED}")
    return lines


def _plain(path: Path, lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Line number, name and class."""
    for number, line in enumerate(lines, 1):
        found = line.rsplit(maxsplit=1)
        if len(found) == 2:
            yield number, found[0], found[1]
        elif line.strip().isdecimal():
            raise _wrong(
                path,
                number,
                f"{line.strip()!r} names no image (the ground truth of ILSVRC's development kit numbers the classes in "
                f"another order); {_WANTED}",
            )
        elif found:
            raise _wrong(path, number, f"{line!r} is not a name and a class; {_WANTED}")


def _kaggle(path: Path, lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Line number, name and class. All objects of an image have the same class, so the first one is read."""
    for number, line in enumerate(lines[1:], 2):
        try:  # one line at a time: an open quote would swallow the lines after it
            (row,) = csv.reader([line], strict=True)
        except csv.Error as error:
            raise _wrong(path, number, f"{line[:80]!r} is not a line of a CSV file ({error}); fetch it again") from None
        if len(row) != 2 or not row[1].split():
            raise _wrong(path, number, f"{line!r} is not an image id and a prediction string; fetch it again")
        yield number, f"{row[0]}.JPEG", row[1].split()[0]


def class_number(digits: str) -> int | None:
    """The number of a class from its decimal digits; ``None`` if no model has that many classes."""
    digits = digits.lstrip("0") or "0"  # Python refuses to read more than 4,300 digits
    return int(digits) if len(digits) <= len(str(MOST_CLASSES)) and int(digits) < MOST_CLASSES else None


def _number(path: Path, line: int, label: str) -> int:
    if not label.isdecimal():
        raise _wrong(path, line, f"{label!r} is not a number; {_CLASSES}")
    if (found := class_number(label)) is None:
        raise _wrong(path, line, f"the class {label[:20]} is larger than any model's; {_CLASSES}")
    return found


def _position(path: Path, line: int, label: str) -> int:
    if label not in synsets():
        kind = "class of ImageNet-1k" if _SYNSET.fullmatch(label) else "synset"
        raise _wrong(path, line, f"{label!r} is not a {kind}; {_CLASSES}")
    return synsets()[label]


def _wrong(path: Path, line: int, what: str) -> DataError:
    return DataError(f"image_list: {path}, line {line}: {what}")
