"""The base class of labelled datasets: which images are used, in which order, and which labels fit a model."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.data.classes import Comparison, compared
from spdfq.errors import DataError
from spdfq.recipe import digest
from spdfq.recipe.structure import Checked
from spdfq.teacher import Teacher

# larger labels are a mistake, and labels beyond int64 do not fit into a tensor
MOST_CLASSES = 2**31


class Batch(NamedTuple):
    """Consecutive images of a dataset, prepared for a model.

    Args:
        images: normalised, ``[b, C, H, W]``.
        labels: int64 ``[b]``.
        damaged: the images that are left out because they could not be read, each as its name and, in parentheses, the
            reason.
    """

    images: Tensor
    labels: Tensor
    damaged: tuple[str, ...] = ()


@frozen(kw_only=True)
class LabelledImages(Checked):
    """Base class of datasets.

    A subclass defines ``__len__``, `classes`, `batches` and `fingerprint`.

    Args:
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    limit: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    subset_seed: int = field(default=0, validator=[validators.ge(0), validators.lt(2**63)])
    skip: int = field(default=0, validator=validators.ge(0))

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not define __len__")

    @property
    def classes(self) -> int | None:
        """Number of classes; ``None`` if the dataset does not say."""
        raise TypeError(f"{type(self).__name__} does not define classes")

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in the order of the labels, if two datasets can be compared by them; empty otherwise."""
        return ()

    @property
    def label_names(self) -> Sequence[str]:
        """Names of the classes in the order of the labels, to compare with those of a model; empty if unknown."""
        return self.class_names

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """The images, prepared for a teacher.

        Args:
            teacher: gives the size and the normalisation of the images.
            batch: number of positions in a batch; the last batch has what remains. Damaged images are left out, so a
                batch may have fewer images than positions.
            indices: which positions, in this order; all positions in the dataset's order by default.
        """
        raise TypeError(f"{type(self).__name__} does not define batches")

    def identities(self) -> Iterator[str]:
        """A name for each image used that is the same in every dataset with this image; empty if it is unknown."""
        return iter(())

    def fingerprint(self) -> str:
        """A hash of the images and labels. Stored results are only reused for the same hash."""
        raise TypeError(f"{type(self).__name__} does not define fingerprint")

    def contents(self) -> str:
        """A hash of the images and labels that are used, in their order, the same on every machine if it can be."""
        return digest(self.fingerprint(), self.limit, self.subset_seed, self.skip)

    def check_classes(self, teacher: Teacher) -> None:
        """Check that the labels can be positions in the teacher's list of classes.

        Raises:
            DataError: they cannot: another number of classes, or names that timm knows in another order. Or ``skip``
                leaves no images.
        """
        if self.skip:
            len(self)
        if problem := self._compared(teacher).problem:
            raise DataError(f"evaluation.dataset: {problem}")
        if self.classes != teacher.num_classes:
            raise DataError(
                f"evaluation.dataset: has {self.classes} classes, {teacher.name} knows {teacher.num_classes}; labels "
                "are positions in the list of classes, so both must have the same ones"
            )

    def class_warnings(self, teacher: Teacher) -> list[str]:
        """A line if the classes may have another order than the teacher's."""
        doubt = self._compared(teacher).doubt
        return [f"evaluation.dataset: {doubt}"] if doubt else []

    def _compared(self, teacher: Teacher) -> Comparison:
        stated = getattr(self, "class_order", None) is not None
        key = "class_order, the names" if hasattr(self, "class_order") else "numbers"
        return compared(self.label_names, teacher, stated, f"give {key} in the order of the model's classes")

    def chosen(self, count: int) -> list[int]:
        """The positions that are used, of a dataset with ``count`` images, ascending.

        Raises:
            DataError: ``skip`` leaves no images.
        """
        if count and self.skip >= count:
            raise DataError(f"skip = {self.skip} leaves none of the {count} images of the dataset; lower it")
        if not self.skip and (self.limit is None or self.limit >= count):
            return list(range(count))
        generator = torch.Generator().manual_seed(self.subset_seed)
        drawn = torch.randperm(count, generator=generator, device="cpu")[self.skip :]
        return drawn[: self.limit].sort().values.tolist()
