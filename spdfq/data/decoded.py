"""Datasets of encoded images (JPEG, PNG ...), wherever they lie: decoded, prepared as timm does, the damaged named."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spdfq.data.base import Batch, LabelledImages
from spdfq.data.shards import stamp
from spdfq.errors import DataError
from spdfq.registry import datasets
from spdfq.teacher import Teacher

_RECOGNISED_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow opens these without being able to load a pixel


@cache
def image_suffixes() -> frozenset[str]:
    """Those of the formats that this Pillow reads, in lower case."""
    from PIL import Image

    known, readable = Image.registered_extensions(), Image.OPEN.keys() - _RECOGNISED_ONLY
    return frozenset(suffix for suffix, kind in known.items() if kind in readable)


@frozen
class Entry:
    """An encoded image.

    Args:
        name: what people find it by; unique in its dataset.
        label: its class.
        place: where it lies, as the dataset's reader takes it.
    """

    name: str
    label: int
    place: Any


@frozen
class Unreadable:
    """What stands in the place of a damaged image."""

    name: str
    reason: str


@frozen(kw_only=True)
class DecodedImages(LabelledImages):
    """Base class of datasets of encoded images.

    Args:
        workers: processes that decode images.
        damaged: what becomes of an image that cannot be read: ``skip`` leaves it out of the result, which names it;
            ``refuse`` stops there.
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    workers: int = field(default=0, validator=validators.ge(0))
    damaged: Literal["skip", "refuse"] = "skip"

    def entries(self) -> list[Entry]:
        """Every image of the dataset, in its order.

        Raises:
            DataError: there is no such dataset, or it is not laid out as it must be.
        """
        raise TypeError(f"{type(self).__name__} does not define entries")

    def reader(self) -> Callable[[Any], Path | BytesIO]:
        """What turns the place of an image into something that Pillow opens; every worker gets a copy."""
        return Path

    def stamp(self, entry: Entry) -> tuple[int, ...]:
        """What tells whether the data behind an image is another than before: size and time of its file."""
        return stamp(entry.place)

    def __len__(self) -> int:
        return len(self.used())

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]``: resized, cropped and normalised as timm evaluates.

        Raises:
            DataError: there is no such dataset, an image cannot be read and ``damaged`` is ``refuse``, or a worker
                was killed.
        """
        entries = self.used()
        asked = entries if indices is None else [entries[index] for index in indices]
        decoded = _Decoded(asked, self.reader(), _transform(teacher), teacher.input_size)
        loader = DataLoader(decoded, batch, num_workers=self.workers, collate_fn=decoded.collate)
        for images, labels, unreadable in self._unless_killed(loader):
            if unreadable and self.damaged == "refuse":
                raise DataError(
                    f"{self.title}: {unreadable[0].name}: not a readable image ({unreadable[0].reason}); replace it, "
                    "or set damaged = 'skip'"
                )
            yield Batch(images, labels, tuple(image.name for image in unreadable))

    def fingerprint(self) -> str:
        """A hash of the names and labels of the images used, and of the sizes and times of their files."""
        listing, missing = [], []
        for entry in self.used():
            try:
                listing.append((entry.name, self.stamp(entry), entry.label))
            except FileNotFoundError:
                missing.append(entry.name)
        if missing:
            count = f"{len(missing):,} of {len(missing) + len(listing):,} images"
            raise DataError(f"{self.title}: {count} are not there, the first is {missing[0]}; check root and labels")
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]

    def identities(self) -> Iterator[str]:
        """Where each image lies, links followed; see `LabelledImages.identities`."""
        folders: dict[Path, str] = {}
        for entry in self.used():
            file, *within = entry.place if isinstance(entry.place, tuple) else (entry.place,)
            if file.parent not in folders:  # looked up once: there may be a million images in it
                folders[file.parent] = os.path.realpath(file.parent)
            path = os.path.join(folders[file.parent], file.name)
            yield " ".join(map(str, (os.path.realpath(path) if os.path.islink(path) else path, *within)))

    def used(self) -> list[Entry]:
        """The images of the subset."""
        entries = self.entries()
        return [entries[index] for index in self.chosen(len(entries))]

    @property
    def title(self) -> str:
        """What error messages call the dataset."""
        return datasets.name_of(type(self))

    def check_classes(self, teacher: Teacher) -> None:
        """Nothing where the labels can be positions in the teacher's list of classes.

        Raises:
            DataError: they cannot.
        """
        if self.classes is not None:
            return super().check_classes(teacher)
        worst = max(self.entries(), key=lambda entry: entry.label)  # a subset may lack what gives a list away
        if worst.label >= teacher.num_classes:
            raise DataError(
                f"evaluation.dataset: {worst.name} has label {worst.label}, but the classes of {teacher.name} are 0 to "
                f"{teacher.num_classes - 1}; labels are positions in the model's list of classes"
            )

    def _unless_killed(self, loader: DataLoader) -> Iterator[Any]:
        try:
            yield from _begun(loader)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self.title}: a process that decodes images was killed, most often for want of memory "
                f"({str(error).splitlines()[0]}); set fewer workers, or workers = 0"
            ) from None


def _begun(loader: DataLoader) -> Iterator[Any]:
    """Its batches, without the handler that torch sets as workers start: it raises in whatever runs when one is killed.

    The loader notices that by itself, within five seconds of waiting for the worker.
    """
    mine = loader.num_workers and threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if mine else None
    batches = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return batches


def _transform(teacher: Teacher) -> Callable[[Any], Tensor]:
    from timm.data import create_transform

    return create_transform(
        teacher.input_size,
        is_training=False,
        mean=teacher.mean,
        std=teacher.std,
        crop_pct=teacher.crop_pct,
        crop_mode=teacher.crop_mode,
        interpolation=teacher.interpolation,
    )


@frozen
class _Decoded(Dataset):
    entries: list[Entry]
    read: Callable[[Any], Path | BytesIO]
    transform: Callable[[Any], Tensor]
    size: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        from PIL import Image, UnidentifiedImageError

        entry = self.entries[index]
        try:
            with Image.open(self.read(entry.place)) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255, and their range is unknown
                    return Unreadable(entry.name, f"{image.mode} pixels, not 8 bits a channel; convert it first")
                return self.transform(image.convert("L" if self.size[0] == 1 else "RGB")), entry.label
        except UnidentifiedImageError:
            return Unreadable(entry.name, "no image format that Pillow knows")
        except Exception as error:  # at broken data, decoders raise what they happen to stumble over
            return Unreadable(entry.name, f"{type(error).__name__}: {error}")

    def collate(self, items: list[tuple[Tensor, int] | Unreadable]) -> tuple[Tensor, Tensor, list[Unreadable]]:
        """Images and labels of those that could be read, and the others."""
        pairs = [item for item in items if not isinstance(item, Unreadable)]
        images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0, *self.size)
        labels = torch.tensor([label for _, label in pairs], dtype=torch.long)
        return images, labels, [item for item in items if isinstance(item, Unreadable)]
