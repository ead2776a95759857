"""Datasets of encoded images (JPEG, PNG ...), wherever they lie: decoded, prepared as timm does, the damaged named."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spdfq.data.base import Batch, LabelledImages
from spdfq.errors import DataError
from spdfq.models import Teacher
from spdfq.registry import datasets

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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

    def size(self, entry: Entry) -> int:
        """A number of bytes that tells whether the data behind an image is another than before."""
        return entry.place.stat().st_size

    def __len__(self) -> int:
        return len(self.used())

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]``: resized, cropped and normalised as timm evaluates.

        Raises:
            DataError: there is no such dataset, or an image cannot be read and ``damaged`` is ``refuse``.
        """
        entries = self.used()
        asked = entries if indices is None else [entries[index] for index in indices]
        decoded = _Decoded(asked, self.reader(), _transform(teacher), teacher.input_size)
        loader = DataLoader(decoded, batch, num_workers=self.workers, collate_fn=decoded.collate)
        for images, labels, unreadable in loader:
            if unreadable and self.damaged == "refuse":
                raise DataError(
                    f"{self.title}: {unreadable[0].name}: not a readable image ({unreadable[0].reason}); replace it, "
                    "or set damaged = 'skip'"
                )
            yield Batch(images, labels, tuple(image.name for image in unreadable))

    def fingerprint(self) -> str:
        """A hash of the names, sizes and labels of the images used."""
        listing, missing = [], []
        for entry in self.used():
            try:
                listing.append((entry.name, self.size(entry), entry.label))
            except FileNotFoundError:
                missing.append(entry.name)
        if missing:
            count = f"{len(missing):,} of {len(missing) + len(listing):,} images"
            raise DataError(f"{self.title}: {count} are not there, the first is {missing[0]}; check root and labels")
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]

    def identities(self) -> Iterator[str]:
        """Where each image lies, links to folders followed; see `LabelledImages.identities`."""
        folders: dict[Path, str] = {}
        for entry in self.used():
            file, *within = entry.place if isinstance(entry.place, tuple) else (entry.place,)
            if file.parent not in folders:  # looked up once: there may be a million images in it
                folders[file.parent] = os.path.realpath(file.parent)
            yield " ".join(map(str, (os.path.join(folders[file.parent], file.name), *within)))

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
        worst = max(self.used(), key=lambda entry: entry.label)
        if worst.label >= teacher.num_classes:
            raise DataError(
                f"evaluation.dataset: {worst.name} has label {worst.label}, but the classes of {teacher.name} are 0 to "
                f"{teacher.num_classes - 1}; labels are positions in the model's list of classes"
            )


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
                pixels = image.convert("L" if self.size[0] == 1 else "RGB")
        except UnidentifiedImageError:
            return Unreadable(entry.name, "no image format that Pillow knows")
        except Exception as error:  # at broken data, decoders raise what they happen to stumble over
            return Unreadable(entry.name, f"{type(error).__name__}: {error}")
        return self.transform(pixels), entry.label

    def collate(self, items: list[tuple[Tensor, int] | Unreadable]) -> tuple[Tensor, Tensor, list[Unreadable]]:
        """Images and labels of those that could be read, and the others."""
        pairs = [item for item in items if not isinstance(item, Unreadable)]
        images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0, *self.size)
        labels = torch.tensor([label for _, label in pairs], dtype=torch.long)
        return images, labels, [item for item in items if isinstance(item, Unreadable)]
