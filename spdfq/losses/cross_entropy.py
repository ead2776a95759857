"""Label losses: hard and soft cross-entropy over images and their crops."""

from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy against a distribution, mean over the batch.

    Args:
        logits: ``[B, K]``.
        target: ``[B, K]`` probabilities.

    Returns:
        A scalar, in nats.
    """
    return -(target * at_least_float32(logits).log_softmax(-1)).sum(-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against class indices, mean over the batch.

    Args:
        logits: ``[B, K]``.
        labels: ``[B]`` class indices.

    Returns:
        A scalar, in nats.
    """
    return torch.nn.functional.cross_entropy(at_least_float32(logits), labels)


def _over_views(inputs: LossInputs, target: Tensor) -> Tensor:
    """For each image the loss of the whole plus the mean over its crops; then the mean over images."""
    assert inputs.logits is not None
    assert inputs.view_weights is not None
    per_view = -(target * inputs.logits.log_softmax(-1)).sum(-1)
    return (inputs.view_weights * per_view).sum()


@losses.register("soft_cross_entropy", paper="arXiv:2412.16553")
@define(kw_only=True)
class SoftCrossEntropyLoss(Loss):
    """Softlabel learning (SL): cross-entropy to the target distribution, whole image plus mean over its crops.

    Args:
        weight: factor of this loss.
    """

    label_loss: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        assert inputs.targets is not None
        return _over_views(inputs, inputs.targets)


@losses.register("cross_entropy", paper="arXiv:2203.02250")
@define(kw_only=True)
class CrossEntropyLoss(Loss):
    """Cross-entropy to the hard label, which is shared evenly if a view shows several classes.

    Args:
        weight: factor of this loss.
    """

    label_loss: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        assert inputs.labels is not None
        shares = inputs.labels.float()
        return _over_views(inputs, shares / shares.sum(-1, keepdim=True))
