"""Back-ends: where quantizers are placed, and the steps that calibrate and repair a quantized model."""

from spdfq.backends.adalog import AdaLog
from spdfq.backends.adaround import AdaRound
from spdfq.backends.base import Calibration, Step
from spdfq.backends.blockwise import Blockwise
from spdfq.backends.calibrate import Calibrate
from spdfq.backends.distill import Distill
from spdfq.backends.model import QuantizedModel, Site
from spdfq.backends.place import place
from spdfq.backends.placements import MatmulInputs, Psaq, WeightsOnly
from spdfq.backends.ptf import PowerOfTwoFactors
from spdfq.backends.quantize import quantize
from spdfq.backends.repq import RepQ
from spdfq.backends.ridge import Ridge

__all__ = [
    "AdaLog",
    "AdaRound",
    "Blockwise",
    "Calibrate",
    "Calibration",
    "Distill",
    "MatmulInputs",
    "PowerOfTwoFactors",
    "Psaq",
    "QuantizedModel",
    "RepQ",
    "Ridge",
    "Site",
    "Step",
    "WeightsOnly",
    "place",
    "quantize",
]
