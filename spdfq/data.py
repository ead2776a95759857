"""Labelled images: for evaluation, and for calibration on real ones."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen, validators
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spdfq.errors import DataError
from spdfq.models import Teacher
from spdfq.registry import datasets
from spdfq.zoo import data_file

_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@frozen(kw_only=True)
class Subset:
    """What every dataset can be cut down to.

    Args:
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    limit: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    subset_seed: int = field(default=0, validator=validators.ge(0))

    def chosen(self, count: int) -> list[int]:
        """The positions used of a dataset of ``count`` images."""
        if self.limit is None or self.limit >= count:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.subset_seed)
        return torch.randperm(count, generator=generator)[: self.limit].sort().values.tolist()


@datasets.register("fashion_mnist", paper="arXiv:1708.07747")
@frozen(kw_only=True)
class FashionMnist(Subset):
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

    def batches(
        self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]``, the last batch included.

        In the file's order, or those at ``indices``, in their order.
        """
        images, labels = self._load() if indices is None else (part[list(indices)] for part in self._load())
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
        chosen = self.chosen(len(stored["labels"]))
        return stored["images"][chosen], stored["labels"][chosen]


def _fitted(pixels: Tensor, size: tuple[int, int, int]) -> Tensor:
    channels, *spatial = size
    if list(pixels.shape[-2:]) != spatial:
        pixels = F.interpolate(pixels, spatial, mode="bilinear", antialias=True, align_corners=False)
    return pixels.expand(-1, channels, -1, -1)


@datasets.register("image_folder")
@frozen(kw_only=True)
class ImageFolder(Subset):
    """A folder with a subfolder of images for each class; labels count the subfolders in alphabetical order.

    An empty subfolder counts. Images are resized, cropped and normalised as timm evaluates the model.

    Args:
        root: the folder.
        workers: processes that decode images.
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    root: str
    workers: int = field(default=0, validator=validators.ge(0))

    def __len__(self) -> int:
        return len(self._files())

    @property
    def classes(self) -> int:
        """How many classes the labels count."""
        return len(self._folders())

    def batches(
        self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[b, C, H, W]`` and labels ``[b]``, the last batch included.

        Class by class, or those at ``indices``, in their order.

        Raises:
            DataError: no such folder, no images in it, or an image that cannot be read.
        """
        from timm.data import create_transform

        transform = create_transform(
            teacher.input_size,
            is_training=False,
            mean=teacher.mean,
            std=teacher.std,
            crop_pct=teacher.crop_pct,
            crop_mode=teacher.crop_mode,
            interpolation=teacher.interpolation,
        )
        files = self._files() if indices is None else [self._files()[index] for index in indices]
        decoded = _Decoded(files, "L" if teacher.input_size[0] == 1 else "RGB", transform)
        yield from DataLoader(decoded, batch, num_workers=self.workers)

    def fingerprint(self) -> str:
        """A hash of the file names and sizes."""
        listing = [(str(path.relative_to(self.root)), path.stat().st_size, label) for path, label in self._files()]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:20]

    def _folders(self) -> list[Path]:
        if not Path(self.root).is_dir():
            raise DataError(f"image_folder: {self.root}: no such folder; give root = 'path/to/val'")
        return sorted(path for path in Path(self.root).iterdir() if path.is_dir())

    def _files(self) -> list[tuple[Path, int]]:
        """Every image and its label."""
        found = [
            (path, label)
            for label, folder in enumerate(self._folders())
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in _IMAGE_SUFFIXES
        ]
        if not found:
            raise DataError(
                f"image_folder: {self.root}: holds no images; expected a subfolder of images for each class"
            )
        return [found[index] for index in self.chosen(len(found))]


@frozen
class _Decoded(Dataset):
    files: list[tuple[Path, int]]
    mode: str
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert(self.mode)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError at a broken PNG
            raise DataError(f"image_folder: {path}: not a readable image ({error})") from None
        return self.transform(pixels), label
