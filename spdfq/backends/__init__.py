"""Back-ends: where quantizers are placed, and the steps that calibrate and repair a quantized model."""

from spdfq.backends.base import Calibration as Calibration
from spdfq.backends.base import Step as Step
from spdfq.backends.calibrate import Calibrate as Calibrate
from spdfq.backends.closed_form.ridge import Ridge as Ridge
from spdfq.backends.learning.adaround import AdaRound as AdaRound
from spdfq.backends.learning.blockwise import Blockwise as Blockwise
from spdfq.backends.learning.distill import Distill as Distill
from spdfq.backends.quantize import quantize as quantize
from spdfq.backends.transforms.adalog import AdaLog as AdaLog
from spdfq.backends.transforms.ptf import PowerOfTwoFactors as PowerOfTwoFactors
from spdfq.backends.transforms.repq import RepQ as RepQ
