"""Losses of the image synthesis, and priors for the attention prior loss."""

from spdfq.losses.attention_entropy import AttentionEntropyLoss as AttentionEntropyLoss
from spdfq.losses.attention_maps import MapPictures as MapPictures
from spdfq.losses.attention_prior import AttentionPriorLoss as AttentionPriorLoss
from spdfq.losses.attention_prior import attention_prior_loss as attention_prior_loss
from spdfq.losses.attention_prior import draw_priors as draw_priors
from spdfq.losses.base import Loss as Loss
from spdfq.losses.base import LossInputs as LossInputs
from spdfq.losses.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from spdfq.losses.cross_entropy import SoftCrossEntropyLoss as SoftCrossEntropyLoss
from spdfq.losses.frequency import FrequencyConsistencyLoss as FrequencyConsistencyLoss
from spdfq.losses.head_similarity import HeadSimilarityLoss as HeadSimilarityLoss
from spdfq.losses.patch_contrast import PatchContrastLoss as PatchContrastLoss
from spdfq.losses.patch_similarity import PatchSimilarityEntropyLoss as PatchSimilarityEntropyLoss
from spdfq.losses.priors import GaussianMixturePrior as GaussianMixturePrior
from spdfq.losses.priors import LaplacePrior as LaplacePrior
from spdfq.losses.priors import Prior as Prior
from spdfq.losses.teacher_student import MaskedAttentionAlignmentLoss as MaskedAttentionAlignmentLoss
from spdfq.losses.teacher_student import TeacherStudentDiscrepancyLoss as TeacherStudentDiscrepancyLoss
from spdfq.losses.total_variation import TotalVariationLoss as TotalVariationLoss
