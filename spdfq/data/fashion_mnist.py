"""The bundled subset of Fashion-MNIST."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from attrs import frozen
from einops import repeat
from torch import Tensor

from spdfq.data.base import Batch, LabelledImages
from spdfq.recipe import digest
from spdfq.registry import datasets
from spdfq.teacher import Teacher
from spdfq.teacher.zoo import data_file

_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@datasets.register("fashion_mnist", paper="arXiv:1708.07747")
@frozen(kw_only=True)
class FashionMnist(LabelledImages):
    """The bundled subset of Fashion-MNIST: 2,000 test images or 256 training images, ten classes.

    The images are resized and their channel is repeated if the model does not take 28×28 grey images.

    Args:
        split: ``test`` for evaluation, ``train`` for calibration on real images.
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    split: Literal["test", "train"] = "test"

    def __len__(self) -> int:
        return len(self._load()[1])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 10

    @property
    def class_names(self) -> Sequence[str]:
        """The names of Zalando's classes."""
        return _NAMES

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]``; see `LabelledImages.batches`."""
        images, labels = self._load() if indices is None else (part[list(indices)] for part in self._load())
        for pixels, target in zip(images.split(batch), labels.split(batch), strict=True):
            yield Batch(teacher.normalise(_fitted(pixels.float() / 255, teacher.input_size)), target.long())

    def identities(self) -> Iterator[str]:
        """Position of each image in its file; see `LabelledImages.identities`."""
        return (f"{self._path().name} {index}" for index in self.chosen(len(self._load_all()[1])))

    def fingerprint(self) -> str:
        """A hash of the file."""
        return hashlib.sha256(self._path().read_bytes()).hexdigest()[:20]

    def contents(self) -> str:
        """A hash of the file and of the positions that are used."""
        return digest(self.fingerprint(), self.chosen(len(self._load_all()[1])))

    def _path(self) -> Path:
        return data_file(f"fmnist_{self.split}.safetensors")

    def _load(self) -> tuple[Tensor, Tensor]:
        images, labels = self._load_all()
        chosen = self.chosen(len(labels))
        return images[chosen], labels[chosen]

    def _load_all(self) -> tuple[Tensor, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(self._path())
        return stored["images"], stored["labels"]


def _fitted(pixels: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Grey images ``[b, 1, 28, 28]``, resized and repeated to ``[b, *size]``."""
    channels, *spatial = size
    if list(pixels.shape[-2:]) != spatial:
        pixels = F.interpolate(pixels, spatial, mode="bilinear", antialias=True, align_corners=False)
    return repeat(pixels, "b 1 h w -> b c h w", c=channels)
