"""Losses of the image synthesis, and the attention priors one of them follows."""

from spdfq.losses.attention_prior import AttentionPriorLoss
from spdfq.losses.base import Loss, LossInputs
from spdfq.losses.cross_entropy import CrossEntropyLoss, SoftCrossEntropyLoss
from spdfq.losses.patch_similarity import PatchSimilarityEntropyLoss
from spdfq.losses.priors import GaussianMixturePrior, LaplacePrior
from spdfq.losses.total_variation import TotalVariationLoss

__all__ = [
    "AttentionPriorLoss",
    "CrossEntropyLoss",
    "GaussianMixturePrior",
    "LaplacePrior",
    "Loss",
    "LossInputs",
    "PatchSimilarityEntropyLoss",
    "SoftCrossEntropyLoss",
    "TotalVariationLoss",
]
