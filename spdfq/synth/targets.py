"""Targets: the distributions the teacher's outputs are pulled towards."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.registry import targets

Elsewhere = Literal["normal", "uniform", "zero"]
# softmax has nothing left to tell apart beyond
_LOGIT = (validators.ge(-1e4), validators.le(1e4))


@targets.register("soft_label", paper="arXiv:2412.16553")
@frozen
class SoftLabelTarget:
    """Softlabel learning (SL): ``softmax(Z)``, Z high at the relevant classes and low elsewhere.

    Args:
        low: lower end of U(low, high) at the relevant classes (5 in the paper).
        high: upper end (10 in the paper).
        elsewhere: Z at the other classes: ``normal`` N(0, 1), ``uniform`` U(0, 1) or ``zero`` (unpublished).
    """

    low: float = field(default=5.0, validator=list(_LOGIT))
    high: float = field(default=10.0, validator=list(_LOGIT))
    elsewhere: Elsewhere = field(default="normal", validator=validators.in_(get_args(Elsewhere)), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(f"high must be at least low ({self.low}), got {self.high}")

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """Draw distributions.

        Args:
            labels: for each of B views the classes it shows: a class index or a sequence of them.
            num_classes: C.
            generator: CPU generator; it alone decides the result.

        Returns:
            ``[B, C]`` float32 probabilities.

        Raises:
            SpdfqError: a view without a class, or one that is not of 0 to C - 1.
        """
        shape = (len(labels), num_classes)
        relevant = self.low + (self.high - self.low) * torch.rand(shape, generator=generator)
        draws = {"normal": torch.randn, "uniform": torch.rand}
        other = draws[self.elsewhere](shape, generator=generator) if self.elsewhere in draws else torch.zeros(shape)
        return torch.where(label_mask(labels, num_classes), relevant, other).softmax(-1)


@targets.register("one_hot")
@frozen
class OneHotTarget:
    """All the probability on the label; shared evenly where a view shows several classes."""

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """``[B, C]`` float32 probabilities; see `SoftLabelTarget.sample`."""
        mask = label_mask(labels, num_classes).float()
        return mask / mask.sum(-1, keepdim=True)


@targets.register("none")
@frozen
class NoTarget:
    """No labels at all: the images are not pulled to any class (as in PSAQ-ViT V2)."""

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> None:
        """Nothing; see `SoftLabelTarget.sample`."""
        return None


def label_mask(labels: Sequence[Any], num_classes: int) -> Tensor:
    """``[B, C]`` boolean from a class index or a sequence of them for each view.

    Raises:
        SpdfqError: a view without a class, or one that is not of 0 to C - 1.
    """
    mask = torch.zeros(len(labels), num_classes, dtype=torch.bool)
    for row, classes in enumerate(labels):
        shown = torch.as_tensor(classes).reshape(-1)
        if not len(shown) or shown.is_floating_point() or shown.min() < 0 or shown.max() >= num_classes:
            raise SpdfqError(f"labels of view {row}: expected classes of 0 to {num_classes - 1}, got {classes}")
        mask[row, shown] = True
    return mask
