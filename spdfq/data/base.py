"""What every labelled dataset is: which of its images are used, in what order, and which labels fit a model."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.errors import DataError
from spdfq.teacher import Teacher

# labels from here on are a mistake, and beyond int64 no tensor would hold them
MOST_CLASSES = 2**31


class Batch(NamedTuple):
    """Consecutive images of a dataset, as a model takes them.

    Args:
        images: normalised, ``[b, C, H, W]``.
        labels: int64 ``[b]``.
        damaged: names of the images that could not be read and are left out.
    """

    images: Tensor
    labels: Tensor
    damaged: tuple[str, ...] = ()


@frozen(kw_only=True)
class LabelledImages:
    """Base class of datasets.

    Args:
        limit: how many images are used; all where it is left out.
        subset_seed: which ones: a random draw of this seed, kept in the dataset's order.
    """

    limit: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    subset_seed: int = field(default=0, validator=[validators.ge(0), validators.lt(2**63)])

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not define __len__")

    @property
    def classes(self) -> int | None:
        """How many classes the labels count; ``None`` where they are bare numbers."""
        raise TypeError(f"{type(self).__name__} does not define classes")

    @property
    def class_names(self) -> Sequence[str]:
        """What the classes are called, in the order of the labels, where datasets can be compared by it; else none."""
        return ()

    def batches(self, teacher: Teacher, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """The images in the dataset's order, or those at ``indices`` in their order, ``batch`` at a time.

        Each batch is of ``batch`` positions, the last one of what remains; damaged images are missing from it.
        """
        raise TypeError(f"{type(self).__name__} does not define batches")

    def identities(self) -> Iterator[str]:
        """A name of each image used that is the same in every dataset the image is in; none where that is unknown."""
        return iter(())

    def fingerprint(self) -> str:
        """A hash of what the images are; results that depend on them are kept under it."""
        raise TypeError(f"{type(self).__name__} does not define fingerprint")

    def check_classes(self, teacher: Teacher) -> None:
        """Nothing where the labels can be positions in the teacher's list of classes.

        Raises:
            DataError: they cannot.
        """
        if self.classes != teacher.num_classes:
            raise DataError(
                f"evaluation.dataset: has {self.classes} classes, {teacher.name} knows {teacher.num_classes}; labels "
                "are positions in the list of classes, so both must have the same ones"
            )

    def chosen(self, count: int) -> list[int]:
        """The positions used of a dataset of ``count`` images."""
        if self.limit is None or self.limit >= count:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.subset_seed)
        return torch.randperm(count, generator=generator)[: self.limit].sort().values.tolist()


def shortened(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
