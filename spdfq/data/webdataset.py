"""WebDataset shards: tar files with an image and a class for each key."""

import tarfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from attrs import frozen

from spdfq.data.decoded import DecodedImages, Entry
from spdfq.data.labels import class_number
from spdfq.data.shards import matching_files, stamp
from spdfq.errors import DataError
from spdfq.inference.image_files import image_suffixes
from spdfq.registry import datasets


@datasets.register("webdataset")
@frozen(kw_only=True)
class WebDataset(DecodedImages):
    """WebDataset shards: uncompressed tar files with ``KEY.jpg`` (or another image) and ``KEY.cls`` for each image.

    The class in ``KEY.cls`` is a position in the model's list of classes, counted from 0. Images come file by file in
    alphabetical order. They are resized, cropped and normalised as timm does when it evaluates the model.

    Args:
        files: path of the shards, with ``*`` for any text, for example ``"imagenet1k-validation-*.tar"``.
        workers: number of processes that decode images.
        damaged: what to do with an image that cannot be read: ``skip`` leaves it out and names it in the result;
            ``refuse`` stops with an error.
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    files: str

    @property
    def classes(self) -> None:
        """``None``: the shards do not say how many classes there are."""
        return None

    def entries(self) -> list[Entry]:
        """Every image of every shard."""
        shards = matching_files("webdataset", self.files)
        return [entry for path in shards for entry in _shard(path, stamp(path))]

    def reader(self) -> Callable[[Any], Path | BytesIO]:
        """Reads the bytes of an image from the tar file."""
        return _member

    def stamp(self, entry: Entry) -> tuple[int, ...]:
        """Size of the image, and size and modification time of the shard."""
        return entry.location[2], *stamp(entry.location[0])


def _member(location: tuple[Path, int, int]) -> BytesIO:
    path, offset, size = location
    with open(path, "rb") as file:
        file.seek(offset)
        return BytesIO(file.read(size))


@cache
def _shard(path: Path, stamp: Any) -> tuple[Entry, ...]:
    images: dict[str, tuple[str, tuple[Path, int, int]]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, suffix = _split(member.name)
                if suffix == ".cls":
                    labels[key] = _label(path, member.name, tar.extractfile(member))
                elif suffix in image_suffixes():
                    if key in images:
                        raise DataError(
                            f"webdataset: {path}: {key} has several images, {suffix} and another; leave one"
                        )
                    images[key] = f"{path.name}/{member.name}", (path, member.offset_data, member.size)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"webdataset: {path}: damaged, or not an uncompressed tar file ({error}); fetch it again"
        ) from None
    if not images:
        raise DataError(f"webdataset: {path}: holds no images; expected KEY.jpg and KEY.cls for each")
    if alone := sorted(images.keys() ^ labels.keys()):
        raise DataError(
            f"webdataset: {path}: {alone[0]} lacks an image or a class; expected KEY.jpg and KEY.cls for each"
        )
    return tuple(Entry(name, labels[key], location) for key, (name, location) in images.items())


def _check_end(path: Path, end: int) -> None:
    """Raise ReadError unless the last member is followed by the end marker of a tar file.

    `tarfile` accepts anything that is not a header as the end. The real end is a block of zeros, and more zeros that
    fill the last record. A record has tarfile's 10 KiB, or a power of two of at most 1 MiB (``tar -b``).
    """
    whole = path.stat().st_size
    record = max(tarfile.RECORDSIZE, min(whole & -whole, 2**20))  # the largest power of two that divides the size
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(record + 2 * tarfile.BLOCKSIZE)
    if not tarfile.BLOCKSIZE <= len(rest) == whole - end or rest.strip(b"\0"):
        raise tarfile.ReadError(f"neither a member nor the end of the file follows after {end:,} of {whole:,} bytes")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member. WebDataset splits a name at the first dot after its folders."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _label(path: Path, name: str, file: Any) -> int:
    text = file.read().decode(errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"webdataset: {path}: {name} holds {text[:20]!r}, which is not the number of a class")
    if (found := class_number(text)) is None:
        raise DataError(f"webdataset: {path}: {name} holds {text[:20]}, which is larger than any model's classes")
    return found
