"""Finds what costs a quantized model its accuracy, and suggests what to change; `spdfq.diagnose` calls it."""

from spdfq.doctor.block_errors import BlockError as BlockError
from spdfq.doctor.channels import Outlier as Outlier
from spdfq.doctor.diagnosis import Diagnosis as Diagnosis
from spdfq.doctor.effects import SiteEffect as SiteEffect
from spdfq.doctor.site_values import SiteValues as SiteValues
from spdfq.doctor.suggestion import Suggestion as Suggestion
