"""Quantizers map a tensor to few values; observers choose the range that these values cover.

To add a quantizer or an observer, write a new file with a registered class and add one import line here.
"""

from spdfq.quantizers.adaptive_log import AdaptiveLogQuantizer as AdaptiveLogQuantizer
from spdfq.quantizers.base import Quantizer as Quantizer
from spdfq.quantizers.dual_uniform import DualUniformQuantizer as DualUniformQuantizer
from spdfq.quantizers.log2 import Log2Quantizer as Log2Quantizer
from spdfq.quantizers.log2 import LogSqrt2Quantizer as LogSqrt2Quantizer
from spdfq.quantizers.observers import GridMseObserver as GridMseObserver
from spdfq.quantizers.observers import MinMaxObserver as MinMaxObserver
from spdfq.quantizers.observers import Observer as Observer
from spdfq.quantizers.observers import PercentileMseObserver as PercentileMseObserver
from spdfq.quantizers.observers import RunningMinMaxObserver as RunningMinMaxObserver
from spdfq.quantizers.power_of_two_factor import PowerOfTwoFactorQuantizer as PowerOfTwoFactorQuantizer
from spdfq.quantizers.product import Product as Product
from spdfq.quantizers.progressive_observer import ProgressiveObserver as ProgressiveObserver
from spdfq.quantizers.scale_learning import learned_scales as learned_scales
from spdfq.quantizers.shift_uniform_log2 import ShiftUniformLog2Quantizer as ShiftUniformLog2Quantizer
from spdfq.quantizers.twin_uniform import TwinUniformQuantizer as TwinUniformQuantizer
from spdfq.quantizers.uniform import UniformQuantizer as UniformQuantizer
