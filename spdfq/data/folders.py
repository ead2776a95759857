"""Images in folders: a subfolder for each class, or one folder and a file of labels."""

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from spdfq.data.classes import ClassOrder, as_characters, model_classes, numbered
from spdfq.data.decoded import DecodedImages, Entry
from spdfq.data.imagenet import synsets
from spdfq.data.labels import Labels, read_labels
from spdfq.errors import DataError, MissingDataError
from spdfq.inference.image_files import images_below, unbroken
from spdfq.registry import datasets
from spdfq.teacher import Teacher


@datasets.register("image_folder")
@frozen(kw_only=True)
class ImageFolder(DecodedImages):
    """A folder with a subfolder of images for each class; labels number the subfolders in natural order, as timm does.

    Natural order ignores capital letters and counts numbers: ``c2`` comes before ``C10``. An empty subfolder is a class
    too. Names that begin with a dot, and files whose suffix Pillow does not read, are ignored. Images are resized,
    cropped and normalised as timm does when it evaluates the model.

    Args:
        root: the folder.
        class_order: names of the subfolders in the order of the model's classes, if it is another one: an array, or a
            text file with one name on each line. A name without a subfolder is a class without images.
        workers: number of processes that decode images.
        damaged: what to do with an image that cannot be read: ``skip`` leaves it out and names it in the result;
            ``refuse`` stops with an error.
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    root: str
    class_order: ClassOrder = None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the subfolders, and of classes without images."""
        return numbered([folder.name for folder in self._folders()], self.class_order, "image_folder")

    def class_warnings(self, teacher: Teacher) -> list[str]:
        """A line if the classes may have another order than the teacher's."""
        if self.class_order is not None or model_classes(teacher):
            return super().class_warnings(teacher)
        doubt = as_characters(self.class_names)
        return [f"evaluation.dataset: {doubt}"] if doubt else []

    def entries(self) -> list[Entry]:
        """Every image, class by class."""
        folders = {folder.name: folder for folder in self._folders()}
        found = [
            Entry(str(path.relative_to(self.root)), label, path)
            for label, name in enumerate(self.class_names)
            if name in folders
            for path in sorted(images_below(folders[name], "image_folder"))
        ]
        if not found:
            raise DataError(
                f"image_folder: {self.root}: holds no images; expected a subfolder of images for each class (for one "
                "folder and a file of labels, use type = 'image_list')"
            )
        return found

    def _folders(self) -> list[Path]:
        found = [path for path in _folder("image_folder", self.root).iterdir() if not path.name.startswith(".")]
        return [path for path in found if unbroken(path, "image_folder").is_dir()]


@datasets.register("image_list")
@frozen(kw_only=True)
class ImageList(DecodedImages):
    """Images in one folder, and a file that lists them with their classes, in the order of that file.

    The file has a line ``name class`` for each image. The class is a position in the model's list of classes, counted
    from 0 (``val.txt`` of Caffe's ImageNet), or a synset of ImageNet-1k (``n01751748``). Kaggle's
    ``LOC_val_solution.csv`` works too. Images are resized, cropped and normalised as timm does when it evaluates the
    model.

    Args:
        root: the folder.
        labels: the file.
        workers: number of processes that decode images.
        damaged: what to do with an image that cannot be read: ``skip`` leaves it out and names it in the result;
            ``refuse`` stops with an error.
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    root: str
    labels: str

    @property
    def classes(self) -> int | None:
        """Number of classes; ``None`` if the file has numbers, which do not say how many there are."""
        return self._read().classes

    @property
    def class_names(self) -> Sequence[str]:
        """The synsets; empty if the file has numbers."""
        return () if self.classes is None else list(synsets())

    def entries(self) -> list[Entry]:
        """Every image in the list."""
        root = _folder("image_list", self.root)
        return [Entry(name, label, root / name) for name, label in self._read().items]

    def _read(self) -> Labels:
        return read_labels(Path(self.labels))


def _folder(title: str, root: str) -> Path:
    if not (root and Path(root).is_dir()):
        raise MissingDataError(f"{title}: {root or 'an empty root'}: no such folder; give root = 'path/to/val'")
    return Path(root)
