"""Differences between two models with 95 % intervals, paired over seeds and test images."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from attrs import frozen

LEVEL = 95
_ENDS = ((100 - LEVEL) / 2, (100 + LEVEL) / 2)
_DRAWS = 20_000
_SEED = 0
Values = npt.NDArray[np.float64]


@frozen
class Difference:
    """A difference of accuracies in percentage points.

    Args:
        mean: over seeds and test images.
        low: lower end of the 95 % interval.
        high: upper end.
        seeds: number of seeds that both have.
        images: number of test images that were paired; ``None`` if the interval covers the seeds only.
    """

    mean: float
    low: float
    high: float
    seeds: int
    images: int | None

    @property
    def better(self) -> bool:
        """Whether the interval covers both seeds and images, and is above zero."""
        return self.low > 0 and self.images is not None and self.seeds > 1

    def __str__(self) -> str:
        only = " (seeds only)" if self.images is None else " (images only)" if self.seeds == 1 else ""
        return f"{self.mean:+.1f} [{self.low:.1f}, {self.high:.1f}]{only}"


def paired_difference(own: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> Difference:
    """How much more often one model is right than another, for the same seeds and test images.

    The interval answers: which differences are compatible with the results, if new seeds were drawn and new test
    images? Test images are resampled 20,000 times (bootstrap). Seeds are too few to be resampled: with two to six, that
    gives intervals that are too short. The deviation of the mean over the seeds is drawn from Student's t instead, with
    the standard error of the seeds. What the seeds change about single images is part of that standard error, so its
    share is taken out of the spread over the images (analysis of variance of the table of seeds and images).

    Args:
        own: whether each image is classified correctly, bool ``[seeds, images]``.
        other: the same of the other model.

    Returns:
        The difference in percentage points. With one seed, the interval covers the test images only.
    """
    table = 100.0 * (own.astype(np.float64) - other.astype(np.float64))
    seeds, images = table.shape
    over_images, over_seeds, mean = table.mean(0), table.mean(1), float(table.mean())
    drawn = _resampled(over_images - mean)
    if seeds > 1:
        drawn = drawn * _share_of_images(table) + _student(over_seeds)
    low, high = np.percentile(drawn, _ENDS)
    return Difference(mean, mean + float(low), mean + float(high), seeds, images)


def difference_over_seeds(own: Sequence[float], other: Sequence[float]) -> Difference:
    """The same without per-image results: the interval covers the seeds only (Student's t of the paired differences).

    Args:
        own: accuracy of each seed in percent; at least two.
        other: of the other model, for the same seeds.
    """
    differences = np.asarray(own, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    mean = float(differences.mean())
    low, high = np.percentile(_student(differences), _ENDS)
    return Difference(mean, mean + float(low), mean + float(high), len(differences), None)


def _resampled(deviations: Values) -> Values:
    """Means of resampled deviations ``[draws]``. Few values are distinct, so their counts are drawn instead."""
    values, counts = np.unique(deviations, return_counts=True)
    images = len(deviations)
    drawn = np.random.default_rng(_SEED).multinomial(images, counts / images, _DRAWS)
    return np.asarray(drawn @ values / images, dtype=np.float64)


def _student(values: Values) -> Values:
    """Deviations of a mean of few values ``[draws]``."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) * _of_student(len(values) - 1)


@cache
def _of_student(freedom: int) -> Values:
    return np.asarray(np.random.default_rng(_SEED + 1).standard_t(freedom, _DRAWS))


def _share_of_images(table: Values) -> float:
    """Standard deviation over images that all seeds share, as a share of the one of their means."""
    seeds, images = table.shape
    over_images, over_seeds = table.mean(0, keepdims=True), table.mean(1, keepdims=True)
    rest = ((table - over_images - over_seeds + table.mean()) ** 2).sum() / max((seeds - 1) * (images - 1), 1)
    shared = seeds * ((over_images - table.mean()) ** 2).sum() / max(images - 1, 1)
    return float(np.sqrt(max(0.0, 1 - rest / shared))) if shared > 0 else 0.0
