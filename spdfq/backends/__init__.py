"""Back-ends: steps that calibrate a quantized model and reduce its quantization error.

The files here are shared by all steps. The folders hold the steps themselves, and files that only they use:
``transforms`` (the network computes the same in float), ``closed_form`` (least squares), ``learning`` (gradients);
``budget`` chooses bit-widths. To add a step, write a new file with a registered class and add one import line here.
"""

from spdfq.backends.base import Calibration as Calibration
from spdfq.backends.base import Step as Step
from spdfq.backends.calibrate import Calibrate as Calibrate
from spdfq.backends.closed_form.ridge import Ridge as Ridge
from spdfq.backends.learning.adaround import AdaRound as AdaRound
from spdfq.backends.learning.blockwise import Blockwise as Blockwise
from spdfq.backends.learning.distill import Distill as Distill
from spdfq.backends.learning.global_local import GlobalLocal as GlobalLocal
from spdfq.backends.quantize import quantize as quantize
from spdfq.backends.transforms.adalog import AdaLog as AdaLog
from spdfq.backends.transforms.ptf import PowerOfTwoFactors as PowerOfTwoFactors
from spdfq.backends.transforms.repq import RepQ as RepQ
from spdfq.backends.transforms.rotate import Rotate as Rotate
from spdfq.backends.transforms.smooth import Smooth as Smooth
