"""Label losses: hard and soft cross-entropy over images and their crops."""

from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses
from spdfq.runtime.arguments import check_alike, check_tensor


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy against a distribution, mean over the batch.

    Args:
        logits: ``[B, K]``.
        target: ``[B, K]`` probabilities.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: another shape.
    """
    check_alike("target", target, "logits", logits, "B, K")
    return -(target * at_least_float32(logits).log_softmax(-1)).sum(-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against class indices, mean over the batch.

    Args:
        logits: ``[B, K]``.
        labels: ``[B]`` class indices.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: another shape, or a label that is not a class.
    """
    check_tensor("logits", logits, "B, K")
    check_tensor("labels", labels, "B")
    classes = logits.shape[1]
    if len(labels) != len(logits) or labels.dtype != torch.long or not bool(((labels >= 0) & (labels < classes)).all()):
        raise SpdfqError(f"labels must be {len(logits)} class indices of 0 to {classes - 1}, int64")
    return torch.nn.functional.cross_entropy(at_least_float32(logits), labels)


def _over_views(loss: Loss, inputs: LossInputs, target: Tensor) -> Tensor:
    """For each image the loss of the whole plus the mean over its crops; then the mean over images."""
    logits = loss.given(inputs, "logits")
    weights = inputs.view_weights
    if weights is None:
        if len(logits) != len(inputs.images):
            raise SpdfqError(
                f"{losses.label(loss)}: {len(logits)} logits of {len(inputs.images)} images, but no view_weights; give "
                "those of CropPlan.view_weights"
            )
        weights = logits.new_full((len(logits),), 1 / len(logits))
    return (weights * -(target * logits.log_softmax(-1)).sum(-1)).sum()


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
        return _over_views(self, inputs, self.given(inputs, "targets"))


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
        shares = self.given(inputs, "labels").float()
        return _over_views(self, inputs, shares / shares.sum(-1, keepdim=True))
