"""WebDataset shards: tar files with an image and a class beside it for each key."""

import tarfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from attrs import frozen

from spdfq.data.decoded import DecodedImages, Entry, image_suffixes
from spdfq.data.labels import class_number
from spdfq.data.shards import matching, stamp
from spdfq.errors import DataError
from spdfq.registry import datasets


@datasets.register("webdataset")
@frozen(kw_only=True)
class WebDataset(DecodedImages):
    """WebDataset shards: uncompressed tar files with ``KEY.jpg`` (or another image) and ``KEY.cls`` for each image.

    The class in ``KEY.cls`` is a position in the model's list of classes, from 0 on. Images come file by file in
    alphabetical order, and are resized, cropped and normalised as timm evaluates the model.

    Args:
        files: the shards, for example ``"imagenet1k-validation-*.tar"``.
        workers: processes that decode images.
        damaged: what becomes of an image that cannot be read: ``skip`` leaves it out of the result, which names it;
            ``refuse`` stops there.
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    files: str

    @property
    def classes(self) -> None:
        """The shards do not say how many classes there are."""
        return None

    def entries(self) -> list[Entry]:
        """Every image of every shard."""
        shards = matching("webdataset", self.files)
        return [entry for path in shards for entry in _shard(path, stamp(path))]

    def reader(self) -> Callable[[Any], Path | BytesIO]:
        """Reads an image's bytes where they lie in the tar file."""
        return _member

    def stamp(self, entry: Entry) -> tuple[int, ...]:
        """Size of the image, and size and time of the shard."""
        return entry.place[2], *stamp(entry.place[0])


def _member(place: tuple[Path, int, int]) -> BytesIO:
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return BytesIO(file.read(size))


@cache
def _shard(path: Path, stamp: Any) -> tuple[Entry, ...]:
    images: dict[str, tuple[str, tuple[Path, int, int]]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # without compression: members are read where they lie
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, suffix = _split(member.name)
                if suffix == ".cls":
                    labels[key] = _label(path, member.name, tar.extractfile(member))
                elif suffix in image_suffixes():
                    if key in images:
                        raise DataError(f"webdataset: {path}: {key} has several images, {suffix} and another")
                    images[key] = f"{path.name}/{member.name}", (path, member.offset_data, member.size)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"webdataset: {path}: damaged, or no uncompressed tar file ({error}); fetch it again") from None
    if not images:
        raise DataError(f"webdataset: {path}: holds no images; expected KEY.jpg and KEY.cls for each")
    if alone := sorted(images.keys() ^ labels.keys()):
        raise DataError(f"webdataset: {path}: {alone[0]} has not both an image and a class (KEY.jpg and KEY.cls)")
    return tuple(Entry(name, labels[key], place) for key, (name, place) in images.items())


def _check_end(path: Path, end: int) -> None:
    """Whether what follows the last member is the end of a tar file.

    `tarfile` takes anything that is no header for it. It is a zero block, and zeros up to a whole record: of tarfile's
    10 KiB, or of a power of two up to 1 MiB (``tar -b``).
    """
    whole = path.stat().st_size
    record = max(tarfile.RECORDSIZE, min(whole & -whole, 2**20))  # the largest power of two that divides the size
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(record + 2 * tarfile.BLOCKSIZE)
    if not tarfile.BLOCKSIZE <= len(rest) == whole - end or rest.strip(b"\0"):
        raise tarfile.ReadError(f"after {end:,} of {whole:,} bytes there is neither a member nor the end of the file")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: WebDataset splits a name at the first dot after its folders."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _label(path: Path, name: str, file: Any) -> int:
    text = file.read().decode(errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"webdataset: {path}: {name} holds {text[:20]!r}, not the number of a class")
    if (found := class_number(text)) is None:
        raise DataError(f"webdataset: {path}: {name} holds {text[:20]}, a larger class than any model's")
    return found
