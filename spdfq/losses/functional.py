"""The losses as pure functions of plain tensors: each formula without the component around it."""

from spdfq.losses.attention_entropy import attention_entropy as attention_entropy
from spdfq.losses.attention_prior import attention_prior_loss as attention_prior_loss
from spdfq.losses.attention_prior import draw_priors as draw_priors
from spdfq.losses.cross_entropy import cross_entropy as cross_entropy
from spdfq.losses.cross_entropy import soft_cross_entropy as soft_cross_entropy
from spdfq.losses.frequency import frequency_consistency as frequency_consistency
from spdfq.losses.frequency import frequency_split as frequency_split
from spdfq.losses.head_similarity import head_similarity as head_similarity
from spdfq.losses.head_similarity import head_ssim as head_ssim
from spdfq.losses.patch_contrast import patch_contrast as patch_contrast
from spdfq.losses.patch_similarity import patch_similarity_entropy as patch_similarity_entropy
from spdfq.losses.teacher_student import masked_attention_distance as masked_attention_distance
from spdfq.losses.teacher_student import teacher_student_discrepancy as teacher_student_discrepancy
from spdfq.losses.total_variation import total_variation as total_variation
