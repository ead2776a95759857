"""Targets: the distributions that the teacher's outputs are pulled towards."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.errors import ComponentError, SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.registry import targets
from spdfq.runtime.arguments import check_generator, check_whole
from spdfq.runtime.runtime import normal, uniform

Elsewhere = Literal["normal", "uniform", "zero"]
# the softmax of larger logits is one-hot in float32 anyway
_LOGIT = (validators.ge(-1e4), validators.le(1e4))


@frozen
class Target(Checked):
    """Base class of targets. A subclass defines `sample`, or sets ``gives_labels`` to false."""

    gives_labels: ClassVar[bool] = True
    """Whether images have labels at all. If not, `sample` is never called and label losses are refused."""

    soft: ClassVar[bool] = False
    """Whether classes that a view does not show get a probability too."""

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """Draw a distribution for each view.

        Args:
            labels: the classes that each of B views shows: a class index, or a sequence of class indices; for example
                ``plan.view_classes(count)`` of a `CropPlan`.
            num_classes: K.
            generator: CPU generator. The result must depend on the arguments and on nothing else.

        Returns:
            ``[B, K]`` float32 probabilities.

        Raises:
            SpdfqError: a view shows no class, or a class outside 0 to K - 1; `label_mask` checks this.
        """
        raise ComponentError(f"{type(self).__name__} does not define sample")


@targets.register("soft_label", paper="arXiv:2412.16553")
@frozen
class SoftLabelTarget(Target):
    """Softlabel learning (SL): ``softmax(Z)``, where the logits Z are high at the relevant classes and low elsewhere.

    Args:
        low: lower end of U(low, high) at the relevant classes (5 in the paper).
        high: upper end (10 in the paper).
        elsewhere: Z at the other classes: ``normal`` N(0, 1), ``uniform`` U(0, 1) or ``zero`` (unpublished).
    """

    soft: ClassVar[bool] = True

    low: float = field(default=5.0, validator=list(_LOGIT))
    high: float = field(default=10.0, validator=list(_LOGIT))
    elsewhere: Elsewhere = field(default="normal", kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(f"high must be at least low ({self.low}), got {self.high}")

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """``[B, K]`` float32 probabilities; see `Target.sample`."""
        check_generator(generator)
        mask = label_mask(labels, num_classes)
        shape = mask.shape
        relevant = self.low + (self.high - self.low) * uniform(generator, *shape)
        draws = {"normal": normal, "uniform": uniform}
        other = draws[self.elsewhere](generator, *shape) if self.elsewhere in draws else torch.zeros_like(relevant)
        return torch.where(mask, relevant, other).softmax(-1)


@targets.register("one_hot")
@frozen
class OneHotTarget(Target):
    """All probability on the label, shared evenly if a view shows several classes."""

    def sample(self, labels: Sequence[Any], num_classes: int, generator: torch.Generator) -> Tensor:
        """``[B, K]`` float32 probabilities; see `Target.sample`."""
        mask = label_mask(labels, num_classes).float()
        return mask / mask.sum(-1, keepdim=True)


@targets.register("none")
@frozen
class NoTarget(Target):
    """No labels: the images are not pulled towards any class (as in PSAQ-ViT V2)."""

    gives_labels: ClassVar[bool] = False


def label_mask(labels: Sequence[Any], num_classes: int) -> Tensor:
    """``[B, K]`` boolean: the classes that each view shows, given as a class index or a sequence of them.

    Raises:
        SpdfqError: a view shows no class, or a class outside 0 to K - 1.
    """
    check_whole("num_classes", num_classes, 1)
    if not isinstance(labels, Sequence | Tensor) or isinstance(labels, str):
        raise SpdfqError(f"labels must hold the classes of each view, such as [3, [0, 2]], got {labels!r}")
    mask = torch.zeros(len(labels), num_classes, dtype=torch.bool, device="cpu")
    for row, classes in enumerate(labels):
        shown = _indices(classes)
        if not len(shown) or shown.min() < 0 or shown.max() >= num_classes:
            raise SpdfqError(f"labels of view {row}: expected classes of 0 to {num_classes - 1}, got {classes}")
        mask[row, shown] = True
    return mask


def _indices(classes: Any) -> Tensor:
    """Class indices ``[n]``; empty if they are no whole numbers."""
    try:
        shown = torch.as_tensor(classes, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    no_numbers = shown.dtype == torch.bool or shown.is_floating_point() or shown.is_complex()
    return shown[:0] if no_numbers else shown.long()
