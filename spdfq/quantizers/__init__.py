"""Quantizers map a tensor to its quantized self; observers choose the range they work in."""

from spdfq.quantizers.adaptive_log import AdaptiveLogQuantizer
from spdfq.quantizers.base import Quantizer
from spdfq.quantizers.dual_uniform import DualUniformQuantizer
from spdfq.quantizers.learned import learned_scales
from spdfq.quantizers.log2 import Log2Quantizer, LogSqrt2Quantizer
from spdfq.quantizers.observers import (
    GridMseObserver,
    MinMaxObserver,
    Observer,
    PercentileMseObserver,
    Product,
    RunningMinMaxObserver,
)
from spdfq.quantizers.power_of_two_factor import PowerOfTwoFactorQuantizer
from spdfq.quantizers.progressive import ProgressiveObserver
from spdfq.quantizers.shift_uniform_log2 import ShiftUniformLog2Quantizer
from spdfq.quantizers.twin_uniform import TwinUniformQuantizer
from spdfq.quantizers.uniform import UniformQuantizer

__all__ = [
    "AdaptiveLogQuantizer",
    "DualUniformQuantizer",
    "GridMseObserver",
    "Log2Quantizer",
    "LogSqrt2Quantizer",
    "MinMaxObserver",
    "Observer",
    "PercentileMseObserver",
    "PowerOfTwoFactorQuantizer",
    "Product",
    "ProgressiveObserver",
    "Quantizer",
    "RunningMinMaxObserver",
    "ShiftUniformLog2Quantizer",
    "TwinUniformQuantizer",
    "UniformQuantizer",
    "learned_scales",
]
