"""The losses as pure functions of plain tensors: the ground truth of each formula."""

from spdfq.losses.attention_entropy import attention_entropy
from spdfq.losses.attention_prior import attention_prior_loss
from spdfq.losses.cross_entropy import cross_entropy, soft_cross_entropy
from spdfq.losses.frequency import frequency_consistency, frequency_split
from spdfq.losses.head_similarity import head_similarity, head_ssim
from spdfq.losses.patch_contrast import patch_contrast
from spdfq.losses.patch_similarity import patch_similarity_entropy
from spdfq.losses.teacher_student import masked_attention_distance, teacher_student_discrepancy
from spdfq.losses.total_variation import total_variation

__all__ = [
    "attention_entropy",
    "attention_prior_loss",
    "cross_entropy",
    "frequency_consistency",
    "frequency_split",
    "head_similarity",
    "head_ssim",
    "masked_attention_distance",
    "patch_contrast",
    "patch_similarity_entropy",
    "soft_cross_entropy",
    "teacher_student_discrepancy",
    "total_variation",
]
