"""Image files: which files of a folder are images, and how one is read."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from spdfq.errors import DataError, MissingDataError, first_line, shown

T = TypeVar("T")
_RECOGNISED_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow opens these formats, but cannot load their pixels


@cache
def image_suffixes() -> frozenset[str]:
    """File name suffixes of the formats that the installed Pillow reads, in lower case."""
    known, readable = Image.registered_extensions(), Image.OPEN.keys() - _RECOGNISED_ONLY
    return frozenset(suffix for suffix, kind in known.items() if kind in readable)


def read_image(find: Callable[[], Path | BytesIO], transform: Callable[[Any], T]) -> T:
    """The transform of an image that Pillow decodes.

    Args:
        find: returns what Pillow opens.
        transform: called with the open image.

    Raises:
        DataError: the image cannot be read or transformed; the message is the reason alone.
    """
    try:
        with Image.open(find()) as image:
            return transform(image)
    except UnidentifiedImageError:
        raise DataError("not an image format that Pillow knows") from None
    except DataError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for broken data
        raise DataError(first_line(error)) from None


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that paths name; a folder stands for all images below it, by name.

    Raises:
        MissingDataError: a path does not exist.
        DataError: a folder without images, a link that leads nowhere, or no paths.
    """
    found: list[Path] = []
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    for path in listed:
        if not isinstance(path, (str, Path)):
            raise DataError(f"images: expected paths of images and folders, got {shown(path)}")
        path = Path(path)
        if not path.exists():
            raise MissingDataError(f"{path}: no such file or folder; give an image or a folder of images")
        within = sorted(images_below(path)) if path.is_dir() else [path]
        if not within:
            raise DataError(f"{path}: the folder holds no images; give one with PNG or JPEG files")
        found += within
    if not found:
        raise DataError("images: none given; give paths of images and folders")
    return found


def images_below(folder: Path, title: str = "") -> Iterator[Path]:
    """All images below a folder and the folders that links in it lead to, without hidden ones.

    A folder that is met again, as in a loop of links, is not read twice. A folder without read permission, and a link
    that leads nowhere and may stand for a folder, are errors, not empty.

    Args:
        folder: that exists.
        title: the start of an error message, such as ``image_folder``.
    """

    def refuse(error: OSError) -> None:
        raise error

    met = {os.path.realpath(path) for path in (folder, *folder.absolute().parents)}
    for above, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = sorted((name for name in folders if not name.startswith(".")), reverse=True)
        found = {os.path.realpath(os.path.join(above, name)): name for name in visible}
        folders[:] = [name for real, name in found.items() if real not in met]
        met |= found.keys()
        for path in (Path(above, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in image_suffixes():
                yield path
            else:
                unbroken(path, title)


def unbroken(path: Path, title: str = "") -> Path:
    """The path itself.

    Raises:
        DataError: it is a link that leads nowhere, and may stand for a folder of images.
    """
    if path.is_symlink() and not path.exists():
        start = f"{title}: {path}" if title else str(path)
        raise DataError(f"{start}: is a link to {os.readlink(path)}, which does not exist; mend or remove it")
    return path
