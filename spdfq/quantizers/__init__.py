"""Quantizers map a tensor to its quantized self; observers choose the range they work in."""

from spdfq.quantizers.adaptive_log import AdaptiveLogQuantizer as AdaptiveLogQuantizer
from spdfq.quantizers.base import Quantizer as Quantizer
from spdfq.quantizers.dual_uniform import DualUniformQuantizer as DualUniformQuantizer
from spdfq.quantizers.learned import learned_scales as learned_scales
from spdfq.quantizers.log2 import Log2Quantizer as Log2Quantizer
from spdfq.quantizers.log2 import LogSqrt2Quantizer as LogSqrt2Quantizer
from spdfq.quantizers.observers import GridMseObserver as GridMseObserver
from spdfq.quantizers.observers import MinMaxObserver as MinMaxObserver
from spdfq.quantizers.observers import Observer as Observer
from spdfq.quantizers.observers import PercentileMseObserver as PercentileMseObserver
from spdfq.quantizers.observers import Product as Product
from spdfq.quantizers.observers import RunningMinMaxObserver as RunningMinMaxObserver
from spdfq.quantizers.power_of_two_factor import PowerOfTwoFactorQuantizer as PowerOfTwoFactorQuantizer
from spdfq.quantizers.progressive import ProgressiveObserver as ProgressiveObserver
from spdfq.quantizers.shift_uniform_log2 import ShiftUniformLog2Quantizer as ShiftUniformLog2Quantizer
from spdfq.quantizers.twin_uniform import TwinUniformQuantizer as TwinUniformQuantizer
from spdfq.quantizers.uniform import UniformQuantizer as UniformQuantizer
