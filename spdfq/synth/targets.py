"""Targets: the distributions the teacher's outputs are pulled towards."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from spdfq.registry import targets


@targets.register("soft_label", paper="arXiv:2412.16553")
@frozen(kw_only=True)
class SoftLabelTarget:
    """Softlabel learning (SL): ``softmax(Z)``, Z high at the relevant classes and low elsewhere.

    Args:
        low: lower end of U(low, high) at the relevant classes (5 in the paper).
        high: upper end (10 in the paper).
        elsewhere: Z at the other classes: ``normal`` N(0, 1), ``uniform`` U(0, 1) or ``zero`` (unpublished).
    """

    low: float = field(default=5.0, kw_only=False)
    high: float = field(default=10.0, kw_only=False)
    elsewhere: Literal["normal", "uniform", "zero"] = "normal"

    @high.validator
    def _above_low(self, _: Any, value: float) -> None:
        if self is not None and value < self.low:
            raise ValueError(f"must be at least low ({self.low}), got {value}")

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """Draw distributions.

        Args:
            labels: for each of B views the classes it shows: a class index or a sequence of them.
            num_classes: C.
            generator: CPU generator; it alone decides the result.

        Returns:
            ``[B, C]`` float32 probabilities.
        """
        shape = (len(labels), num_classes)
        relevant = self.low + (self.high - self.low) * torch.rand(shape, generator=generator)
        draws = {"normal": torch.randn, "uniform": torch.rand}
        other = draws[self.elsewhere](shape, generator=generator) if self.elsewhere in draws else torch.zeros(shape)
        return torch.where(label_mask(labels, num_classes), relevant, other).softmax(-1)


@targets.register("one_hot")
@frozen(kw_only=True)
class OneHotTarget:
    """All the probability on the label; shared evenly where a view shows several classes."""

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """``[B, C]`` float32 probabilities; see `SoftLabelTarget.sample`."""
        mask = label_mask(labels, num_classes).float()
        return mask / mask.sum(-1, keepdim=True)


def label_mask(labels: Sequence[Any], num_classes: int) -> Tensor:
    """``[B, C]`` boolean from a class index or a sequence of them for each view."""
    mask = torch.zeros(len(labels), num_classes, dtype=torch.bool)
    for row, classes in enumerate(labels):
        mask[row, torch.as_tensor(classes).reshape(-1)] = True
    return mask
