"""Folders of images: a subfolder for each class, or one flat folder and a list of labels."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from spdfq.data.decoded import DecodedImages, Entry, image_suffixes
from spdfq.data.imagenet import difference, synsets
from spdfq.data.labels import Labels, read_labels
from spdfq.errors import DataError
from spdfq.registry import datasets
from spdfq.teacher import Teacher


@datasets.register("image_folder")
@frozen(kw_only=True)
class ImageFolder(DecodedImages):
    """A folder with a subfolder of images for each class; labels count the subfolders in alphabetical order.

    An empty subfolder counts; files of other suffixes than those Pillow reads, and names that begin with a dot, do not.
    Images are resized, cropped and normalised as timm evaluates the model.

    Args:
        root: the folder.
        workers: processes that decode images.
        damaged: what becomes of an image that cannot be read: ``skip`` leaves it out of the result, which names it;
            ``refuse`` stops there.
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    root: str

    @property
    def classes(self) -> int:
        """How many classes the labels count."""
        return len(self._folders())

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the subfolders."""
        return [folder.name for folder in self._folders()]

    def check_classes(self, teacher: Teacher) -> None:
        """Nothing where the subfolders can be the teacher's classes.

        Raises:
            DataError: their number differs, or they are not quite the synsets of ImageNet-1k.
        """
        if found := difference(self.class_names, teacher.num_classes):
            raise DataError(f"evaluation.dataset: {self.root}: {found}; a class without images is an empty folder")
        super().check_classes(teacher)

    def entries(self) -> list[Entry]:
        """Every image, class by class."""
        found = [
            Entry(str(path.relative_to(self.root)), label, path)
            for label, folder in enumerate(self._folders())
            for path in sorted(_files(folder))
            if path.suffix.lower() in image_suffixes()
        ]
        if not found:
            raise DataError(
                f"image_folder: {self.root}: holds no images; expected a subfolder of images for each class (a flat "
                "folder and a list of labels are type = 'image_list')"
            )
        return found

    def _folders(self) -> list[Path]:
        found = _folder("image_folder", self.root).iterdir()
        return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


@datasets.register("image_list")
@frozen(kw_only=True)
class ImageList(DecodedImages):
    """Images in one folder, and a file that lists them with their classes, in the order of that file.

    The file has a line ``name class`` for each image, where the class is a position in the model's list of classes,
    from 0 on (``val.txt`` of Caffe's ImageNet), or a synset of ImageNet-1k (``n01751748``); or it is Kaggle's
    ``LOC_val_solution.csv``. Images are resized, cropped and normalised as timm evaluates the model.

    Args:
        root: the folder.
        labels: the file.
        workers: processes that decode images.
        damaged: what becomes of an image that cannot be read: ``skip`` leaves it out of the result, which names it;
            ``refuse`` stops there.
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    root: str
    labels: str

    @property
    def classes(self) -> int | None:
        """How many classes the labels count; ``None`` where they are bare numbers."""
        return self._read().classes

    @property
    def class_names(self) -> Sequence[str]:
        """The synsets; none where the labels are bare numbers."""
        return () if self.classes is None else list(synsets())

    def entries(self) -> list[Entry]:
        """Every image on the list."""
        root = _folder("image_list", self.root)
        return [Entry(name, label, root / name) for name, label in self._read().items]

    def _read(self) -> Labels:
        return read_labels(Path(self.labels))


def _files(folder: Path) -> Iterator[Path]:
    """All below but hidden ones; a folder that may not be read is an error, not an empty one."""

    def refuse(error: OSError) -> None:
        raise error

    for above, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(above) / name for name in names if not name.startswith("."))


def _folder(title: str, root: str) -> Path:
    if not (root and Path(root).is_dir()):
        raise DataError(f"{title}: {root or 'an empty root'}: no such folder; give root = 'path/to/val'")
    return Path(root)
