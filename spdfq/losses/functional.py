"""The losses as pure functions of plain tensors: the ground truth of each formula."""

from spdfq.losses.attention_prior import attention_prior_loss
from spdfq.losses.cross_entropy import cross_entropy, soft_cross_entropy
from spdfq.losses.patch_similarity import patch_similarity_entropy
from spdfq.losses.total_variation import total_variation

__all__ = [
    "attention_prior_loss",
    "cross_entropy",
    "patch_similarity_entropy",
    "soft_cross_entropy",
    "total_variation",
]
