"""The bundled part of Fashion-MNIST."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from spdfq.data.base import Batch, LabelledImages
from spdfq.registry import datasets
from spdfq.teacher import Teacher
from spdfq.teacher.zoo import data_file


@datasets.register("fashion_mnist", paper="arXiv:1708.07747")
@frozen(kw_only=True)
class FashionMnist(LabelledImages):
    """The bundled part of Fashion-MNIST: 2,000 test images or 256 training images, ten classes.

    Resized and repeated over channels where the model is not 28×28 grey.

    Args:
        split: ``test`` for evaluation, ``train`` for calibration on real images.
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    split: Literal["test", "train"] = "test"

    def __len__(self) -> int:
        return len(self._load()[1])

    @property
    def classes(self) -> int:
        """How many classes the labels count."""
        return 10

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]``, the last batch included.

        In the file's order, or those at ``indices``, in their order.
        """
        images, labels = self._load() if indices is None else (part[list(indices)] for part in self._load())
        for pixels, target in zip(images.split(batch), labels.split(batch), strict=True):
            yield Batch(teacher.normalise(_fitted(pixels.float() / 255, teacher.input_size)), target.long())

    def identities(self) -> Iterator[str]:
        """Position of each in its file; see `LabelledImages.identities`."""
        return (f"{self._path().name} {index}" for index in self.chosen(len(self._whole()[1])))

    def fingerprint(self) -> str:
        """A hash of the images."""
        return hashlib.sha256(self._path().read_bytes()).hexdigest()[:20]

    def _path(self) -> Path:
        return data_file(f"fmnist_{self.split}.safetensors")

    def _load(self) -> tuple[Tensor, Tensor]:
        images, labels = self._whole()
        chosen = self.chosen(len(labels))
        return images[chosen], labels[chosen]

    def _whole(self) -> tuple[Tensor, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(self._path())
        return stored["images"], stored["labels"]


def _fitted(pixels: Tensor, size: tuple[int, int, int]) -> Tensor:
    channels, *spatial = size
    if list(pixels.shape[-2:]) != spatial:
        pixels = F.interpolate(pixels, spatial, mode="bilinear", antialias=True, align_corners=False)
    return pixels.expand(-1, channels, -1, -1)
