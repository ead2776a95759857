"""Losses of the image synthesis, and the attention priors one of them follows."""

from spdfq.losses.attention_entropy import AttentionEntropyLoss
from spdfq.losses.attention_prior import AttentionPriorLoss
from spdfq.losses.base import Loss, LossInputs
from spdfq.losses.cross_entropy import CrossEntropyLoss, SoftCrossEntropyLoss
from spdfq.losses.discrepancy import MaskedAttentionAlignmentLoss, TeacherStudentDiscrepancyLoss
from spdfq.losses.frequency import FrequencyConsistencyLoss
from spdfq.losses.head_similarity import HeadSimilarityLoss
from spdfq.losses.patch_contrast import PatchContrastLoss
from spdfq.losses.patch_similarity import PatchSimilarityEntropyLoss
from spdfq.losses.priors import GaussianMixturePrior, LaplacePrior
from spdfq.losses.total_variation import TotalVariationLoss

__all__ = [
    "AttentionEntropyLoss",
    "AttentionPriorLoss",
    "CrossEntropyLoss",
    "FrequencyConsistencyLoss",
    "GaussianMixturePrior",
    "HeadSimilarityLoss",
    "LaplacePrior",
    "Loss",
    "LossInputs",
    "MaskedAttentionAlignmentLoss",
    "PatchContrastLoss",
    "PatchSimilarityEntropyLoss",
    "SoftCrossEntropyLoss",
    "TeacherStudentDiscrepancyLoss",
    "TotalVariationLoss",
]
