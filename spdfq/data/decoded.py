"""Datasets of encoded images (JPEG, PNG, ...): decoding, timm's preprocessing, and reports of damaged images."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
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
from spdfq.inference.image_files import read_image
from spdfq.registry import datasets
from spdfq.teacher import Teacher


@frozen
class Entry:
    """An encoded image.

    Args:
        name: shown to users; unique in its dataset.
        label: its class.
        location: where the image is stored, in the form that the dataset's reader takes.
    """

    name: str
    label: int
    location: Any


@frozen
class Unreadable:
    """Stands for a damaged image in the list of decoded images."""

    name: str
    reason: str


@frozen(kw_only=True)
class DecodedImages(LabelledImages):
    """Base class of datasets of encoded images.

    A subclass defines `classes` and `entries`, and `reader` and `stamp` if its images are not files of their own.

    Args:
        workers: number of processes that decode images.
        damaged: what to do with an image that cannot be read: ``skip`` leaves it out and names it in the result;
            ``refuse`` stops with an error.
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    workers: int = field(default=0, validator=validators.ge(0))
    damaged: Literal["skip", "refuse"] = "skip"

    def entries(self) -> list[Entry]:
        """Every image of the dataset, in its order.

        Raises:
            DataError: the dataset does not exist, or its layout is wrong.
        """
        raise TypeError(f"{type(self).__name__} does not define entries")

    def reader(self) -> Callable[[Any], Path | BytesIO]:
        """A function that turns the location of an image into something that Pillow opens. Every worker gets a copy."""
        return Path

    def stamp(self, entry: Entry) -> tuple[int, ...]:
        """Numbers that change if the stored image changes: size and modification time of its file, the time last."""
        return stamp(entry.location)

    def __len__(self) -> int:
        return len(self.used())

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """The images, resized, cropped and normalised as timm does for evaluation; see `LabelledImages.batches`.

        Raises:
            DataError: the dataset does not exist, an image cannot be read and ``damaged`` is ``refuse``, a worker was
                killed, or the teacher takes more than 4 channels.
        """
        entries = self.used()
        asked = entries if indices is None else [entries[index] for index in indices]
        decoded = _DecodedDataset(asked, self.reader(), teacher.transform(), teacher.input_size)
        loader = DataLoader(decoded, batch, num_workers=self.workers, collate_fn=decoded.collate)
        for images, labels, unreadable in self._report_killed_worker(loader):
            if unreadable and self.damaged == "refuse":
                raise DataError(
                    f"{self.title}: {unreadable[0].name}: not a readable image ({unreadable[0].reason}); replace it, "
                    "or set damaged = 'skip'"
                )
            yield Batch(images, labels, tuple(f"{image.name} ({image.reason})" for image in unreadable))

    def fingerprint(self) -> str:
        """A hash of the names and labels of the images used, and of the sizes and modification times of their files."""
        listing, missing = [], []
        for entry in self.used():
            try:
                listing.append((entry.name, self.stamp(entry), entry.label))
            except FileNotFoundError:
                missing.append(entry.name)
        if missing:
            count = f"{len(missing):,} of {len(missing) + len(listing):,} images"
            raise DataError(f"{self.title}: {count} are missing, the first is {missing[0]}; check root and labels")
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]

    def contents(self) -> str:
        """A hash of the names and labels of the images used, and of the sizes of their files; see `stamp`."""
        listing = []
        for entry in self.used():
            try:
                listing.append((entry.name, *self.stamp(entry)[:-1], entry.label))
            except FileNotFoundError:
                listing.append((entry.name, entry.label))
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]

    def identities(self) -> Iterator[str]:
        """Where each image is stored, with links resolved; see `LabelledImages.identities`."""
        folders: dict[Path, str] = {}
        for entry in self.used():
            file, *within = entry.location if isinstance(entry.location, tuple) else (entry.location,)
            if file.parent not in folders:  # resolved once, because a folder may hold a million images
                folders[file.parent] = os.path.realpath(file.parent)
            path = os.path.join(folders[file.parent], file.name)
            yield " ".join(map(str, (os.path.realpath(path) if os.path.islink(path) else path, *within)))

    def used(self) -> list[Entry]:
        """The images that are used."""
        entries = self.entries()
        return [entries[index] for index in self.chosen(len(entries))]

    @property
    def title(self) -> str:
        """The dataset's registered name, for error messages."""
        return datasets.name_of(type(self))

    def check_classes(self, teacher: Teacher) -> None:
        """Nothing where the labels can be positions in the teacher's list of classes.

        Raises:
            DataError: they cannot.
        """
        if self.classes is not None:
            return super().check_classes(teacher)
        entries = self.entries()
        worst = max(entries, key=lambda entry: entry.label)
        if worst.label >= teacher.num_classes:
            from_one = worst.label == teacher.num_classes and min(entry.label for entry in entries) == 1
            raise DataError(
                f"evaluation.dataset: {worst.name} has label {worst.label}, but the classes of {teacher.name} are 0 to "
                f"{teacher.num_classes - 1}; labels are positions in the model's list of classes, counted from 0"
                + (", and these seem to be counted from 1" if from_one else "")
            )

    def _report_killed_worker(self, loader: DataLoader) -> Iterator[Any]:
        try:
            yield from _start(loader)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self.title}: a process that decodes images was killed, most often because memory ran out "
                f"({str(error).splitlines()[0]}); set fewer workers, or workers = 0"
            ) from None


def _start(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, without the signal handler that torch installs when workers start.

    When a worker is killed, that handler raises an error in whatever code is running. It is not needed: a loader that
    waits for a killed worker notices within five seconds.
    """
    installs = (
        loader.num_workers and threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    )
    before = signal.getsignal(signal.SIGCHLD) if installs else None
    batches = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return batches


@frozen
class _DecodedDataset(Dataset):
    entries: list[Entry]
    read: Callable[[Any], Path | BytesIO]
    transform: Callable[[Any], Tensor]
    size: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        entry = self.entries[index]
        try:
            return read_image(lambda: self.read(entry.location), self.transform), entry.label
        except DataError as error:
            return Unreadable(entry.name, str(error))

    def collate(self, items: list[tuple[Tensor, int] | Unreadable]) -> tuple[Tensor, Tensor, list[Unreadable]]:
        """Images ``[b, C, H, W]`` and labels ``[b]`` of the readable items, and the unreadable items."""
        pairs = [item for item in items if not isinstance(item, Unreadable)]
        images = (
            torch.stack([image for image, _ in pairs])
            if pairs
            else torch.empty(0, *self.size, dtype=torch.float32, device="cpu")
        )
        labels = torch.tensor([label for _, label in pairs], dtype=torch.long, device="cpu")
        return images, labels, [item for item in items if isinstance(item, Unreadable)]
