"""Labelled images: for evaluation, and for calibration on real ones."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.errors import DataError
from spdfq.models import Teacher
from spdfq.registry import datasets
from spdfq.zoo import data_file


@datasets.register("fashion_mnist", paper="arXiv:1708.07747")
@frozen(kw_only=True)
class FashionMnist:
    """The bundled part of Fashion-MNIST: 2,000 test images or 256 training images, ten classes.

    Resized and repeated over channels where the model is not 28×28 grey.

    Args:
        split: ``test`` for evaluation, ``train`` for calibration on real images.
    """

    split: Literal["test", "train"] = "test"

    def __len__(self) -> int:
        return len(self._load()[1])

    def batches(self, teacher: Teacher, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]`` in the file's order, the last batch included."""
        if teacher.num_classes != 10:
            raise DataError(
                f"fashion_mnist has 10 classes, {teacher.name} has {teacher.num_classes}; use another dataset"
            )
        images, labels = self._load()
        for pixels, target in zip(images.split(batch), labels.split(batch), strict=True):
            yield teacher.normalise(_fitted(pixels.float() / 255, teacher.input_size)), target.long()

    def fingerprint(self) -> str:
        """A hash of the images."""
        return hashlib.sha256(self._path().read_bytes()).hexdigest()[:20]

    def _path(self) -> Path:
        return data_file(f"fmnist_{self.split}.safetensors")

    def _load(self) -> tuple[Tensor, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(self._path())
        return stored["images"], stored["labels"]


def _fitted(pixels: Tensor, size: tuple[int, int, int]) -> Tensor:
    channels, *spatial = size
    if list(pixels.shape[-2:]) != spatial:
        pixels = F.interpolate(pixels, spatial, mode="bilinear", antialias=True, align_corners=False)
    return pixels.expand(-1, channels, -1, -1)


@datasets.register("image_folder")
@frozen(kw_only=True)
class ImageFolder:
    """A folder with a subfolder of images for each class, classes in alphabetical order.

    Resized, cropped and normalised as timm evaluates the model.

    Args:
        root: the folder.
        workers: processes that decode images.
    """

    root: str
    workers: int = field(default=0, validator=validators.ge(0))

    def __len__(self) -> int:
        return len(self._dataset())

    def batches(self, teacher: Teacher, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]`` in alphabetical order, the last batch included."""
        from timm.data import create_transform

        dataset = self._dataset(mode="L" if teacher.input_size[0] == 1 else "RGB")
        classes = len(dataset.reader.class_to_idx)
        if classes > teacher.num_classes:
            raise DataError(f"{self.root}: {classes} class folders, but {teacher.name} knows {teacher.num_classes}")
        dataset.transform = create_transform(
            teacher.input_size,
            is_training=False,
            mean=teacher.mean,
            std=teacher.std,
            crop_pct=teacher.crop_pct,
            interpolation=teacher.interpolation,
        )
        yield from torch.utils.data.DataLoader(dataset, batch, num_workers=self.workers)

    def fingerprint(self) -> str:
        """A hash of the file names and sizes."""
        files = sorted(path for path in Path(self.root).rglob("*") if path.is_file())
        listing = [(str(path.relative_to(self.root)), path.stat().st_size) for path in files]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]

    def _dataset(self, mode: str = "RGB") -> Any:
        from timm.data import ImageDataset

        if not Path(self.root).is_dir():
            raise DataError(f"image_folder: {self.root}: no such folder; give root = 'path/to/val'")
        try:
            return ImageDataset(self.root, input_img_mode=mode)
        except (RuntimeError, AssertionError) as error:
            raise DataError(
                f"image_folder: {self.root}: {error}; expected a subfolder of images for each class"
            ) from None
